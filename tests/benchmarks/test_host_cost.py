"""Launches and tensor maps as Triton's own launcher makes them, on a stand-in for CUDA's driver. No time is asserted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="Triton's launcher is for Linux, and cc builds it"
)


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def host_cost(folder: Path, *arguments: str) -> dict[str, Any]:
    run("benchmarks/host_cost.py", *arguments, "--json", str(folder / "host.json"))
    return json.loads((folder / "host.json").read_text())


def test_a_server_compiles_few_kernels(tmp_path: Path) -> None:
    """139 sizes of a batch: for each class of sizes its tiles, once; nothing depends on a number of tokens."""
    assert host_cost(tmp_path, "--tokens")["compilations"] == {
        "triton_gate._gate_kernel": 1,
        "triton_pointer.down_kernel": 2,  # few and some rows an expert
        "triton_pointer.up_kernel": 2,
        "triton_routes._count_kernel": 1,
        "triton_routes._place_kernel": 1,
        "triton_routes._route_kernel": 1,
        "triton_routes._scan_kernel": 1,
        "triton_routes._tile_kernel": 1,
        "triton_rows.combine_kernel": 1,
        "triton_rows.gather_kernel": 1,
        "triton_tma.down_kernel": 1,  # many
        "triton_tma.up_kernel": 1,
    }


@pytest.mark.slow
def test_launches_and_tensor_maps_at_full_width(tmp_path: Path) -> None:
    record = host_cost(tmp_path, "--tokens", "1", "8192", "--rounds", "10")
    found = {(row["tokens"], row["call"]): (row["launches"], row["maps"]) for row in record["rows"]}
    assert all(row["faults"] == 0 for row in record["rows"])
    # One token: routes, up, down, sum; then tiles, down backward, two weight gradients, dx, sum.
    assert found[1, "gate"] == (1, 0)
    assert found[1, "forward"] == found[1, "forward, dispatched by torch"] == (4, 0)
    assert found[1, "backward"] == (6, 0)
    # Many: count, scan, place, tiles, gather, up, down, sum; tiles, two gathers, down backward, two gradients, dx, sum.
    assert found[8192, "forward"] == (8, 3 + 3)
    assert found[8192, "backward"] == (8, 2 + 3 + 3 + 3)


REFUSED = """
import torch
from benchmarks.standin.driver import install
standin = install("sm_120")
import triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit
def rows_kernel(x, N: tl.constexpr):
    x.store([0, 0], x.load([1, 0]))

@triton.jit
def large_kernel(x, N: tl.constexpr):
    a = tl.load(x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], tl.dot(a, a))

x = torch.empty(64, 64, dtype=torch.float16)
assert standin.count(lambda: rows_kernel[(1,)](TensorDescriptor(x, [64, 64], [64, 1], [16, 64]), 64)) == (1, 1, 0)
for name, call in {
    "grid y": lambda: rows_kernel[(1, 65536)](TensorDescriptor(x, [64, 64], [64, 1], [16, 64]), 64),
    "stride": lambda: rows_kernel[(1,)](TensorDescriptor(x, [64, 64], [2**40, 1], [16, 64]), 64),
    "shared": lambda: large_kernel[(1,)](x, 256),
}.items():
    try:
        call()
    except Exception as error:
        print(name, type(error).__name__, error)
"""


@pytest.mark.slow
def test_what_a_card_refuses_raises() -> None:
    lines = run("-c", REFUSED).splitlines()
    assert [line.split()[0] for line in lines] == ["grid", "stride", "shared"]
    assert "launch with a grid y: 65536" in lines[0]
    assert "tensor map with a stride in bytes: 2199023255552" in lines[1]
    assert "OutOfResources" in lines[2]
