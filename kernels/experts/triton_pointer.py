"""The grouped products of the expert MLP in Triton, with plain pointers: any stride, any width, every GPU.

Weights come with all their strides, so [gate; up] halves, interleaved pairs and transposed matrices are read where
they are. Rows are gathered in the product itself. Every kernel computes one [BM, BN] tile of one expert's rows in
float32 and rounds once, when it stores.

Shape suffixes as in triton_routes.py; J = G*F pre-activations of a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.arguments import float32_precision
from moe.kernels.experts.triton_activation import ACTIVATION_CODES, activate, activate_backward
from moe.kernels.experts.triton_routes import VIEWS, Routes
from moe.kernels.launcher import cdiv, remembered
from moe.kernels.tiles import Tile, Tiles


class Experts(NamedTuple):
    """The experts' weights, in any strides; biases are contiguous, or None; `precision` as of `ops.expert_mlp`.

    Weights of eight bits (see quantized.py) have a scale for each output channel, contiguous; only the forward takes
    them.
    """

    w_in_EGFD: Tensor
    w_out_EDF: Tensor
    b_in_EGF: Tensor | None = None
    b_out_ED: Tensor | None = None
    precision: str | None = None
    s_in_EGF: Tensor | None = None
    s_out_ED: Tensor | None = None


@triton.jit
def swizzle(program, num_m, num_n, GROUP_M: tl.constexpr):
    """The (row tile, column tile) of a program: GROUP_M row tiles walk the columns together and share the weights."""
    per_group = GROUP_M * num_n
    first = program // per_group * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    inner = program % per_group
    return first + inner % size, inner // size


@triton.jit
def walk(program, e, num_n, tile_row, offsets, BM: tl.constexpr, GROUP_M: tl.constexpr):
    """Of a program of expert `e`: column tile, first row, and the expert's first row and number of rows.

    Programs go expert after expert, and within one as `swizzle` orders them: experts share no weights, so a group of
    row tiles does not span two.
    """
    tile = program // num_n  # not the program's own row tile, but one of the same expert
    first = tl.load(offsets + e)
    size = tl.load(offsets + e + 1) - first
    tiles_before = tile - (tl.load(tile_row + tile) - first) // BM
    pm, pn = swizzle(program - tiles_before * num_n, tl.cdiv(size, BM), num_n, GROUP_M)
    return pn, first + pm * BM, first, size


@triton.jit
def product(
    acc, a_rows, a_mask, w_columns, w_mask, stride_wk, depth,
    BK: tl.constexpr, EVEN_K: tl.constexpr, K_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a @ w over `depth`; `a_rows` [BM] and `w_columns` [BN] point at k = 0. K_FIRST: w is contiguous along k."""
    k = tl.arange(0, BK)
    a_at = a_rows[:, None] + k[None, :]
    if K_FIRST:
        w_at = w_columns[:, None] + (k.to(tl.int64) * stride_wk)[None, :]
    else:
        w_at = w_columns[None, :] + (k.to(tl.int64) * stride_wk)[:, None]
    for start in range(0, depth, BK):
        a_live = a_mask[:, None]
        if not EVEN_K:
            inside = start + k < depth
            a_live = a_live & inside[None, :]
        a = tl.load(a_at, mask=a_live, other=0.0)
        if K_FIRST:
            w_live = w_mask[:, None]
            if not EVEN_K:
                w_live = w_live & inside[None, :]
            w = tl.load(w_at, mask=w_live, other=0.0).to(a.dtype).T
        else:
            w_live = w_mask[None, :]
            if not EVEN_K:
                w_live = w_live & inside[:, None]
            w = tl.load(w_at, mask=w_live, other=0.0).to(a.dtype)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_at += BK
        w_at += BK * stride_wk
    return acc


