"""What the GPU run compiles beforehand is what its parts will look for: on a GPU that is not there."""

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
with precompile.compiling(cache / "claims", torch.device("cuda", 0)) as rows:
    work()
print(len(rows), kernels(), [row for row in rows if "error" in row])
"""
LAUNCHED = """
before, counts = kernels(), standin.count(work)
print(before, kernels() - before, counts.launches > before / 2, counts.faults)
"""


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
