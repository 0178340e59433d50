"""The products of the expert MLP as calls on prepared inputs: ours, cuBLAS's and torch's; and what they must return.

Shape suffixes: T tokens, D model width, F expert hidden width, E experts, K experts per token, R = T*K rows, J = 2 F.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import difference
from routings import ROUTINGS
from shapes import Shape, ring_length
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.experts import reference, triton_mlp, triton_pointer, triton_routes, triton_rows, triton_tma
from moe.kernels.experts.triton_pointer import Experts
from moe.kernels.gate import reference as gate_reference
from moe.kernels.gate import triton_gate
from moe.kernels.tiles import Tiles

Call = Callable[[], Any]
OURS, CUBLAS, GROUPED, TORCH = "gpt4-moe", "cuBLAS", "torch grouped_mm", "torch"


class Data(NamedTuple):
    """Inputs of all products, random, and where each expert's rows are."""

    shape: Shape
    x_TD: Tensor
    dy_TD: Tensor
    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    experts: Experts
    order_R: Tensor  # int64: sorted row -> flat (token, slot)
    ends_E: Tensor  # int32
    spans: list[tuple[int, int, int]]  # expert, its first row, its end; those with rows
    x_RD: Tensor  # in the order of the rows, from here on
    dy_RD: Tensor
    h_RJ: Tensor
    act_RF: Tensor
    dh_RJ: Tensor
    y_RD: Tensor


class Variant(NamedTuple):
    """A way to run our products."""

    side: str
    module: ModuleType
    sizes: Tiles

    @property
    def path(self) -> str:
        return self.module.__name__.rpartition("triton_")[2]


