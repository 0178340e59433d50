"""Launches and tensor maps as Triton's own launcher makes them, on a stand-in for CUDA's driver; no time is tested."""

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


def run_script(folder: Path, text: str) -> list[str]:
    """In a file, where Triton reads its kernels."""
    (folder / "script.py").write_text(text)
    return run(str(folder / "script.py")).splitlines()


def host_cost(folder: Path, *arguments: str) -> dict[str, Any]:
    run("benchmarks/host_cost.py", *arguments, "--json", str(folder / "host.json"))
    return json.loads((folder / "host.json").read_text())


def test_a_server_compiles_few_kernels(tmp_path: Path) -> None:
    """139 sizes of a batch: for each class of sizes its tiles, once; nothing depends on a number of tokens."""
    assert host_cost(tmp_path, "--tokens")["compilations"] == {
        "triton_few.activate_kernel": 1,
        "triton_few.combine_parts_kernel": 1,
        "triton_few.parts_kernel": 6,  # up and down, of one token, of up to 16 and of up to 64
        "triton_gate._gate_kernel": 1,
        "triton_paged.merge_kernel": 1,
        "triton_paged.split_kernel": 1,
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
    # Routes, up, activation, down, sum, where the products are split along the sum; parts of the context, their sum.
    assert found[1, "decoding"] == (5, 0)
    assert found[1, "paged attention"] == found[8192, "paged attention"] == (2, 0)
    # Many: count, scan, place, tiles, gather, up, down, sum; tiles, two gathers, down backward, two gradients, dx, sum.
    assert found[8192, "forward"] == (8, 3 + 3)
    assert found[8192, "backward"] == (8, 5 + 3 + 3 + 3)


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
        print(name, type(error).__name__, str(error).splitlines()[0])
"""


@pytest.mark.slow
def test_what_a_card_refuses_raises(tmp_path: Path) -> None:
    lines = run_script(tmp_path, REFUSED)
    assert [line.split()[0] for line in lines] == ["grid", "stride", "shared"]
    assert "launch with a grid y: 65536" in lines[0]
    assert "tensor map with a stride in bytes: 2199023255552" in lines[1]
    assert "OutOfResources" in lines[2]


REMEMBERED = """
import torch
from benchmarks.standin.driver import install
install("sm_90")
import triton, triton.language as tl
from triton.knobs import runtime
from moe.kernels.launcher import remembered

@remembered
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["y"])
def copy_kernel(x, y, bias, N, T, HALF: tl.constexpr, FLAG: tl.constexpr):
    n = tl.arange(0, 16)
    v = tl.load(x + n, mask=n < N)
    if bias is not None:
        v += tl.load(bias + n, mask=n < N)
    if HALF:
        v *= 0.5
    tl.store(y + n, v.to(y.dtype.element_ty), mask=n < T)

functions = []
runtime.launch_enter_hook.add(lambda metadata: functions.append(metadata.get()["function"]))
x = torch.empty(64)
found = {}
for round in range(2):
    for a in (x, x[1:], x.bfloat16()):
        for bias in (None, x, x[2:]):
            for N in (1, 15, 16, 2**33):
                for T in (1, 7, 16):
                    for half in (False, True):
                        y = x[T % 4 :]
                        copy_kernel[(1,)](a, y, bias, N, T, HALF=half, FLAG="flag")
                        copy_kernel.jit[(1,)](a, y, bias, N, T, FLAG="flag", HALF=half)
                        mine, triton_s = functions[-2:]
                        assert mine == triton_s
                        found[mine] = True
# Dtype and alignment of x; no bias or its alignment; 1, a multiple of 16, another number, one of 64 bits and so a
# multiple of 16; two values of HALF.
assert len(found) == len(copy_kernel._made) == 3 * 3 * 4 * 2, len(found)
copy_kernel[(1,)](x, x.half(), None, 16, 1, HALF=True, FLAG="flag")
assert functions[-1] not in found
runtime.launch_enter_hook.calls.clear()
copy_kernel[(1,)](x, x, None, 16, 1, HALF=True, FLAG="flag")
"""


@pytest.mark.slow
def test_a_launch_that_is_remembered_is_of_the_kernel_that_triton_would_launch(tmp_path: Path) -> None:
    run_script(tmp_path, REMEMBERED)


ASSERTED = """
from moe.kernels import ahead
import triton
for launch in ahead.launches("sm_90"):
    if launch.name not in ("routes.route", "routes.count"):
        continue
    source = triton.compiler.ASTSource(
        fn=launch.kernel, signature=dict(launch.signature), constexprs=dict(launch.constants), attrs={}
    )
    ptx = triton.compile(source, target=ahead.TARGETS["sm_90"], options=dict(launch.options)).asm["ptx"]
    print(launch.name, ptx.count("call.uni") + ptx.count("call "), "__assertfail" in ptx)
"""


@pytest.mark.slow
def test_kernels_that_read_ids_first_assert_that_they_are_ones() -> None:
    """And nothing else: one call in all, where arithmetic that is watched for overflow would have dozens."""
    found = {tuple(line.split()) for line in run("-c", ASSERTED).splitlines()}
    assert found == {("routes.route", "1", "True"), ("routes.count", "1", "True")}
