"""The expert MLP of few tokens in Triton: each touched expert's weights are read once, by as many programs as it takes.

With few tokens nothing but reading the weights takes time, and it takes the longer the fewer programs do it: the
products are cut along the summed dimension too (split-K). Parts are kept in float32 and added in the order of the
splits, never by atomics, so the same call gives the same bits. How a product is cut follows from the shape of the
weights and from the device, never from the number of tokens: with `batch_invariant`, which also fixes the rows of a
tile, a token's result has the same bits whatever else is in the batch.

Bytes are the floor: G*F*D + D*F numbers of each touched expert; 0.77 ms for one token at full width, bfloat16 and
4.8 TB/s, 6.2 ms when all 16 experts are touched. The parts add R*(G*F + D)*4 bytes per split, 1e-4 of that.

Shape suffixes as in triton_routes.py; J = G*F pre-activations of a row, Z splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.arguments import float32_precision
from moe.kernels.experts import triton_routes
from moe.kernels.experts.triton_activation import ACTIVATION_CODES, activate
from moe.kernels.experts.triton_pointer import Experts, product, walk
from moe.kernels.experts.triton_routes import VIEWS, Routes
from moe.kernels.launcher import cdiv, power_of_2, remembered
from moe.kernels.spans import span
from moe.kernels.tiles import Tile

# Up to so many tokens these kernels are the faster ones: an expert's rows are about one tile.
MOST_TOKENS = 64
# With `batch_invariant` there may be any number; so many at a time, for the sake of the parts' memory.
_CHUNK = 512


@remembered
@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=VIEWS)
def parts_kernel(
    a, w, parts, order, tile_expert, tile_row, offsets, R, N, depth, extent, stride_a,
    K: tl.constexpr, GATHER: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """parts[z] = a @ w.T over the z-th `extent` of the depth, unscaled; GATHER: the rows of a are tokens."""
    num_n = tl.cdiv(N, BN)
    e = tl.load(tile_expert + tl.program_id(0) // num_n)
    if e < 0:
        return
    pn, row, first, size = walk(tl.program_id(0), e, num_n, tile_row, offsets, BM, GROUP_M)
    rows = row + tl.arange(0, BM)
    live = rows < first + size
    source = rows
    if GATHER:
        source = tl.load(order + rows, mask=live, other=0) // K
    n = pn * BN + tl.arange(0, BN)
    k = tl.program_id(1) * extent
    length = tl.minimum(extent, depth - k)
    a_rows = a + source.to(tl.int64) * stride_a + k
    w_columns = w + e.to(tl.int64) * N * depth + n.to(tl.int64) * depth + k
    if BM == 1:
        # One row has no use for tensor cores, whose tiles would be fifteen sixteenths empty.
        acc = _vector_product(a_rows, w_columns, n < N, length, BN, BK, EVEN_K)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = product(acc, a_rows, live, w_columns, n < N, 1, length, BK, EVEN_K, True, PRECISION)
    at = (tl.program_id(1).to(tl.int64) * R + rows[:, None]) * N + n[None, :]
    tl.store(parts + at, acc, mask=live[:, None] & (n < N)[None, :])


@triton.jit
def _vector_product(a_rows, w_columns, w_mask, length, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """The product of one row, [1, BN]."""
    k = tl.arange(0, BK)
    a_at = a_rows[:, None] + k[None, :]
    w_at = w_columns[:, None] + k[None, :]
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for start in range(0, length, BK):
        w_live = w_mask[:, None]
        a_live = (k < BK)[None, :]
        if not EVEN_K:
            a_live = (start + k < length)[None, :]
            w_live = w_live & a_live
        a = tl.load(a_at, mask=a_live, other=0.0).to(tl.float32)
        acc += a * tl.load(w_at, mask=w_live, other=0.0).to(tl.float32)
        a_at += BK
        w_at += BK
    return tl.sum(acc, axis=1)[None, :]


@triton.jit
def _sum(parts, at, stride_z, inside, Z: tl.constexpr):
    """The sum of a row's parts, in the order of the splits."""
    acc = tl.load(parts + at, mask=inside, other=0.0)
    for z in tl.static_range(1, Z):
        acc += tl.load(parts + z * stride_z + at, mask=inside, other=0.0)
    return acc


