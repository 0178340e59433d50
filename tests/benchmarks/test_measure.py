"""Benchmarks of kernels compare before they time, say what failed and why, and leave a whole record at any moment."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import duel, expert_mlp, measure, peers
from benchmarks.expert_mlp import Bench, Case
from benchmarks.measure import Report, difference, failure, medians
from benchmarks.product_calls import (
    Data,
    cublas_call,
    grouped_call,
    our_call,
    prepare,
    shipped,
    variants,
    worst_difference,
)
from benchmarks.routings import from_loads
from benchmarks.shapes import PRODUCTS, Shape
from moe.kernels.experts import reference
from tests.conftest import ROOT, rel


def test_a_record_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    duel.write_record(path, {"rows": [1]})
    opened = Path.open

    @contextmanager
    def torn(self: Path, mode: str) -> Iterator[Any]:
        def write(content: bytes) -> None:
            file.write(content[: len(content) // 2])
            raise OSError("the disk is full")

        with opened(self, mode) as file:
            yield SimpleNamespace(write=write)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", torn)
        with pytest.raises(OSError, match="disk is full"):
            duel.write_record(path, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_report_is_written_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    report = Report(path, {"machine": "this"}, str)
    for n in range(3):
        report.row({"ms": n})
        assert json.loads(path.read_text())["rows"] == [{"ms": i} for i in range(n + 1)]
    report.note("out of memory", shape="gpt4", side="peer")
    record = json.loads(path.read_text())
    assert record["notes"] == [{"shape": "gpt4", "side": "peer", "problem": "out of memory"}]
    assert record["machine"] == "this"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("tried to allocate 18 GiB"), "out of memory: tried to allocate 18 GiB"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out of memory: Triton Error"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory: CUDA error"),
        (
            RuntimeError("out of resource: shared memory, Required: 300000"),
            "does not run here: RuntimeError: out of res",
        ),
        (TypeError("forward() takes 3 arguments"), "does not run here: TypeError: forward() takes"),
    ],
)
def test_out_of_memory_is_said_to_be_that_and_nothing_else_is(error: Exception, said: str) -> None:
    assert failure(error).startswith(said)


def test_a_side_that_runs_out_of_memory_takes_no_other_with_it() -> None:
    calls = {"first": 0, "second": 0}

    def counted(name: str, fails_at: int) -> None:
        calls[name] += 1
        if calls[name] == fails_at:
            raise torch.OutOfMemoryError("no room")

    problems: dict[str, str] = {}
    sides = {"first": lambda: counted("first", 2), "second": lambda: counted("second", 99)}
    assert list(medians(sides, 4, "cpu", problems)) == ["second"]
    assert problems == {"first": "out of memory: no room"}
    assert calls == {"first": 2, "second": 4}
    with pytest.raises(torch.OutOfMemoryError):
        medians({"first": lambda: counted("first", 3)}, 4, "cpu")


def test_differences_are_relative_and_see_what_is_not_a_number() -> None:
    a, b = torch.randn(7, 5, 3), torch.randn(4)
    assert difference([a, b], [a, b]) == 0
    assert difference([a * 1.01, b], [a, b]) == pytest.approx(0.01, rel=1e-3)
    assert difference([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert difference([torch.full((2,), 1e-3)], [torch.zeros(2)]) > 1
    assert difference([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) == float("inf")


# ---------------------------------------------------------------------------------------------------- the expert MLP

SHAPE = Shape(16, 16, 4, 2, (4,))


def bench_of(tmp_path: Path, others: dict[str, Any]) -> Bench:
    report = Report(tmp_path / "record.json", {}, expert_mlp.line)
    return Bench("cpu", torch.float32, 1, 1.0, others, report)


def ids_of(case: Case) -> Tensor:
    return from_loads([4, 3, 1, 0], case.tokens, 2, torch.Generator().manual_seed(0))


def test_sides_that_fail_are_named_and_the_others_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(impl: str | None = None, recompute: bool = False) -> peers.Layer:
        return peers.ours("grouped" if impl == "triton" else impl, recompute)  # not in the interpreter

    def crowded(*inputs: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 27 GiB")

    def foreign(*inputs: Tensor) -> Tensor:
        raise TypeError("another version")

    def idle(x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Right, but for the gradient of the expert without rows, which is not that of zeros."""
        y = peers.ours("reference")(x, w_in, w_out, weights, ids)
        return y + 0 * x + (w_in[3] - w_in[3].detach()).sum()

    monkeypatch.setattr(expert_mlp, "ours", quick)
    bench = bench_of(tmp_path, {"crowded": crowded, "foreign": foreign, "idle": idle, "right": peers.ours("grouped")})
    case = Case("toy", SHAPE, 4, "odd")
    expert_mlp.compare(case, ids_of(case), bench)
    record = json.loads((tmp_path / "record.json").read_text())
    notes = {note["side"]: note["problem"] for note in record["notes"]}
    assert notes["crowded"] == "out of memory: tried to allocate 27 GiB"
    assert notes["foreign"] == "does not run here: TypeError: another version"
    assert notes["idle"].startswith("WRONG, differs by")
    assert set(notes) == {"crowded", "foreign", "idle"}
    timed = {(row["kind"], row["side"]) for row in record["rows"]}
    assert timed == {
        *(("forward", side) for side in ("gpt4-moe", "right", expert_mlp.LOOP)),
        *(("forward + backward", s) for s in ("gpt4-moe", "gpt4-moe, recompute", "right", expert_mlp.LOOP)),
        ("routing + gather + combine", "gpt4-moe"),
    }


