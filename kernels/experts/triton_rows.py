"""Rows on their way to and from the products: gathered by token, summed per token, summed per expert.

Shape suffixes as in triton_routes.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.experts.triton_routes import VIEWS, Routes
from moe.kernels.launcher import cdiv, power_of_2, remembered


@remembered
@triton.jit
def gather_kernel(x, out, order, D, stride_x, K: tl.constexpr, BD: tl.constexpr):
    """out[row] = x[token of the row]: the copy in sorted order that TMA reads."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    token = (tl.load(order + row) // K).to(tl.int64)
    tl.store(out + row * D + d, tl.load(x + token * stride_x + d, mask=d < D), mask=d < D)


@remembered
@triton.jit
def bias_gradient_kernel(
    a, weights, db, order, offsets, N, stride_a,
    K: tl.constexpr, GATHER: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """db[e] = sum of the rows of expert e; gathered rows are read by token and weighted by the routing weights."""
    e = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    end = tl.load(offsets + e + 1)
    acc = tl.zeros((BN,), dtype=tl.float32)
    for start in range(tl.load(offsets + e), end, BR):
        rows = start + r
        live = rows < end
        weight = live.to(tl.float32)
        row_a = rows
        if GATHER:
            flat = tl.load(order + rows, mask=live, other=0)
            weight = tl.load(weights + flat, mask=live, other=0.0).to(tl.float32)
            row_a = flat // K
        at = a + row_a[:, None].to(tl.int64) * stride_a + n[None, :]
        tile = tl.load(at, mask=live[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(tile * weight[:, None], axis=0)
    tl.store(db + e * N + n, acc.to(db.dtype.element_ty), mask=n < N)


@remembered
@triton.jit(do_not_specialize_on_alignment=["weights", *VIEWS])
def combine_kernel(y, weights, inverse, out, D, K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BD: tl.constexpr):
    """out[t] = sum over the slots of (weight *) y[row], in float32, in the order of the slots."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), dtype=tl.float32)
    for j in tl.static_range(K):
        row = tl.load(inverse + t * K + j).to(tl.int64)
        part = tl.load(y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            part *= tl.load(weights + t * K + j).to(tl.float32)
        acc += part
    tl.store(out + t * D + d, acc.to(out.dtype.element_ty), mask=d < D)


# ------------------------------------------------------------------------------------------------------- the launches


def gather(x_TD: Tensor, routes: Routes, top_k: int) -> Tensor:
    """The tokens in the order of the rows, [R, D]."""
    R, D = len(routes.order_R), x_TD.shape[1]
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    out_RD, BD = x_TD.new_empty(R, D), min(1024, power_of_2(D))
    if R:
        gather_kernel[(R, cdiv(D, BD))](x_TD, out_RD, routes.order_R, D, x_TD.stride(0), K=top_k, BD=BD)
    return out_RD


def bias_gradient(a: Tensor, weights_TK: Tensor | None, bias: Tensor, routes: Routes, top_k: int) -> Tensor:
    """The sum of each expert's rows of `a` [R, ...]; with weights, of the tokens' rows of `a` [T, ...], weighted."""
    db, N = torch.empty_like(bias), a.shape[1]
    bias_gradient_kernel[(len(bias), cdiv(N, 128))](
        a, weights_TK, db, routes.order_R, routes.offsets, N, a.stride(0),
        K=top_k, GATHER=weights_TK is not None, BN=128, BR=32,
    )  # fmt: skip
    return db


def combine(y_RD: Tensor, weights_TK: Tensor | None, routes: Routes, shape_TK: torch.Size) -> Tensor:
    """Sum each token's rows, weighted where weights are given -> [T, D]."""
    (T, K), D = shape_TK, y_RD.shape[1]
    out_TD = y_RD.new_empty(T, D)
    if T:
        BD = min(1024, power_of_2(D))
        combine_kernel[(T, cdiv(D, BD))](
            y_RD, weights_TK, routes.inverse_R, out_TD, D, K=K, HAS_WEIGHTS=weights_TK is not None, BD=BD
        )
    return out_TD