def prepare(shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> Data:
    g = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(0, std, generator=g)

    D, width, E, K = shape[:4]
    R = tokens * K
    ids_TK = ROUTINGS["balanced"](tokens, E, K, 0)
    loads = torch.bincount(ids_TK.flatten(), minlength=E)
    ends = loads.cumsum(0).tolist()
    spans = [(e, end - n, end) for e, (n, end) in enumerate(zip(loads.tolist(), ends, strict=True)) if n]
    order_R = ids_TK.flatten().sort(stable=True).indices.to(device)
    x_TD, dy_TD = normal(tokens, D), normal(tokens, D)
    logits_TE = torch.randn(tokens, E, device=device, generator=g)
    weights_TK = torch.randn(tokens, K, device=device, generator=g).softmax(-1)
    experts = Experts(normal(E, 2, width, D, std=D**-0.5), normal(E, D, width, std=width**-0.5))
    ends_E = torch.tensor(ends, dtype=torch.int32, device=device)
    rows = [normal(R, n) for n in (2 * width, width, 2 * width, D)]
    return Data(
        shape, x_TD, dy_TD, logits_TE, weights_TK, ids_TK.to(device), experts, order_R, ends_E, spans,
        x_TD[order_R // K], dy_TD[order_R // K], *rows,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the sides


def tile_of(product: str) -> str:
    """Its tile's name in `Tiles`: both weight gradients have the same."""
    return "dw" if product.startswith("dw") else product


def shipped(data: Data) -> Variant:
    """What the op itself runs."""
    return Variant(OURS, *triton_mlp._choose(data.x_TD, data.experts, len(data.order_R)))


def variants(data: Data, product: str) -> Iterator[Variant]:
    """What the op runs, and the kernels of the other paths with their shipped tiles."""
    device, first = data.x_TD.device, shipped(data)
    yield first
    other = tiles.choose(device, data.x_TD.dtype, len(data.order_R), data.shape.n_experts, tma=not first.sizes.tma)
    if other.tma != first.sizes.tma:
        name, module = ("TMA", triton_tma) if other.tma else ("pointers", triton_pointer)
        yield Variant(f"{OURS}, {name}", module, other)
    if first.sizes.tma and first.module is not triton_tma:  # under GPT4_MOE_GLUON=1: beside it what is shipped
        yield Variant(f"{OURS}, TMA", triton_tma, first.sizes)


def our_call(product: str, data: Data, v: Variant) -> Call:
    """One of our products. What it reads in the order of the rows, it has in that order already."""
    K, E, m, sizes, w = data.shape.top_k, data.shape.n_experts, v.module, v.sizes, data.experts
    routes, _ = triton_routes.route(data.ids_TK, E, sizes.rows)
    # TMA reads copies in the order of the rows; pointers find the tokens themselves.
    x, dy = (data.x_RD, data.dy_RD) if sizes.tma else (data.x_TD, data.dy_TD)
    return {
        "up": lambda: m.up(x, w, routes, K, "swiglu", sizes, True, True),
        "down": lambda: m.down(data.act_RF, w, routes, sizes),
        "down_backward": lambda: m.down_backward(dy, w, data.weights_TK, data.h_RJ, routes, "swiglu", sizes),
        "dw_out": lambda: m.weight_gradient(dy, data.act_RF, routes, K, E, sizes, "a"),
        "dw_in": lambda: m.weight_gradient(data.dh_RJ, x, routes, K, E, sizes, "b"),
        "dx": lambda: m.dx(data.dh_RJ, w, routes, sizes),
    }[product]


def cublas_call(product: str, data: Data) -> Call:
    """torch.mm, expert by expert. A weight's gradient goes into a ring of buffers larger than a cache."""
    w_in, w_out = data.experts.w_in_EGFD.flatten(1, 2), data.experts.w_out_EDF
    a, w = {
        "up": (data.x_RD, w_in.transpose(1, 2)),
        "down": (data.act_RF, w_out.transpose(1, 2)),
        "down_backward": (data.dy_RD, w_out),
        "dx": (data.dh_RJ, w_in),
        "dw_out": (data.dy_RD, data.act_RF),
        "dw_in": (data.dh_RJ, data.x_RD),
    }[product]
    if product.startswith("dw"):
        N, C = a.shape[1], w.shape[1]
        ring = [a.new_empty(N, C) for _ in range(ring_length(N * C * a.element_size(), data.shape.n_experts))]

        def gradient() -> dict[int, Tensor]:
            for e, start, end in data.spans:
                torch.mm(a[start:end].t(), w[start:end], out=ring[e % len(ring)])
            return {e: ring[e % len(ring)] for e, _, _ in data.spans[-2:]}

        return gradient
    out = a.new_empty(len(a), w.shape[2])

    def product_of_rows() -> Tensor:
        for e, start, end in data.spans:
            torch.mm(a[start:end], w[e], out=out[start:end])
        return out

    return product_of_rows


def grouped_call(product: str, data: Data) -> Call:
    """torch's grouped product."""
    w_in, w_out, ends = data.experts.w_in_EGFD.flatten(1, 2), data.experts.w_out_EDF, data.ends_E
    a, w = {
        "up": (data.x_RD, w_in.transpose(1, 2)),
        "down": (data.act_RF, w_out.transpose(1, 2)),
        "down_backward": (data.dy_RD, w_out),
        "dx": (data.dh_RJ, w_in),
        "dw_out": (data.dy_RD.t(), data.act_RF),
        "dw_in": (data.dh_RJ.t(), data.x_RD),
    }[product]
    return lambda: F.grouped_mm(a, w, offs=ends)


def around_calls(part: str, data: Data) -> dict[str, Call]:
    """Ours and torch's, of what goes around the products; each returns a list of results."""
    shape, weights, ids = data.shape, data.weights_TK, data.ids_TK
    K, E = shape.top_k, shape.n_experts
    routes, _ = triton_routes.route(ids, E, 128)
    inverse_R = data.order_R.argsort()
    token_R = data.order_R // K

    def summed() -> Tensor:
        y_TKD = data.y_RD[inverse_R].view(*ids.shape, -1)
        return torch.linalg.vecdot(weights.to(y_TKD.dtype).unsqueeze(-1), y_TKD, dim=1)

    return {
        "route": {
            OURS: lambda: [triton_routes.route(ids, E, 128)[0].order_R],
            TORCH: lambda: [ids.flatten().sort(stable=True).indices],
        },
        "gather": {
            OURS: lambda: [triton_rows.gather(data.x_TD, routes, K)],
            TORCH: lambda: [data.x_TD.index_select(0, token_R)],
        },
        "combine": {
            OURS: lambda: [triton_rows.combine(data.y_RD, weights, routes, ids.shape)],
            TORCH: lambda: [summed()],
        },
        "gate": {
            OURS: lambda: triton_gate.gate(data.logits_TE, K),
            TORCH: lambda: gate_reference.topk_gate(data.logits_TE, K),
        },
    }[part]


# ------------------------------------------------------------------------------------------------------ comparing


def expected(product: str, data: Data, span: tuple[int, int, int]) -> list[Tensor]:
    """The results of one expert in float32, by the reference's formulas, on the same inputs."""
    e, start, end = span
    w_in, w_out = data.experts.w_in_EGFD[e].flatten(0, 1).float(), data.experts.w_out_EDF[e].float()
    x, dy, h, act, dh = (t[start:end].float() for t in (data.x_RD, data.dy_RD, data.h_RJ, data.act_RF, data.dh_RJ))
    if product == "up":
        h = x @ w_in.t()
        return [h, reference.activate(h.unflatten(1, (2, -1)), "swiglu")]
    if product == "down_backward":
        weights_R1 = data.weights_TK.flatten()[data.order_R[start:end], None]
        da, h = dy @ w_out, h.unflatten(1, (2, -1))
        a = reference.activate(h, "swiglu")
        dh = reference.activate_backward(h, weights_R1 * da, "swiglu").flatten(1)
        return [dh, weights_R1 * a, (da * a).sum(1)]
    return {
        "down": lambda: [act @ w_out.t()],
        "dw_out": lambda: [dy.t() @ act],
        "dw_in": lambda: [dh.t() @ x],
        "dx": lambda: [dh @ w_in],
    }[product]()


def results(product: str, data: Data, found: Any, span: tuple[int, int, int]) -> list[Tensor]:
    """The same of what a side returned: of all experts, or (cuBLAS) of some, or (rivals) the product alone."""
    e, start, end = span
    if product.startswith("dw"):
        return [found[e]]
    if product == "down_backward" and isinstance(found, tuple):
        dh, act, dweights = found
        return [dh[start:end], act[start:end], dweights.flatten()[data.order_R[start:end]]]
    return [t[start:end] for t in (found if isinstance(found, tuple) else (found,))]


def worst_difference(product: str, data: Data, found: Any) -> float:
    """Of the last two experts that have rows."""
    worst = 0.0
    for span in data.spans[-2:]:
        got = results(product, data, found, span)
        if product == "down_backward" and len(got) == 1:  # a rival's: dy @ w_out and no more
            want = [data.dy_RD[span[1] : span[2]].float() @ data.experts.w_out_EDF[span[0]].float()]
        else:
            want = expected(product, data, span)[: len(got)]
        worst = max(worst, difference(got, want))
    return worst
