"""What a benchmark's shape is said to hold and to move, against tensors that were really made, and against cards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dense, peers, shapes
from benchmarks.expert_mlp import QUICK, QUICK_SECONDS, SECONDS, TRACE, cases, plan
from benchmarks.measure import lacking, planned_rounds
from benchmarks.product_calls import Data, cublas_call, prepare
from benchmarks.shapes import PRODUCTS, SHAPES, Shape, peak_bytes, product_work, products_bytes, side_bytes
from moe.kernels.experts import grouped, reference, triton_mlp
from moe.kernels.experts.triton_pointer import Experts
from moe.profile import Trace

GIB = 2**30
A100_40, CARD_80 = 39.0 * GIB, 78.6 * GIB  # what is free on cards sold as of 40 and 80 GB, with CUDA's own share gone


class Held(TorchDispatchMode):
    """The most bytes at once in storages that were made inside."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.there = {t.untyped_storage()._cdata for t in there}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.held = {key: (ref, n) for key, (ref, n) in self.held.items() if not ref.expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not t.is_meta and t.untyped_storage()._cdata not in self.there:
                storage = t.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(n for _, n in self.held.values()))
        return out


def test_the_meter_measures() -> None:
    x = torch.zeros(1000)
    with Held(x) as meter:
        y = x + 1  # 4,000 bytes
        z = y * 2  # 8,000
        del y
        w = z.view(10, 100)[2:].exp()  # 4,000 and 3,200; a view is nothing
    assert meter.peak == 8000
    assert w.shape == (8, 100)