def test_what_does_not_fit_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gpt4", Shape(10752, 28672, 16, 2, (8192,)), 8192, "balanced")
    monkeypatch.setattr(measure, "free_bytes", lambda device: 40.0 * 2**30)
    monkeypatch.setattr(sys.modules["measure"], "free_bytes", lambda device: 40.0 * 2**30)
    monkeypatch.setattr(expert_mlp, "make", lambda *args: pytest.fail("it was started"))
    bench = bench_of(tmp_path, {})
    expert_mlp.compare(case, torch.arange(16384).remainder(16).view(8192, 2), bench)
    assert bench.report.record["rows"] == []
    (note,) = bench.report.record["notes"]
    assert note["problem"].startswith("does not fit: needs ")
    assert note["problem"].endswith("GiB at its peak, 40.0 GiB are free")


def test_the_gradients_kept_of_the_reference_are_two_experts() -> None:
    case = Case("toy", SHAPE, 4, "odd")
    inputs = expert_mlp.make(case, ids_of(case), "cpu", torch.float32)
    dy = torch.randn(4, 16)
    kept = expert_mlp.compared(peers.ours("reference"), expert_mlp.grad_leaves(inputs), dy, [0, 3], few=False)
    y, dx, dw_in, dw_out, dweights = expert_mlp.step(peers.ours("reference"), expert_mlp.grad_leaves(inputs), dy)
    want = [y, dx, dweights, dw_in[0], dw_out[0], dw_in[3], dw_out[3]]
    assert all(torch.equal(a, b) for a, b in zip(kept, want, strict=True))
    assert expert_mlp.compared(peers.ours("reference"), inputs, dy, [0, 3], few=True)[0].equal(y)