@remembered
@triton.jit(do_not_specialize_on_alignment=VIEWS)
def up_kernel(
    x, w, scale, bias, h, act, order, tile_expert, tile_row, offsets, D, F,
    stride_x, stride_we, stride_wg, stride_wf, stride_wd,
    K: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    STORE_H: tl.constexpr, STORE_ACT: tl.constexpr, PAIRS: tl.constexpr, EVEN_K: tl.constexpr, K_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """h = x[token] @ w_in.T + bias (stored on request), act = activation(h).

    One accumulator holds gates, then ups; with PAIRS in turns: as in memory, so that neighbours are read together.
    """
    BH: tl.constexpr = BN // G
    num_n = tl.cdiv(F, BH)
    e = tl.load(tile_expert + tl.program_id(0) // num_n)
    if e < 0:
        return
    pn, row, first, size = walk(tl.program_id(0), e, num_n, tile_row, offsets, BM, GROUP_M)
    rows = row + tl.arange(0, BM)
    live = rows < first + size
    token = tl.load(order + rows, mask=live, other=0) // K
    if PAIRS:
        column = pn * BN + tl.arange(0, BN)
        f = column // G
        g = column % G
        inside_w = column < G * F
        w_columns = w + e.to(tl.int64) * stride_we + column.to(tl.int64) * stride_wg
    else:
        column = tl.arange(0, BN)
        f = pn * BH + column % BH
        g = column // BH
        inside_w = f < F
        w_columns = w + e.to(tl.int64) * stride_we + f.to(tl.int64) * stride_wf + g.to(tl.int64) * stride_wg
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc = product(
        acc, x + token.to(tl.int64) * stride_x, live, w_columns, inside_w, stride_wd, D,
        BK, EVEN_K, K_FIRST, PRECISION,
    )  # fmt: skip
    if HAS_SCALE:
        acc *= tl.load(scale + e * (G * F) + g * F + f, mask=inside_w, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + e * (G * F) + g * F + f, mask=inside_w, other=0.0).to(tl.float32)[None, :]
    f = pn * BH + tl.arange(0, BH)
    inside = live[:, None] & (f < F)[None, :]
    h_at = h + rows[:, None].to(tl.int64) * (G * F) + f[None, :]
    if G == 2:
        if PAIRS:
            gate, up = tl.split(acc.reshape(BM, BH, 2))
        else:
            gate, up = tl.split(acc.reshape(BM, 2, BH).permute(0, 2, 1))
        if STORE_H:
            tl.store(h_at, gate.to(h.dtype.element_ty), mask=inside)
            tl.store(h_at + F, up.to(h.dtype.element_ty), mask=inside)
        y = activate(gate, up, ACT)
    else:
        if STORE_H:
            tl.store(h_at, acc.to(h.dtype.element_ty), mask=inside)
        y = activate(acc, acc, ACT)
    if STORE_ACT:
        tl.store(act + rows[:, None].to(tl.int64) * F + f[None, :], y.to(act.dtype.element_ty), mask=inside)


@remembered
@triton.jit(do_not_specialize_on_alignment=VIEWS)
def down_kernel(
    a, w, scale, bias, y, tile_expert, tile_row, offsets, N, depth,
    stride_a, stride_we, stride_wn, stride_wk,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, K_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = a @ w + bias: the down-projection, and the gradient of x from that of h."""
    num_n = tl.cdiv(N, BN)
    e = tl.load(tile_expert + tl.program_id(0) // num_n)
    if e < 0:
        return
    pn, row, first, size = walk(tl.program_id(0), e, num_n, tile_row, offsets, BM, GROUP_M)
    rows = row + tl.arange(0, BM)
    live = rows < first + size
    n = pn * BN + tl.arange(0, BN)
    w_columns = w + e.to(tl.int64) * stride_we + n.to(tl.int64) * stride_wn
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc = product(
        acc, a + rows.to(tl.int64) * stride_a, live, w_columns, n < N, stride_wk, depth,
        BK, EVEN_K, K_FIRST, PRECISION,
    )  # fmt: skip
    if HAS_SCALE:
        acc *= tl.load(scale + e * N + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit
def down_backward_epilogue(
    da, h, dh, act, rows, live, weight, first, F,
    G: tl.constexpr, ACT: tl.constexpr, PAIRS: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From da, the gradient of the unweighted activation: stores dh and weight * act; returns <da, act> per row.

    Takes the tile [BM, BN] in SPLIT pieces, a power of two: fewer registers. PAIRS: dh has gate and up in turns.
    """
    if SPLIT > 1:
        BH: tl.constexpr = BN // 2
        HALF: tl.constexpr = SPLIT // 2
        left, right = tl.split(da.reshape(BM, 2, BH).permute(0, 2, 1))
        part = down_backward_epilogue(left, h, dh, act, rows, live, weight, first, F, G, ACT, PAIRS, HALF, BM, BH)
        part += down_backward_epilogue(
            right, h, dh, act, rows, live, weight, first + BH, F, G, ACT, PAIRS, HALF, BM, BH
        )
    else:
        f = first + tl.arange(0, BN)
        inside = live[:, None] & (f < F)[None, :]
        at = rows[:, None].to(tl.int64) * (G * F) + f[None, :]
        gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        up = gate
        if G == 2:
            up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
        y, dgate, dup = activate_backward(gate, up, ACT)
        part = tl.sum(tl.where(inside, da * y, 0.0), axis=1)
        y = (weight[:, None] * y).to(act.dtype.element_ty)
        tl.store(act + rows[:, None].to(tl.int64) * F + f[None, :], y, mask=inside)
        da = da * weight[:, None]
        dgate = (da * dgate).to(dh.dtype.element_ty)
        if G == 1:
            tl.store(dh + at, dgate, mask=inside)
        else:
            dup = (da * dup).to(dh.dtype.element_ty)
            if PAIRS:
                column = first * 2 + tl.arange(0, 2 * BN)
                inside = live[:, None] & (column < 2 * F)[None, :]
                at = rows[:, None].to(tl.int64) * (2 * F) + column[None, :]
                tl.store(dh + at, tl.join(dgate, dup).reshape(BM, 2 * BN), mask=inside)
            else:
                tl.store(dh + at, dgate, mask=inside)
                tl.store(dh + at + F, dup, mask=inside)
    return part


@remembered
@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=VIEWS)
def down_backward_kernel(
    dy, w, h, weights, dh, act, dweights, order, tile_expert, tile_row, offsets, R, D, F,
    stride_dy, stride_we, stride_wd, stride_wf,
    K: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, PAIRS: tl.constexpr, EVEN_K: tl.constexpr,
    K_FIRST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """da = dy[token] @ w_out; then dh, weight * act(h), and this column tile's share of the weights' gradient.

    The gradient of a routing weight is <dy, y> = <da, act(h)>, so y is never needed again.
    """
    num_n = tl.cdiv(F, BN)
    e = tl.load(tile_expert + tl.program_id(0) // num_n)
    if e < 0:
        return
    pn, row, first, size = walk(tl.program_id(0), e, num_n, tile_row, offsets, BM, GROUP_M)
    rows = row + tl.arange(0, BM)
    live = rows < first + size
    flat = tl.load(order + rows, mask=live, other=0)
    n = pn * BN + tl.arange(0, BN)
    w_columns = w + e.to(tl.int64) * stride_we + n.to(tl.int64) * stride_wf
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc = product(
        acc, dy + (flat // K).to(tl.int64) * stride_dy, live, w_columns, n < F, stride_wd, D,
        BK, EVEN_K, K_FIRST, PRECISION,
    )  # fmt: skip
    weight = tl.load(weights + flat, mask=live, other=0.0).to(tl.float32)
    part = down_backward_epilogue(acc, h, dh, act, rows, live, weight, pn * BN, F, G, ACT, PAIRS, SPLIT, BM, BN)
    tl.store(dweights + pn.to(tl.int64) * R + flat, part, mask=live)


@remembered
@triton.jit(do_not_specialize_on_alignment=VIEWS)
def weight_gradient_kernel(
    a, b, dw, order, offsets, N, C,
    stride_a, stride_b,
    K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dw[e] = a.T @ b over the rows of expert e, [N, C]; zeros where it has none. GATHER: read by token.

    PAIRS: the columns of a are gate and up in turns; dw gets all gates, then all ups.
    """
    num_n = tl.cdiv(N, BN)
    num_c = tl.cdiv(C, BC)
    e = tl.program_id(0) // (num_n * num_c)
    pn, pc = swizzle(tl.program_id(0) % (num_n * num_c), num_n, num_c, GROUP_M)
    n = pn * BN + tl.arange(0, BN)
    c = pc * BC + tl.arange(0, BC)
    r = tl.arange(0, BR)
    end = tl.load(offsets + e + 1)
    acc = tl.zeros((BN, BC), dtype=tl.float32)
    for start in range(tl.load(offsets + e), end, BR):
        rows = start + r
        live = rows < end
        row_a = rows
        row_b = rows
        if GATHER_A or GATHER_B:
            token = tl.load(order + rows, mask=live, other=0) // K
            if GATHER_A:
                row_a = token
            if GATHER_B:
                row_b = token
        a_at = a + row_a[None, :].to(tl.int64) * stride_a + n[:, None]
        b_at = b + row_b[:, None].to(tl.int64) * stride_b + c[None, :]
        a_tile = tl.load(a_at, mask=live[None, :] & (n < N)[:, None], other=0.0)
        b_tile = tl.load(b_at, mask=live[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    inside = (n < N)[:, None] & (c < C)[None, :]
    if PAIRS:
        n = n % 2 * (N // 2) + n // 2
    at = e.to(tl.int64) * N * C + n[:, None].to(tl.int64) * C + c[None, :]
    tl.store(dw + at, acc.to(dw.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------- the launches


def rows(x_TD: Tensor, routes: Routes, top_k: int) -> Tensor:
    """What the products read tokens from: here x itself, gathered as it is read."""
    return x_TD if x_TD.stride(1) == 1 and x_TD.stride(0) >= x_TD.shape[1] else x_TD.contiguous()


def up(
    x_TD: Tensor,
    experts: Experts,
    routes: Routes,
    top_k: int,
    activation: str,
    sizes: Tiles,
    store_h: bool,
    store_act: bool,
) -> tuple[Tensor, Tensor]:
    """Pre-activations h_RJ and activations [R, F]; empty where not to be stored."""
    (_, G, F, D), R = experts.w_in_EGFD.shape, routes.order_R.shape[0]
    w, pairs = _gate_layout(experts.w_in_EGFD)
    tile, M, strides = sizes.up, routes.tile_row_M.shape[0], w.stride()
    h_RJ, act_RF = x_TD.new_empty(R if store_h else 0, G * F), x_TD.new_empty(R if store_act else 0, F)
    if M:
        up_kernel[(M * cdiv(F, tile.columns // G),)](
            x_TD, w, experts.s_in_EGF, experts.b_in_EGF, h_RJ, act_RF, routes.order_R, routes.tile_expert_M,
            routes.tile_row_M, routes.offsets, D, F, x_TD.stride(0), *strides,
            K=top_k, G=G, ACT=ACTIVATION_CODES[activation], HAS_SCALE=experts.s_in_EGF is not None,
            HAS_BIAS=experts.b_in_EGF is not None,
            STORE_H=store_h, STORE_ACT=store_act, PAIRS=pairs, EVEN_K=D % tile.depth == 0, BM=sizes.rows,
            K_FIRST=strides[3] <= min(strides[1:3]), PRECISION=float32_precision(experts.precision, x_TD),
            BN=tile.columns, BK=tile.depth, GROUP_M=tile.group, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return h_RJ, act_RF


def down(act_RF: Tensor, experts: Experts, routes: Routes, sizes: Tiles) -> Tensor:
    """The experts' outputs, [R, D], not yet weighted."""
    w, s, b = experts.w_out_EDF, experts.s_out_ED, experts.b_out_ED
    return _rows_by_weights(act_RF, w, *w.stride()[1:], s, b, routes, sizes, sizes.down, experts.precision)


def dx(dh_RJ: Tensor, experts: Experts, routes: Routes, sizes: Tiles) -> Tensor:
    """The gradient of x before the rows of a token are summed, [R, D]."""
    w, pairs = _gate_layout(experts.w_in_EGFD)
    stride_j = w.stride(1 if pairs else 2)
    return _rows_by_weights(dh_RJ, w, w.stride(3), stride_j, None, None, routes, sizes, sizes.dx, experts.precision)


def _rows_by_weights(
    a: Tensor,
    w: Tensor,
    stride_n: int,
    stride_k: int,
    scale: Tensor | None,
    bias: Tensor | None,
    routes: Routes,
    sizes: Tiles,
    tile: Tile,
    precision: str | None,
) -> Tensor:
    """a [R, depth] @ each expert's [depth, N] + bias -> [R, N]."""
    (R, depth), M = a.shape, routes.tile_row_M.shape[0]
    N = w.numel() // (w.shape[0] * depth)
    y_RN = a.new_empty(R, N)
    if M:
        down_kernel[(M * cdiv(N, tile.columns),)](
            a, w, scale, bias, y_RN, routes.tile_expert_M, routes.tile_row_M, routes.offsets, N, depth,
            a.stride(0), w.stride(0), stride_n, stride_k,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, EVEN_K=depth % tile.depth == 0,
            K_FIRST=stride_k <= stride_n, PRECISION=float32_precision(precision, a), BM=sizes.rows, BN=tile.columns,
            BK=tile.depth, GROUP_M=tile.group, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y_RN


def in_pairs(w_EGFD: Tensor) -> bool:
    """Whether gate and up stand in turns. Then dh does, too, so that dx reads both in the order of memory."""
    _, G, F, _ = w_EGFD.shape
    return G == 2 and F > 1 and w_EGFD.stride(2) == 2 * w_EGFD.stride(1)


def _gate_layout(w_EGFD: Tensor) -> tuple[Tensor, bool]:
    """The weights, copied if their layout is none of two, and whether it is pairs of gate and up, not halves."""
    if in_pairs(w_EGFD):
        return w_EGFD, True
    _, G, F, _ = w_EGFD.shape
    if G == 1 or w_EGFD.stride(1) == F * w_EGFD.stride(2):
        return w_EGFD, False
    return w_EGFD.contiguous(), False


def down_backward(
    dy_TD: Tensor,
    experts: Experts,
    weights_TK: Tensor,
    h_RJ: Tensor,
    routes: Routes,
    activation: str,
    sizes: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh_RJ (see `in_pairs`), routing weight * act(h) [R, F], and the routing weights' gradient, float32 [T, K]."""
    w, (_, D, F), R = experts.w_out_EDF, experts.w_out_EDF.shape, routes.order_R.shape[0]
    tile, M, G = sizes.down_backward, routes.tile_row_M.shape[0], experts.w_in_EGFD.shape[1]
    dh_RJ, act_RF = torch.empty_like(h_RJ), h_RJ.new_empty(R, F)
    parts_NR = h_RJ.new_empty(cdiv(F, tile.columns), R, dtype=torch.float32)
    if M:
        down_backward_kernel[(M * len(parts_NR),)](
            dy_TD, w, h_RJ, weights_TK, dh_RJ, act_RF, parts_NR, routes.order_R, routes.tile_expert_M,
            routes.tile_row_M, routes.offsets, R, D, F, dy_TD.stride(0), *w.stride(),
            K=weights_TK.shape[1], G=G, ACT=ACTIVATION_CODES[activation], PAIRS=in_pairs(experts.w_in_EGFD),
            EVEN_K=D % tile.depth == 0, K_FIRST=w.stride(1) < w.stride(2),
            PRECISION=float32_precision(experts.precision, dy_TD), SPLIT=tile.split, BM=sizes.rows,
            BN=tile.columns, BK=tile.depth, GROUP_M=tile.group,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dh_RJ, act_RF, parts_NR.sum(0).view_as(weights_TK)


def weight_gradient(
    a: Tensor,
    b: Tensor,
    routes: Routes,
    top_k: int,
    n_experts: int,
    sizes: Tiles,
    gathered: str,
    pairs: bool = False,
    precision: str | None = None,
) -> Tensor:
    """a.T @ b over each expert's rows -> [E, columns of a, columns of b].

    Args:
        gathered: which of the two `rows` made.
        pairs: a has gate and up in turns; the result has all gates, then all ups.
    """
    N, C, tile = a.shape[1], b.shape[1], sizes.dw
    dw = a.new_empty(n_experts, N, C)
    weight_gradient_kernel[(n_experts * cdiv(N, tile.rows) * cdiv(C, tile.columns),)](
        a, b, dw, routes.order_R, routes.offsets, N, C, a.stride(0), b.stride(0),
        K=top_k, GATHER_A=gathered == "a", GATHER_B=gathered == "b", PAIRS=pairs,
        PRECISION=float32_precision(precision, a), BN=tile.rows, BC=tile.columns, BR=tile.depth, GROUP_M=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dw