def inputs(shape: Shape, T: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    D, F, E, K = shape[:4]
    x, dy, w_in, w_out = (
        torch.randn(*size, generator=g).to(dtype) for size in ((T, D), (T, D), (E, 2, F, D), (E, D, F))
    )
    ids = torch.arange(T * K).remainder(E).view(T, K)
    return x, dy, w_in, w_out, torch.rand(T, K, generator=g).softmax(-1), ids


def ours_peaks(shape: Shape, T: int, recompute: bool) -> tuple[int, int]:
    x, dy, w_in, w_out, weights, ids = inputs(shape, T, torch.float16)  # by way of the copies that TMA reads
    experts = Experts(w_in, w_out)
    with Held(x, dy, w_in, w_out, weights, ids) as forward:
        y, h, order, offsets = triton_mlp.forward(x, experts, weights, ids, "swiglu", not recompute)
    with Held(x, dy, w_in, w_out, weights, ids) as both:
        y, h, order, offsets = triton_mlp.forward(x, experts, weights, ids, "swiglu", not recompute)
        triton_mlp.backward(dy, x, experts, weights, h, order, offsets, "swiglu")
    del y
    return forward.peak, both.peak


def grouped_peaks(shape: Shape, T: int) -> tuple[int, int]:
    x, dy, w_in, w_out, weights, ids = inputs(shape, T, torch.bfloat16)
    with Held(x, dy, w_in, w_out, weights, ids) as forward:
        y, h, order, ends = grouped.forward(x, w_in, w_out, weights, ids, "swiglu")
    with Held(x, dy, w_in, w_out, weights, ids) as both:
        y, h, order, ends = grouped.forward(x, w_in, w_out, weights, ids, "swiglu")
        grouped.backward(dy, x, w_in, w_out, weights, h, order, ends, "swiglu")
    del y
    return forward.peak, both.peak


def reference_peaks(shape: Shape, T: int) -> tuple[int, int]:
    x, dy, w_in, w_out, weights, ids = inputs(shape, T, torch.bfloat16)
    with torch.no_grad(), Held(x, dy, w_in, w_out, weights, ids) as forward:
        y = reference.expert_mlp(x, w_in, w_out, weights, ids, "swiglu")
    with Held(x, dy, w_in, w_out, weights, ids) as both:
        y = y + 0
        reference.expert_mlp_backward(dy, x, w_in, w_out, weights, ids, "swiglu")
    return forward.peak, both.peak


def peer_peaks(shape: Shape, T: int) -> tuple[int, int]:
    pytest.importorskip("transformers")
    layer = peers.transformers_grouped_mm()
    x, dy, w_in, w_out, weights, ids = inputs(shape, T, torch.bfloat16)
    with torch.no_grad(), Held(x, dy, w_in, w_out, weights, ids) as forward:
        layer(x, w_in, w_out, weights, ids)
    leaves = [t.requires_grad_() for t in (x, w_in, w_out, weights)]  # in place: still what was there before
    with Held(x, dy, w_in, w_out, weights, ids) as both:
        y = layer(x, w_in, w_out, weights, ids)
        torch.autograd.grad(y, leaves, dy)
    return forward.peak, both.peak


SIDES: dict[str, tuple[Callable[..., tuple[int, int]], tuple[Any, ...]]] = {
    "ours": (ours_peaks, (False,)),
    "recompute": (ours_peaks, (True,)),
    "grouped": (grouped_peaks, ()),
    "reference": (reference_peaks, ()),
    "a peer": (peer_peaks, ()),
}


@pytest.mark.parametrize(
    "side", [pytest.param(side, marks=[pytest.mark.slow] if side == "recompute" else []) for side in SIDES]
)
@pytest.mark.parametrize("rows", ["of_weights", "of_activations"])
def test_a_side_holds_no_more_than_it_is_said_to_and_not_much_less(side: str, rows: str) -> None:
    """Where weights are most of it, as at full width, and where activations are."""
    measure, arguments = SIDES[side]
    interpreted = side in ("ours", "recompute")
    if rows == "of_weights":
        shape, T = (Shape(32, 64, 4, 2, ()), 4) if interpreted else (Shape(256, 384, 8, 2, ()), 32)
    else:
        shape, T = (Shape(32, 32, 2, 2, ()), 48) if interpreted else (Shape(128, 192, 4, 2, ()), 1024)
    for forward_only, held in zip((True, False), measure(shape, T, *arguments), strict=True):
        said = side_bytes(shape, T, side, forward_only)
        assert held <= said + 512 + 40 * T, "routes and offsets are not counted"
        assert said <= 1.3 * held, f"{side}, {'forward' if forward_only else 'both'}: {said} said, {held} held"


def test_the_loop_holds_what_it_is_said_to() -> None:
    shape, T = Shape(64, 96, 6, 2, ()), 16
    x, _, w_in, w_out, *_ = inputs(shape, T, torch.bfloat16)
    with Held(x, w_in, w_out) as meter:
        loop = peers.CublasLoop(w_in, w_out, [6, 0, 10, 4, 5, 7])
        x_RD = x.repeat_interleave(2, 0)
    assert loop.ring == 6
    assert x_RD.shape == (32, 64)
    assert meter.peak == peak_bytes(shape, T, "ours")["beside"]


@pytest.mark.parametrize(("expert_mib", "n_experts", "ring"), [(1764, 16, 2), (220, 16, 3), (9, 128, 57), (9, 16, 16)])
def test_a_ring_is_larger_than_any_cache(expert_mib: int, n_experts: int, ring: int) -> None:
    assert shapes.ring_length(expert_mib * 2**20, n_experts) == ring
    assert ring >= 2
    assert ring == n_experts or ring * expert_mib >= 512


def test_full_width_fits_a_card_of_80_gb_which_it_did_not() -> None:
    shape = SHAPES["gpt4"]
    assert shape.weights() == 2 * 16 * 3 * 10752 * 28672
    assert shape.weights() / GIB == pytest.approx(27.56, abs=0.01)
    before = 3 * shape.weights()  # weights, the reference's gradients, a side's
    assert lacking(before, "cuda", CARD_80)
    for tokens in shape.tokens:
        for side in ("reference", "ours", "recompute"):
            assert lacking(peak_bytes(shape, tokens, side)["all"], "cuda", CARD_80) is None
    assert lacking(peak_bytes(shape, 8192, "a peer")["all"], "cuda", CARD_80) is None


def test_a_quarter_of_full_width_has_its_rows_and_fits_40_gb() -> None:
    whole, quarter = SHAPES["gpt4"], SHAPES["gpt4-quarter"]
    assert quarter.weights() * 4 == whole.weights()
    assert quarter.flop(2048) * 4 == whole.flop(8192)
    assert quarter.top_k * 2048 / quarter.n_experts == whole.top_k * 8192 / whole.n_experts == 1024
    for side in ("reference", "ours", "a peer"):
        assert lacking(peak_bytes(quarter, 2048, side)["all"], "cuda", A100_40) is None
    assert lacking(products_bytes(quarter, 2048), "cuda", A100_40) is None


def test_what_does_not_fit_is_said_with_both_figures() -> None:
    problem = lacking(peak_bytes(SHAPES["gpt4"], 16384, "ours")["all"], "cuda", A100_40)
    assert problem is not None
    assert problem.startswith("does not fit: needs 7")
    assert problem.endswith("GiB at its peak, 39.0 GiB are free")


def test_a_busy_expert_needs_more_of_the_reference() -> None:
    shape = SHAPES["gpt4-tp8"]
    even, busy = (side_bytes(shape, 8192, "reference", False, largest=n) for n in (0, 8192))
    assert busy - even == (8192 - 1024) * (2 * (3 * 10752 + 11 * 3584) + 4 * 10752)


@pytest.mark.parametrize("n_peers", [2, 5])
@pytest.mark.parametrize(("quick", "limit_s"), [(False, SECONDS), (True, QUICK_SECONDS)])
def test_the_plan_fits_its_seconds_on_an_h100(n_peers: int, quick: bool, limit_s: float) -> None:
    """At 600 TFLOP/s for a large product and 2,600 GB/s, with room for enough rounds of all."""
    todo = cases(list(QUICK if quick else SHAPES), quick, False, Trace.open(TRACE))
    rounds, planned = plan(todo, n_peers, 600, 2600, limit_s, 5 if quick else 11)
    assert rounds >= 3
    assert planned <= limit_s


def test_rounds_are_lowered_to_fit_and_three_at_least() -> None:
    assert planned_rounds(1.0, 20.0, 100.0, 11) == (11, 33.0)
    assert planned_rounds(10.0, 20.0, 100.0, 11) == (6, 100.0)
    assert planned_rounds(50.0, 20.0, 100.0, 11) == (3, 270.0)


@pytest.fixture(scope="module")
def data() -> Data:
    return prepare(Shape(32, 48, 4, 2, (24,)), 24, "cpu", torch.float16)


@pytest.mark.parametrize("product", PRODUCTS)
def test_flop_and_bytes_are_those_of_the_tensors(product: str, data: Data) -> None:
    shape, T = data.shape, len(data.x_TD)
    w_in, w_out = data.experts.w_in_EGFD, data.experts.w_out_EDF
    weights = data.weights_TK.nbytes
    tensors = {
        "up": ((data.x_RD, w_in, data.h_RJ, data.act_RF), 0),
        "down": ((data.act_RF, w_out, data.y_RD), 0),
        "down_backward": ((data.dy_RD, w_out, data.h_RJ, data.dh_RJ, data.act_RF), 2 * weights),
        "dw_out": ((data.dy_RD, data.act_RF, w_out), 0),
        "dw_in": ((data.dh_RJ, data.x_RD, w_in), 0),
        "dx": ((data.dh_RJ, w_in, data.x_RD), 0),
    }
    read, more = tensors[product]
    with FlopCounterMode(display=False) as counter:
        cublas_call(product, data)()
    flop, moved = product_work(product, shape, T)
    assert flop == counter.get_total_flops()
    assert moved == sum(t.nbytes for t in read) + more


def test_the_products_of_a_step_are_three_forwards() -> None:
    for shape in SHAPES.values():
        T = shape.tokens[-1]
        assert sum(product_work(product, shape, T)[0] for product in PRODUCTS) == 3 * shape.flop(T)


def test_the_dense_mlp_does_the_flop_of_the_layer_and_holds_what_it_is_said_to() -> None:
    shape, T = Shape(48, 64, 8, 2, ()), 256
    w = dense.make(shape, "cpu", torch.bfloat16)
    x, dy = (torch.randn(T, 48).bfloat16() for _ in range(2))
    x.requires_grad_()

    def call(x: Tensor) -> Tensor:
        return dense.mlp(x, w.dense_in, w.dense_out)

    side = dense.Side(call, call, [w.dense_in, w.dense_out])
    with FlopCounterMode(display=False) as counter:
        side.forward(x)
    routed_and_shared = shape.flop(T) + 6 * T * 48 * 64
    assert counter.get_total_flops() == routed_and_shared
    with Held(x, dy, *w) as meter:
        side.step(x, dy)
    rows = dense.peak_bytes(shape, T, 2) - dense.peak_bytes(shape, 0, 2)
    held = meter.peak - w.dense_in.nbytes - w.dense_out.nbytes + x.nbytes + dy.nbytes
    assert held <= rows <= 1.4 * held
    fixed = dense.peak_bytes(shape, 0, 2) - shapes.FLUSHED - shapes.SLACK
    assert fixed >= 2 * (sum(t.nbytes for t in w) - w.router_ED.nbytes)
