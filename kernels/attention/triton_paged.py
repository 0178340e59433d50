"""Attention over a paged cache in Triton, for the few rows of each request that a decoding step has.

A tile's rows are the query heads that share a key head, of one position and, where they fit, of the next: with one key
head for 168 heads a key is read once for a tile of 64 of them, and its tiles run side by side, so that the others find
it in the L2 cache. The context is cut into splits, a program each, and a second kernel adds their parts in the order of
the positions. How the context is cut, and the size of a tile, follow from the model's shape, never from the batch: a
row's result has the same bits whatever else is computed with it.

Bytes are the floor: 2*N*C numbers of a position, 4 MB of a request of 8k positions with one key head of 128 numbers in
bfloat16, 0.9 us at 4.8 TB/s. With 168 heads on one key head it is products, too: 168 operations a byte, of which an
H200 could do 206, and 192 with the rows that fill the last tile of 64. The parts, 4 bytes of each head's C and a split,
are written and read once: at most a sixth of the keys and values, and mostly out of the L2 cache.

Shape suffixes as in reference.py; M = H/N heads of a key head, Z splits, T tiles of a request.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.arguments import float32_precision
from moe.kernels.launcher import cdiv, power_of_2, remembered

# Tables of the engine, which are views that begin anywhere; kernels read one number of them at a time.
TABLES = ("blocks", "starts", "lengths")


@triton.jit
def _rows(starts, lengths, request, f, S, M: tl.constexpr):
    """Of a request's flat rows f, a position's M heads after the other's: row, head of the group, last position seen.

    A row that is not there sees none: -1.
    """
    first = tl.load(starts + request)
    n = tl.load(starts + request + 1) - first
    s = f // M
    last = tl.load(lengths + request) - n + s
    return first + s, f % M, tl.where(s < tl.minimum(n, S), last, -1)


@remembered
@triton.jit(do_not_specialize=["R", "S", "B", "stride_b"], do_not_specialize_on_alignment=TABLES)
def split_kernel(
    q, k, v, k_scale, v_scale, blocks, starts, lengths, parts, lse, R, S, B, stride_q, stride_b,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    LOG2_SCALE: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """parts[z] = attention of a tile of rows to the z-th SPLIT positions, lse[z] = log2 of the sum of its weights.

    P: C rounded up to a power of two, BA: positions at a time. Exponentials are of base two, of which LOG2_SCALE knows.
    """
    # A key head's tiles follow each other, and so run at the same time.
    n_tiles = tl.cdiv(S * M, BM)
    tile = tl.program_id(0) % n_tiles
    head = tl.program_id(0) // n_tiles % N
    request = tl.program_id(0) // (n_tiles * N)
    row, m, last = _rows(starts, lengths, request, tile * BM + tl.arange(0, BM), S, M)
    begin = tl.program_id(1) * SPLIT
    end = tl.minimum(begin + SPLIT, tl.max(last, axis=0) + 1)
    if begin >= end:
        return
    live = last >= begin
    c = tl.arange(0, P)
    inside_c = c < C
    h = head * M + m
    q_at = q + row[:, None].to(tl.int64) * stride_q + h[:, None] * C + c[None, :]
    q_tile = tl.load(q_at, mask=live[:, None] & inside_c[None, :], other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, P), tl.float32)
    for start in range(begin, end, BA):
        a = start + tl.arange(0, BA)
        block = tl.load(blocks + request.to(tl.int64) * stride_b + tl.minimum(a // BLOCK, B - 1)).to(tl.int64)
        slot = (block * BLOCK + a % BLOCK) * N + head
        seen = a < end
        at = slot[:, None] * C + c[None, :]
        k_tile = tl.load(k + at, mask=seen[:, None] & inside_c[None, :], other=0.0)
        s = tl.dot(q_tile, k_tile.to(q_tile.dtype).T, input_precision=PRECISION) * LOG2_SCALE
        if HAS_SCALE:
            s *= tl.load(k_scale + slot, mask=seen, other=0.0)[None, :]
        s = tl.where((a[None, :] <= last[:, None]) & seen[None, :], s, -float("inf"))
        # A row that is not there, or not yet, has seen nothing: a top of zero then, for -inf - -inf is no number.
        new = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v_tile = tl.load(v + at, mask=seen[:, None] & inside_c[None, :], other=0.0)
        if HAS_SCALE:
            v_tile = v_tile.to(tl.float32) * tl.load(v_scale + slot, mask=seen, other=0.0)[:, None]
        v_tile = v_tile.to(q_tile.dtype)
        acc = tl.dot(p.to(q_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        top = new
    total = tl.where(live, total, 1.0)
    at = (tl.program_id(1).to(tl.int64) * R + row) * (N * M) + h
    tl.store(lse + at, top + tl.log2(total), mask=live)
    tl.store(parts + at[:, None] * C + c[None, :], acc / total[:, None], mask=live[:, None] & inside_c[None, :])


@remembered
@triton.jit(do_not_specialize=["R", "S"], do_not_specialize_on_alignment=TABLES)
def merge_kernel(
    parts, lse, y, starts, lengths, R, S,
    H: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """y = the splits' parts, weighted by the sums of their weights, in the order of the positions."""
    request = tl.program_id(0) // S
    row, _, last = _rows(starts, lengths, request, tl.program_id(0) % S, S, 1)
    if last < 0:
        return
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    c = tl.arange(0, P)
    inside = (h < H)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64) * H + h
    top = tl.load(lse + at, mask=h < H, other=0.0)
    total = tl.full((BH,), 1.0, tl.float32)
    acc = tl.load(parts + at[:, None] * C + c[None, :], mask=inside, other=0.0)
    for z in range(1, last // SPLIT + 1):
        at = (tl.cast(z, tl.int64) * R + row) * H + h
        here = tl.load(lse + at, mask=h < H, other=0.0)
        new = tl.maximum(top, here)
        shrink = tl.exp2(top - new)
        weight = tl.exp2(here - new)
        total = total * shrink + weight
        part = tl.load(parts + at[:, None] * C + c[None, :], mask=inside, other=0.0)
        acc = acc * shrink[:, None] + part * weight[:, None]
        top = new
    y_at = y + (row.to(tl.int64) * H + h)[:, None] * C + c[None, :]
    tl.store(y_at, (acc / total[:, None]).to(y.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------- the launches


def paged_attention(
    q_RHC: Tensor,
    k_PNC: Tensor,
    v_PNC: Tensor,
    blocks_QB: Tensor,
    starts: Tensor,
    lengths_Q: Tensor,
    block_size: int,
    max_query_len: int,
    max_seq_len: int,
    k_scale_PN: Tensor | None,
    v_scale_PN: Tensor | None,
) -> Tensor:
    """As `ops.paged_attention`."""
    (R, H, C), N, Q = q_RHC.shape, k_PNC.shape[1], len(lengths_Q)
    y_RHC = q_RHC.new_empty(R, H, C)
    if R == 0:
        return y_RHC
    P = max(16, power_of_2(C))
    tile = tiles.choose_paged(q_RHC.device, q_RHC.dtype, k_PNC.dtype, H // N, P)
    q_RHC = q_RHC if q_RHC.stride()[1:] == (C, 1) else q_RHC.contiguous()
    Z, n_tiles = cdiv(max_seq_len, tile.split), cdiv(max_query_len * (H // N), tile.rows)
    parts_ZRHC = q_RHC.new_empty(Z, R, H, C, dtype=torch.float32)
    lse_ZRH = q_RHC.new_empty(Z, R, H, dtype=torch.float32)
    split_kernel[(Q * N * n_tiles, Z)](
        q_RHC, k_PNC, v_PNC, k_scale_PN, v_scale_PN, blocks_QB, starts, lengths_Q, parts_ZRHC, lse_ZRH, R,
        max_query_len, blocks_QB.shape[1], q_RHC.stride(0), blocks_QB.stride(0),
        N=N, M=H // N, C=C, P=P, BLOCK=block_size, SPLIT=tile.split,
        LOG2_SCALE=1 / (math.log(2) * C**0.5), HAS_SCALE=k_scale_PN is not None,
        PRECISION=float32_precision(None, q_RHC), BM=tile.rows, BA=tile.positions,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    BH = min(8, power_of_2(H))
    merge_kernel[(Q * max_query_len, cdiv(H, BH))](
        parts_ZRHC, lse_ZRH, y_RHC, starts, lengths_Q, R, max_query_len, H=H, C=C, P=P, SPLIT=tile.split, BH=BH
    )
    return y_RHC