@pytest.fixture
def _poisoned():
    """New memory reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned")
def test_the_loop_reads_nothing_that_nobody_wrote() -> None:
    """And its products are products, of operands that are all random: zeros would be faster."""
    loads = [5, 0, 7, 4]
    w_in, w_out, x_RD, dy_RD = (torch.randn(*s) for s in ((4, 2, 24, 16), (4, 16, 24), (16, 16), (16, 16)))
    loop = peers.CublasLoop(w_in, w_out, loads)
    assert loop.ring == 4
    act_0, h_0 = loop.act.clone(), loop.h.clone()
    for t in (act_0, h_0):
        assert t.std() == pytest.approx(1, abs=0.2)
    loop.backward(dy_RD)  # before a forward, too
    rows = list(zip((0, 2, 3), (0, 5, 12), (5, 12, 16), strict=True))
    for e, start, end in rows:
        da = dy_RD[start:end] @ w_out[e]
        assert rel(loop.act[start:end], da) < 1e-5
        assert rel(loop.dw_out[e], dy_RD[start:end].t() @ da) < 1e-5
        assert rel(loop.dw_in[e], h_0[start:end].t() @ dy_RD[start:end]) < 1e-5
        assert rel(loop.y[start:end], h_0[start:end] @ w_in[e].flatten(0, 1)) < 1e-5
    loop.forward(x_RD)
    for e, start, end in rows:
        assert rel(loop.h[start:end], x_RD[start:end] @ w_in[e].flatten(0, 1).t()) < 1e-5
        assert rel(loop.y[start:end], loop.act[start:end] @ w_out[e].t()) < 1e-5


def test_transformers_own_module_is_the_peer() -> None:
    pytest.importorskip("transformers")
    case = Case("toy", SHAPE, 4, "odd")
    inputs = expert_mlp.grad_leaves(expert_mlp.make(case, ids_of(case), "cpu", torch.float32))
    dy, layer = torch.randn(4, 16), peers.transformers_grouped_mm()
    for _ in range(2):  # the module is made once, the tensors are those of each call
        got, want = (expert_mlp.step(side, inputs, dy) for side in (layer, peers.ours("reference")))
        assert difference(got, want) < 1e-5


# ------------------------------------------------------------------------------------------------------ the products


@pytest.fixture(scope="module")
def data() -> Data:
    """Uneven experts, one without rows."""
    made = prepare(Shape(32, 32, 4, 2, (8,)), 8, "cpu", torch.float16)
    ids_TK = from_loads([3, 8, 0, 5], 8, 2, torch.Generator().manual_seed(0))
    order_R = ids_TK.flatten().sort(stable=True).indices
    return made._replace(
        ids_TK=ids_TK, order_R=order_R, ends_E=torch.tensor([3, 11, 11, 16], dtype=torch.int32),
        spans=[(0, 0, 3), (1, 3, 11), (3, 11, 16)],
        x_RD=made.x_TD[order_R // 2], dy_RD=made.dy_TD[order_R // 2],
    )  # fmt: skip


@pytest.mark.parametrize("product", PRODUCTS)
def test_rivals_compute_the_product(product: str, data: Data) -> None:
    for call in (cublas_call(product, data), grouped_call(product, data)):
        assert worst_difference(product, data, call()) < 3e-3


@pytest.mark.parametrize("product", PRODUCTS)
def test_each_path_is_compared_and_a_wrong_result_found(product: str, data: Data) -> None:
    names = []
    for v in variants(data, product):
        names.append(v.path)
        found = our_call(product, data, v)()
        assert worst_difference(product, data, found) < 3e-3
    assert names == ["tma", "pointer"]
    for t in found if isinstance(found, tuple) else (found,):
        flat = t.view(len(t), -1) if product.startswith("dw") else t
        kept = flat[-1].clone()
        flat[-1] *= 1.5  # of the last expert, or the last rows
        assert worst_difference(product, data, found) > 1e-2
        flat[-1] = kept


def test_what_is_expected_is_the_gradient_of_the_reference(data: Data) -> None:
    """Chained by hand, the products' references are autograd's gradients of the whole MLP."""
    w = data.experts
    x, w_in, w_out, weights = leaves = [
        t.float().requires_grad_() for t in (data.x_TD, w.w_in_EGFD, w.w_out_EDF, data.weights_TK)
    ]
    y = reference.expert_mlp(x, w_in, w_out, weights, data.ids_TK, "swiglu")
    dx, dw_in, dw_out, dweights = torch.autograd.grad(y, leaves, data.dy_TD.float())
    from benchmarks.product_calls import expected

    wide = data._replace(**{n: getattr(data, n).float() for n in ("x_RD", "dy_RD", "h_RJ", "act_RF", "dh_RJ")})
    dx_RD = torch.empty(16, 32)
    for span in data.spans:
        e, start, end = span
        rows = slice(start, end)
        wide.h_RJ[rows] = expected("up", wide, span)[0]
        dh, act, dweights_R = expected("down_backward", wide, span)
        wide.dh_RJ[rows], wide.act_RF[rows] = dh, act
        assert rel(dweights_R, dweights.flatten()[data.order_R[rows]]) < 1e-4
        assert rel(expected("dw_out", wide, span)[0], dw_out[e]) < 1e-4
        assert rel(expected("dw_in", wide, span)[0].view(2, 32, 32), dw_in[e]) < 1e-4
        dx_RD[rows] = expected("dx", wide, span)[0]
    assert rel(torch.zeros(8, 32).index_add(0, data.order_R // 2, dx_RD), dx) < 1e-4


def test_the_shipped_kernel_is_what_the_op_runs(data: Data) -> None:
    v = shipped(data)
    assert v.sizes.tma
    assert v.path == "tma"


STOOD_IN = """
import sys
sys.path.append("benchmarks")
from standin.driver import install
standin = install("sm_90")
import torch
import products
from product_calls import our_call, prepare, variants
from shapes import SHAPES

