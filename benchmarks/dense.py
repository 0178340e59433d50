"""A whole layer of experts beside the dense MLP that does the same FLOP: what does sparsity cost in time?

The layer is nanochat's mixture (its pull request 798): a router, K of E experts for each token, and a shared expert
that every token goes through; SwiGLU on both sides, the dense MLP K + 1 times as wide as an expert. There, the mixture
is reported to take 1.3 to 1.6 times as long. Both sides eager, and both through torch.compile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import difference, failure, lacking, medians
from shapes import FLUSHED, SLACK, Shape
from torch import Tensor

MIXTURE, DENSE, COMPILED = "gpt4-moe layer", "dense MLP of the same FLOP", ", compiled"


class Weights(NamedTuple):
    router_ED: Tensor
    w_in_EGFD: Tensor
    w_out_EDF: Tensor
    shared_in: Tensor  # [2 F, D]
    shared_out: Tensor  # [D, F]
    dense_in: Tensor  # [2 (K + 1) F, D]
    dense_out: Tensor  # [D, (K + 1) F]


def make(shape: Shape, device: str, dtype: torch.dtype) -> Weights:
    g = torch.Generator(device).manual_seed(3)

    def normal(*size: int) -> Tensor:
        t = torch.empty(size, device=device, dtype=dtype).normal_(0, size[-1] ** -0.5, generator=g)
        return t.requires_grad_()

    D, width, E, K = shape[:4]
    wide = (K + 1) * width
    return Weights(
        normal(E, D), normal(E, 2, width, D), normal(E, D, width), normal(2 * width, D), normal(D, width),
        normal(2 * wide, D), normal(D, wide),
    )  # fmt: skip


def mlp(x_TD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = F.linear(x_TD, w_in).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_out)


def mixture(x_TD: Tensor, w: Weights, top_k: int, impl: str | None = None) -> Tensor:
    from moe.kernels import ops

    logits_TE = F.linear(x_TD.float(), w.router_ED.float())
    weights_TK, ids_TK = ops.topk_gate(logits_TE, top_k)
    routed = ops.expert_mlp(x_TD, w.w_in_EGFD, w.w_out_EDF, weights_TK, ids_TK, impl=impl)
    return routed + mlp(x_TD, w.shared_in, w.shared_out)


class Side(NamedTuple):
    call: Callable[[Tensor], Tensor]
    want: Callable[[Tensor], Tensor]  # what its result is held against
    leaves: list[Tensor]

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.no_grad():
            return self.call(x_TD)

    def step(self, x_TD: Tensor, dy_TD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.call(x_TD), [x_TD, *self.leaves], dy_TD)

    def problem(self, x_TD: Tensor) -> str:
        """Why it cannot be timed; "" where it can."""
        try:
            with torch.no_grad():
                worst = difference([self.call(x_TD)], [self.want(x_TD)])
        except Exception as error:
            return failure(error)
        return "" if worst < 3e-2 else f"WRONG, differs by {worst:.1e}; not timed"


def peak_bytes(shape: Shape, tokens: int, itemsize: int) -> int:
    """What a step holds: weights and gradients of both sides, x, y and their gradients, and of the dense MLP's hidden
    width h, the activation's parts and their gradients; the mixture has as much of that in other widths."""
    wide = (shape.top_k + 1) * shape.d_ff
    parameters = shape.weights(itemsize) + 2 * 3 * wide * shape.d_model * itemsize
    return 2 * parameters + tokens * itemsize * (7 * wide + 6 * shape.d_model) + FLUSHED + SLACK


def compare(what: dict[str, Any], shape: Shape, tokens: int, bench: Any, compiled: bool) -> None:
    """Report forward, and forward + backward, of both, eager or `compiled`, and how many times as long ours takes.

    `bench` is expert_mlp.Bench, `what` a row's first columns.
    """
    device, report, D, K = bench.device, bench.report, shape.d_model, shape.top_k
    if problem := lacking(peak_bytes(shape, tokens, bench.dtype.itemsize), device):
        return report.note(f"{problem} (the whole layer)", **what)
    g = torch.Generator(device).manual_seed(4)
    x = torch.randn(tokens, D, device=device, generator=g).to(bench.dtype).requires_grad_()
    dy = torch.randn(tokens, D, device=device, generator=g).to(bench.dtype)
    w = make(shape, device, bench.dtype)

    def dense(x: Tensor) -> Tensor:
        return mlp(x, w.dense_in, w.dense_out)

    sides = {
        MIXTURE: Side(lambda x: mixture(x, w, K, "triton"), lambda x: mixture(x, w, K, "reference"), list(w[:5])),
        DENSE: Side(dense, dense, list(w[5:])),
    }
    suffix = COMPILED if compiled else ""
    if compiled:
        sides = {name + suffix: side._replace(call=torch.compile(side.call)) for name, side in sides.items()}
    for name, side in list(sides.items()):
        if problem := side.problem(x):
            report.note(problem, **what, side=name)
            del sides[name]
    for kind, flop, calls in (
        ("layer forward", 1, {name: partial(side.forward, x) for name, side in sides.items()}),
        ("layer forward + backward", 3, {name: partial(side.step, x, dy) for name, side in sides.items()}),
    ):
        flop *= 6 * tokens * (K + 1) * D * shape.d_ff
        problems: dict[str, str] = {}
        seconds = medians(calls, bench.rounds, device, problems)
        for name, problem in problems.items():
            report.note(f"{problem} ({kind})", **what, side=name)
        for name, s in seconds.items():
            rate, mine = flop / s / 1e12, seconds.get(MIXTURE + suffix, float("nan"))
            row = {"kind": kind, "side": name, "ms": s * 1e3, "tflops": rate, "ours_is_faster_by": s / mine}
            report.row({**what, **row, "of_cublas_peak": rate / bench.product_tflops})
        if len(seconds) == 2:
            ratio = seconds[MIXTURE + suffix] / seconds[DENSE + suffix]
            print(f"  {kind}{suffix}: the mixture takes {ratio:.2f} times as long as the dense MLP", flush=True)
