"""Every kernel and shipped tile configuration, compiled for GPUs this machine need not have, within the limits.

In processes of their own, without the interpreter that the other tests choose.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "moe.kernels.ahead", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_everything_compiles_within_the_limits(arch: str) -> None:
    done = run("--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all within the limits")
    rows = [line for line in done.stdout.splitlines() if line.startswith(("pointer.", "tma."))]
    for product in ("up", "down", "down_backward", "weight_gradient"):
        assert any(f"pointer.{product} " in row for row in rows)
        # TMA is Hopper's; its products are the ones of training there.
        assert any(f"tma.{product} " in row for row in rows) == (arch == "sm_90")


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moe.kernels.ahead"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
