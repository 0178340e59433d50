"""The routed expert MLP with low-rank adapters on its weights (Hu et al. 2021, "LoRA", section 4.1).

Each expert's weight is W + scale * B A, with W frozen and A, B small. What is computed is the merged weight, and then
the same fused op as without adapters. The other way, W x + scale * B (A x), would need the adapters inside the fused
product, between gather and activation. Merging costs 2 E F D rank per matrix and layer instead of 2 T K F D: with 16
experts, rank 8 and 4,096 tokens of top 2 that is 1/64 of the MLP. Merged weights live only while a layer computes: the
backward makes them again. So for a while one layer has a copy of its weights and their full gradient, and no layer
keeps them; what training saves is the gradients and the optimizer's state of all the rest.

Shape suffixes: T tokens, D model width, E experts, K experts per token, G gate/up (2 when gated, else 1), F expert
hidden width, L rank of the adapters.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.arguments import autocast, autocasts, check_kinds, transformed
from moe.kernels.experts import op


class Adapters(NamedTuple):
    """Of all experts of a layer: the updates of w_in are b_in a_in, those of w_out are b_out a_out."""

    a_in_ELD: Tensor
    b_in_EGFL: Tensor
    a_out_ELF: Tensor
    b_out_EDL: Tensor


def merge(w: Tensor, a_ELX: Tensor, b: Tensor, scale: float) -> Tensor:
    """w + scale * b a per expert, in the dtype of w: w [E, ..., X], a [E, L, X], b [E, ..., L]."""
    merged = torch.baddbmm(w.flatten(1, -2), b.flatten(1, -2).to(w.dtype), a_ELX.to(w.dtype), alpha=scale)
    return merged.view(w.shape)


def expert_mlp(
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    adapters: Adapters,
    scale: float,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str,
) -> Tensor:
    """`ops.expert_mlp` with the merged weights; gradients go to x, the adapters and the routing weights.

    The weights themselves are frozen: they have no gradient. Under autocast they are merged in their own dtype and then
    rounded to autocast's.

    Returns:
        y_TD as of `ops.expert_mlp`.

    Raises:
        ValueError: a weight that wants a gradient, or as `ops.expert_mlp`.
    """
    check_kinds(x=x_TD, w_in=w_in_EGFD, w_out=w_out_EDF, weights=weights_TK, ids=ids_TK, **adapters._asdict())
    if w_in_EGFD.requires_grad or w_out_EDF.requires_grad:
        raise ValueError("w_in and w_out want gradients, but under adapters they are frozen: requires_grad_(False)")
    _check_adapters(w_in_EGFD, w_out_EDF, adapters)
    (x_TD,) = autocast(x_TD.device.type, x_TD)
    with torch.autocast(x_TD.device.type, enabled=False) if autocasts(x_TD.device.type) else nullcontext():
        if transformed():
            merged = _merged(x_TD.dtype, w_in_EGFD, w_out_EDF, *adapters, scale)
            return op.expert_mlp(x_TD, *merged, weights_TK, ids_TK, activation)
        return _ExpertMlp.apply(x_TD, w_in_EGFD, w_out_EDF, *adapters, scale, weights_TK, ids_TK, activation)  # type: ignore[return-value]


def _check_adapters(w_in: Tensor, w_out: Tensor, adapters: Adapters) -> None:
    """Raises ValueError where an adapter's shape does not fit the weight that it updates."""
    for which, w, a, b in (("in", w_in, *adapters[:2]), ("out", w_out, *adapters[2:])):
        rank = a.shape[1] if a.ndim == 3 else -1
        if a.shape != (len(w), rank, w.shape[-1]) or b.shape != (*w.shape[:-1], rank):
            raise ValueError(
                f"w_{which} {list(w.shape)} wants adapters a_{which} [E, rank, ...] and b_{which} [..., rank] of its "
                f"widths; got {list(a.shape)}, {list(b.shape)}"
            )


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, a_in: Tensor, b_in: Tensor, a_out: Tensor, b_out: Tensor,
        scale: float, weights: Tensor, ids: Tensor, activation: str,
    ) -> Tensor:  # fmt: skip
        ctx.scale, ctx.activation = scale, activation
        merged = _merged(x.dtype, w_in, w_out, a_in, b_in, a_out, b_out, scale)
        y, saved, ctx.impl = op.expert_mlp_forward(x, *merged, weights, ids, activation)
        ctx.save_for_backward(x, w_in, w_out, a_in, b_in, a_out, b_out, weights, ids, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | float | None, ...]:
        x, w_in, w_out, a_in, b_in, a_out, b_out, weights, ids, *saved = ctx.saved_tensors
        merged = _merged(x.dtype, w_in, w_out, a_in, b_in, a_out, b_out, ctx.scale)
        dx, dw_in, dw_out, dweights = op.expert_mlp_gradients(
            dy, x, *merged, weights, ids, saved, ctx.activation, ctx.impl
        )
        del merged
        da_in, db_in = _through_merge(dw_in, a_in, b_in, ctx.scale)
        da_out, db_out = _through_merge(dw_out, a_out, b_out, ctx.scale)
        return dx, None, None, da_in, db_in, da_out, db_out, None, dweights, None, None


def _merged(
    dtype: torch.dtype,
    w_in: Tensor,
    w_out: Tensor,
    a_in: Tensor,
    b_in: Tensor,
    a_out: Tensor,
    b_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return merge(w_in, a_in, b_in, scale).to(dtype), merge(w_out, a_out, b_out, scale).to(dtype)


def _through_merge(dw: Tensor, a_ELX: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of a and b, given that of w + scale * b a."""
    dw_EYX, b_EYL = dw.flatten(1, -2).to(a_ELX.dtype), b.flatten(1, -2)
    return scale * (b_EYL.mT @ dw_EYX), (scale * (dw_EYX @ a_ELX.mT)).view(b.shape)