data = prepare(SHAPES["gpt4-quarter"], 2048, "meta", torch.bfloat16)
for v in variants(data, "down"):
    call = our_call("down", data, v)
    used, again = (products.first_call(call, "meta")[1] for _ in range(2))
    print(v.path, used["kernel"], 0 < used["shared"] <= 232_448, used["compile_s"] > 0, sorted(used), again)
print(standin.counts().faults)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="the stand-in is built for Linux")
@pytest.mark.parametrize(
    ("setting", "kernels"),
    [
        # What nobody has run yet is of no other run.
        ({}, ["tma down_kernel", "pointer down_kernel"]),
        ({"GPT4_MOE_GLUON": "1"}, ["gluon product_kernel", "pointer down_kernel", "tma down_kernel"]),
    ],
    ids=["as shipped", "Gluon"],
)
def test_what_a_kernel_needs_is_noted_when_it_is_loaded_and_only_then(
    tmp_path: Path, setting: dict[str, str], kernels: list[str]
) -> None:
    pytest.importorskip("triton.backends.nvidia")
    (tmp_path / "script.py").write_text(STOOD_IN)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"} | setting
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = "['compile_s', 'kernel', 'registers', 'shared', 'spills']"
    assert done.stdout.splitlines() == [*(f"{kernel} True True {keys} {{}}" for kernel in kernels), "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("products.py", {"up", "down", "down_backward", "dw_out", "dw_in", "dx", "route", "gather", "combine", "gate"}),
        ("expert_mlp.py", {"forward", "forward + backward", "layer forward", "layer forward + backward"}),
        ("linear_cross_entropy.py", {"toy"}),
    ],
)
def test_a_dry_run_goes_through_all_of_it(script: str, what: set[str], tmp_path: Path) -> None:
    written = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--dry-run", "--json", str(written)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(written.read_text())
    found = {row.get("product", row.get("kind", row["shape"])) for row in record["rows"]}
    assert what <= found
    assert record["machine"]
    assert record["product_tflops"] > 0
    assert not [note for note in record["notes"] if "WRONG" in note["problem"]]


@pytest.mark.slow
def test_once_launches_every_shipped_product_and_times_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "products.py"), "--dry-run", "--once"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0].strip() for line in done.stdout.splitlines()] == list(PRODUCTS)
