"""What the GPU run compiles beforehand is what its parts will look for: on a GPU that is not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
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
if not first:
    print('{"kernel": "down", "sec', end="", flush=True)
    time.sleep(120)
print(json.dumps({"kernel": "down", "error": "no"}), flush=True)
"""
SHARED = """
import json, sys
sys.path.insert(0, "benchmarks")
import precompile  # which turns the interpreter off, in all of a process
command = [sys.executable, "-S", "-c", sys.argv[1]]
for seconds, n in ((60.0, 1), (6.0, 2)):
    print(json.dumps(precompile.in_parallel(command, seconds, n)))
precompile.in_parallel([*command[:-1], "raise SystemExit(1)"], 60.0, 2)
"""


def test_a_kernel_that_takes_too_long_costs_only_itself() -> None:
    """What the others have compiled, and the row that was written, stay; the part ends well and in time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARED, WORKER]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    alone, both = map(json.loads, done.stdout.splitlines())
    assert (alone["ended"], alone["kernels"], len(alone["compiled"])) == (0, 1, 2)
    assert (both["ended"], both["kernels"], len(both["compiled"])) == (1, 2, 3)
    assert done.stderr.splitlines()[-1].startswith("2 of 2 processes of the compilation failed")


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
