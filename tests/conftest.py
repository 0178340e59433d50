"""What the tests share: an error measure that has no scale, a tiny model shape, one thread."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from moe.config import AttentionConfig, Config, ExpertsConfig

ROOT = Path(__file__).parent.parent

# The tensors here are tiny: more threads only wait for each other, the more so under pytest -n.
torch.set_num_threads(1)
# A time limit per example would make results depend on how busy the machine is.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Training in this process sets denormal numbers to zero (moe.train.cpu.tune_cpu); the next test has them again."""
    yield
    torch.set_flush_denormal(False)


def rel(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over all elements in float64: 0 when both are all zeros, inf where `got` is not finite."""
    assert got.shape == want.shape, f"{list(got.shape)} against {list(want.shape)}"
    got, want = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    error, scale = (got - want).norm().item(), want.norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale > 0 else (math.inf if error > 0 else 0.0)


def tiny_config(n_kv_heads: int = 1, **changes: object) -> Config:
    """Two layers, five experts, nothing a power of two that need not be."""
    values: dict[str, object] = {
        "name": "tiny",
        "d_model": 24,
        "n_layers": 2,
        "vocab_size": 61,
        "max_seq_len": 40,
        "attention": AttentionConfig(n_heads=4, n_kv_heads=n_kv_heads, head_dim=10),
        "experts": ExpertsConfig(n_experts=5, top_k=2, d_ff=20),
    }
    return Config(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def tiny() -> Config:
    return tiny_config()


def run_cli(*arguments: object) -> object:
    """Runs `moe` with these arguments; returns its exit status."""
    from moe import cli

    with pytest.raises(SystemExit) as exit_:
        cli.main([str(a) for a in arguments])
    return exit_.value.code


def start_cli(*arguments: object) -> subprocess.Popen[str]:
    """Starts `moe` with these arguments in a process of its own, on one thread; its output is in one pipe."""
    command = [sys.executable, "-m", "moe.cli", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