@remembered
@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=VIEWS)
def activate_kernel(
    parts, scale, act, offsets, R, F,
    E: tl.constexpr, P: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, HAS_SCALE: tl.constexpr, Z: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """act = activation(scale of the row's expert * sum of the parts)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = f < F
    stride_z = R.to(tl.int64) * G * F
    gate = _sum(parts, row * G * F + f, stride_z, inside, Z)
    up = gate
    if G == 2:
        up = _sum(parts, row * G * F + F + f, stride_z, inside, Z)
    if HAS_SCALE:
        i = tl.arange(0, P)
        # The row's expert: how many experts' rows end at or before it.
        e = tl.sum((tl.load(offsets + 1 + i, mask=i < E, other=R) <= row).to(tl.int32), axis=0)
        gate *= tl.load(scale + e * (G * F) + f, mask=inside, other=0.0)
        if G == 2:
            up *= tl.load(scale + e * (G * F) + F + f, mask=inside, other=0.0)
        else:
            up = gate
    tl.store(act + row * F + f, activate(gate, up, ACT).to(act.dtype.element_ty), mask=inside)


@remembered
@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["ids", "weights", *VIEWS])
def combine_parts_kernel(
    parts, scale, weights, ids, inverse, y, R, D,
    K: tl.constexpr, HAS_SCALE: tl.constexpr, Z: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over the slots, in their order, of weight * scale of the expert * sum of the row's parts."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), dtype=tl.float32)
    for j in tl.static_range(K):
        row = tl.load(inverse + t * K + j).to(tl.int64)
        part = _sum(parts, row * D + d, R.to(tl.int64) * D, d < D, Z)
        if HAS_SCALE:
            e = tl.load(ids + t * K + j)
            part *= tl.load(scale + e * D + d, mask=d < D, other=0.0)
        acc += part * tl.load(weights + t * K + j).to(tl.float32)
    tl.store(y + t * D + d, acc.to(y.dtype.element_ty), mask=d < D)


# ------------------------------------------------------------------------------------------------------- the launches


def fits(experts: Experts, n_tokens: int) -> bool:
    """Whether these kernels are for so many tokens and for such weights: contiguous, without biases."""
    biases = experts.b_in_EGF is not None or experts.b_out_ED is not None
    contiguous = experts.w_in_EGFD.is_contiguous() and experts.w_out_EDF.is_contiguous()
    return 0 < n_tokens <= MOST_TOKENS and contiguous and not biases


def forward(
    x_TD: Tensor, experts: Experts, weights_TK: Tensor, ids_TK: Tensor, activation: str, batch_invariant: bool
) -> Tensor:
    """y_TD. With `batch_invariant` any number of tokens; weights are contiguous, without biases.

    An id outside [0, E) ends in an assertion on the device.
    """
    if not batch_invariant or len(x_TD) <= _CHUNK:
        return _forward(x_TD, experts, weights_TK, ids_TK, activation, batch_invariant)
    chunks = zip(*(t.split(_CHUNK) for t in (x_TD, weights_TK, ids_TK)), strict=True)
    return torch.cat([_forward(x, experts, w, i, activation, True) for x, w, i in chunks])


def _forward(
    x_TD: Tensor, experts: Experts, weights_TK: Tensor, ids_TK: Tensor, activation: str, batch_invariant: bool
) -> Tensor:
    (E, G, F, D), (T, K) = experts.w_in_EGFD.shape, ids_TK.shape
    y_TD = x_TD.new_empty(T, D)
    if T == 0:
        return y_TD
    rows = tiles.few_rows(x_TD.dtype, T, batch_invariant)
    tile = tiles.choose_few(x_TD.dtype, rows)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    with span("permute"):
        routes, _ = triton_routes.route(ids_TK, E, rows)
    with span("up"):
        parts_ZRJ = _parts(x_TD, experts.w_in_EGFD, experts.precision, routes, K, True, rows, tile)
        act_RF, BF = x_TD.new_empty(T * K, F), min(1024, power_of_2(F))
        activate_kernel[(T * K, cdiv(F, BF))](
            parts_ZRJ, experts.s_in_EGF, act_RF, routes.offsets, T * K, F,
            E=E, P=power_of_2(E), G=G, ACT=ACTIVATION_CODES[activation], HAS_SCALE=experts.s_in_EGF is not None,
            Z=len(parts_ZRJ), BF=BF,
        )  # fmt: skip
    del parts_ZRJ
    with span("down"):
        parts_ZRD = _parts(act_RF, experts.w_out_EDF, experts.precision, routes, K, False, rows, tile)
    with span("combine"):
        BD = min(1024, power_of_2(D))
        combine_parts_kernel[(T, cdiv(D, BD))](
            parts_ZRD, experts.s_out_ED, weights_TK.contiguous(), ids_TK.contiguous(), routes.inverse_R, y_TD, T * K, D,
            K=K, HAS_SCALE=experts.s_out_ED is not None, Z=len(parts_ZRD), BD=BD,
        )  # fmt: skip
    return y_TD


def _parts(
    a: Tensor, w: Tensor, precision: str | None, routes: Routes, top_k: int, gather: bool, rows: int, tile: Tile
) -> Tensor:
    """The product of the routed rows with their experts' weights [E, ..., depth], in splits: [Z, R, N] float32."""
    R, depth, M = routes.order_R.shape[0], w.shape[-1], routes.tile_row_M.shape[0]
    N = w[0].numel() // depth
    num_n = cdiv(N, tile.columns)
    extent = split(depth, num_n, tile.depth, tiles.programs(a.device))
    Z = cdiv(depth, extent)
    parts_ZRN = a.new_empty(Z, R, N, dtype=torch.float32)
    parts_kernel[(M * num_n, Z)](
        a, w, parts_ZRN, routes.order_R, routes.tile_expert_M, routes.tile_row_M, routes.offsets, R, N, depth, extent,
        a.stride(0),
        K=top_k, GATHER=gather, EVEN_K=depth % tile.depth == 0, PRECISION=float32_precision(precision, a),
        BM=rows, BN=tile.columns, BK=tile.depth, GROUP_M=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts_ZRN


def split(depth: int, num_n: int, step: int, n_multiprocessors: int) -> int:
    """How much of the depth one program sums, a multiple of `step`.

    So much less than all that one expert alone has two programs for each multiprocessor, but four steps at least.
    Nothing here knows how many tokens there are.
    """
    steps, wanted = cdiv(depth, step), cdiv(2 * n_multiprocessors, num_n)
    return cdiv(steps, max(1, min(wanted, steps // 4))) * step
