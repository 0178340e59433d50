"""What a device has left for tensors."""

import os
from pathlib import Path

import pytest
import torch

from moe import device
from moe.device import free_memory


def test_free_memory_is_less_than_there_is_and_no_more_than_a_container_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CGROUPS", ())
    whole = free_memory(torch.device("cpu"))
    assert 2**20 < whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(device, "CGROUPS", ((tmp_path / "no", used), (limit, used)))
    used.write_text("600\n")
    for text, want in (("1000\n", 400), ("500\n", 0)):
        limit.write_text(text)
        assert free_memory(torch.device("cpu")) == want
    limit.write_text("max\n")
    assert free_memory(torch.device("cpu")) > 2**20
