"""Every kernel and shipped tile configuration, compiled for GPUs this machine need not have, within the limits.

In processes of their own, without the interpreter that the other tests choose.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.kernels import tile_model

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "moe.kernels.ahead", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950")


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == "sm_90" else pytest.mark.slow) for arch in ARCHS]
)
def test_everything_compiles_within_the_limits(arch: str) -> None:
    done = run("--arch", arch, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all within the limits")
    rows = [line for line in done.stdout.splitlines() if line.startswith(("pointer.", "tma."))]
    for product in ("up", "down", "down_backward", "weight_gradient"):
        assert any(f"pointer.{product} " in row for row in rows)
        # TMA is of Hopper and of Blackwell's large cards; its products are the ones of training there.
        assert any(f"tma.{product} " in row for row in rows) == (arch in ("sm_90", "sm_100"))
    for row in rows:
        # name, tile, warps, stages, registers, spills, in the loop, shared memory, and that by arithmetic
        shared, about = (int(word.replace(",", "")) for word in row.split()[7:9])
        assert abs(shared - about) <= tile_model.MARGIN * about + tile_model.SCRATCH, row


def test_every_target_is_compiled_by_a_test() -> None:
    from moe.kernels import ahead

    assert set(ARCHS) == set(ahead.TARGETS)


@pytest.mark.slow
def test_processes_side_by_side_print_the_same_table() -> None:
    alone, beside = (run("--arch", "sm_90", "sm_80", "--only", "rows.", "--jobs", n) for n in "12")
    assert beside.returncode == 0, beside.stdout + beside.stderr
    tables = [[line for line in done.stdout.splitlines() if " kernels in " not in line] for done in (alone, beside)]
    assert tables[0] == tables[1]
    assert sum(line.startswith("sm_") for line in tables[1]) == 2


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moe.kernels.ahead"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
