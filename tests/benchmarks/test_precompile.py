"""What the GPU run compiles beforehand is what its parts will look for: on a GPU that is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

precompile = pytest.importorskip("benchmarks.precompile")
ROOT = Path(__file__).parents[2]
COMMON = """
import sys
from pathlib import Path
from benchmarks.standin import driver
standin = driver.install("sm_90")
sys.path.insert(0, "benchmarks")
import precompile, torch
from moe.kernels import tiles

cache = Path(sys.argv[1])

def work():
    precompile.gate(512, 16, 2)
    precompile.experts(2048, 16, 2, 128, 256, train=False)  # through TMA
    precompile.experts(64, 5, 2, 77, 59, train=False)  # through pointers
    tiles.GLUON = True
    precompile.experts(2048, 16, 2, 128, 256, train=False)
    tiles.GLUON = False

def kernels():
    return len([*cache.glob("*/*.cubin")])
"""
BEFOREHAND = """
rows = []
with precompile.compiling(cache / "claims", torch.device("cuda", 0), rows.append):
    work()
print(len(rows), kernels(), [row for row in rows if "error" in row])
"""
LAUNCHED = """
before, counts = kernels(), standin.count(work)
print(before, kernels() - before, counts.launches > before / 2, counts.faults)
"""


WORKER = """
import json, sys, time
from pathlib import Path
try:
    (Path(sys.argv[-1]) / "claim").mkdir()
    first = True
except FileExistsError:
    first = False
print(json.dumps({"kernel": "up", "seconds": 2.0}), flush=True)
if SLOW and not first:
    print('{"kernel": "down", "sec', end="", flush=True)
    time.sleep(60)
print(json.dumps({"kernel": "down", "error": "no"}), flush=True)
"""


def test_a_kernel_that_takes_too_long_costs_only_itself(tmp_path: Path) -> None:
    """What the others have compiled, and the row that was written, stay; the part ends well and in time."""
    command = [sys.executable, "-S", "-c", f"SLOW = False\n{WORKER}"]
    record = precompile.in_parallel(command, 60.0, 1)
    assert (record["ended"], record["kernels"], len(record["compiled"])) == (0, 1, 2)
    record = precompile.in_parallel([*command[:-1], f"SLOW = True\n{WORKER}"], 3.0, 2)
    assert (record["ended"], record["kernels"], len(record["compiled"])) == (1, 2, 3)
    assert record["wall_s"] < 30
    with pytest.raises(SystemExit, match="failed"):
        precompile.in_parallel([*command[:-1], "raise SystemExit(1)"], 60.0, 2)


def run(code: str, cache: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMON + code, str(cache)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the stand-in for CUDA's driver is C")
def test_nothing_is_compiled_twice(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    made, kernels, errors = run(BEFOREHAND, tmp_path).split(maxsplit=2)
    assert int(made) == int(kernels) > 8
    assert errors == "[]"
    assert run(BEFOREHAND, tmp_path) == f"0 {kernels} []", "what one process has taken, another leaves"
    assert run(LAUNCHED, tmp_path) == f"{kernels} 0 True 0", "the same launches find everything"
