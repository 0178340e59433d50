"""The order in which routed rows stand in memory, sorted by expert, in Triton.

No sort, no atomics, no host sync: tokens are taken in blocks; each block counts its rows per expert, one scan over the
counts says where each block's rows of each expert begin, and each block then places its own. The order is the one of
a stable sort, so it is the same in every run.

Shape suffixes as in reference.py; Z token blocks, P experts rounded up to a power of two, M tiles of rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.gate.triton_gate import block_tokens


class Routes(NamedTuple):
    """Where the R = T*K routed rows stand. All int32."""

    order_R: Tensor  # sorted row -> flat (token, slot)
    inverse_R: Tensor  # flat (token, slot) -> sorted row
    offsets: Tensor  # [E + 1]: first row of each expert, then R
    tile_expert_M: Tensor  # the expert of each tile of rows, -1 for tiles not in use
    tile_row_M: Tensor  # its first row
    n_tiles: Tensor  # [1]: how many are in use


@triton.jit
def _count_kernel(ids, counts, T, P: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Rows per expert of each block of tokens."""
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    e = tl.arange(0, P)
    total = tl.zeros((P,), tl.int32)
    for j in tl.static_range(K):
        i = tl.load(ids + t.to(tl.int64) * K + j, mask=t < T, other=-1).to(tl.int32)
        total += tl.sum((e[None, :] == i[:, None]).to(tl.int32), axis=0)
    tl.store(counts + block * P + e, total)


@triton.jit
def _scan_kernel(counts, bases, offsets, Z, E: tl.constexpr, P: tl.constexpr, BZ: tl.constexpr):
    """One program. Per expert: how many rows the blocks before each block have, and its first row."""
    e = tl.arange(0, P)
    z = tl.arange(0, BZ)
    total = tl.zeros((P,), tl.int32)
    for start in range(0, Z, BZ):
        at = (start + z)[:, None] * P + e[None, :]
        inside = (start + z < Z)[:, None]
        c = tl.load(counts + at, mask=inside, other=0)
        tl.store(bases + at, tl.cumsum(c, axis=0) - c + total[None, :], mask=inside)
        total += tl.sum(c, axis=0)
    tl.store(offsets + e, tl.cumsum(total, axis=0) - total, mask=e < E)
    tl.store(offsets + E, tl.sum(total, axis=0))


@triton.jit
def _place_kernel(
    ids, bases, offsets, order, inverse, T, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):
    """Each row's place: its expert's first row + the rows of earlier blocks, earlier tokens, earlier slots."""
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    live = t < T
    e = tl.arange(0, P)
    own = tl.zeros((BT, P), tl.int32)
    for j in tl.static_range(K):
        i = tl.load(ids + t.to(tl.int64) * K + j, mask=live, other=-1).to(tl.int32)
        own += (e[None, :] == i[:, None]).to(tl.int32)
    first = tl.load(offsets + e, mask=e < E, other=0) + tl.load(bases + block * P + e)
    before = tl.cumsum(own, axis=0) - own + first[None, :]
    for j in tl.static_range(K):
        i = tl.load(ids + t.to(tl.int64) * K + j, mask=live, other=-1).to(tl.int32)
        hot = e[None, :] == i[:, None]
        row = tl.sum(tl.where(hot, before, 0), axis=1)
        tl.store(inverse + t * K + j, row, mask=live)
        tl.store(order + row, t * K + j, mask=live)
        before += hot.to(tl.int32)


@triton.jit
def _tile_kernel(
    offsets, tile_expert, tile_row, n_tiles, M, E: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, B: tl.constexpr
):
    """The expert and first row of every tile."""
    m = tl.program_id(0) * B + tl.arange(0, B)
    e = tl.arange(0, P)
    first = tl.load(offsets + e, mask=e < E, other=0)
    tiles = (tl.load(offsets + e + 1, mask=e < E, other=0) - first + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    # The expert is the number of experts whose tiles all come before.
    past = (ends[None, :] <= m[:, None]) & (e < E)[None, :]
    expert = tl.sum(past.to(tl.int32), axis=1)
    first_tile = tl.max(tl.where(past, ends[None, :], 0), axis=1)
    row = tl.load(offsets + expert, mask=expert < E, other=0) + (m - first_tile) * BM
    tl.store(tile_expert + m, tl.where(expert < E, expert, -1), mask=m < M)
    tl.store(tile_row + m, row, mask=m < M)
    if tl.program_id(0) == 0:
        tl.store(n_tiles, tl.sum(tiles, axis=0))


def place(ids_TK: Tensor, n_experts: int, counts_ZP: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort the routed rows by expert, stably.

    Args:
        ids_TK: chosen experts, int64 or int32 in [0, E). A token may name an expert twice.
        counts_ZP: what `gate` counted, where the ids come from it; else they are counted here.

    Returns:
        order and inverse, int32 [2, R], and offsets, int32 [E + 1], as in `Routes`.
    """
    ids_TK = ids_TK.contiguous()
    T, K = ids_TK.shape
    P, BT = triton.next_power_of_2(n_experts), block_tokens(n_experts)
    Z = triton.cdiv(T, BT)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids_TK.device)

    both_2R, offsets = ints(2, T * K), ints(n_experts + 1)
    if T == 0:
        return both_2R, offsets.zero_()
    if counts_ZP is None:
        counts_ZP = ints(Z, P)
        _count_kernel[(Z,)](ids_TK, counts_ZP, T, P=P, K=K, BT=BT)
    bases_ZP = ints(Z, P)
    _scan_kernel[(1,)](counts_ZP, bases_ZP, offsets, Z, E=n_experts, P=P, BZ=max(16, 2048 // P))
    _place_kernel[(Z,)](ids_TK, bases_ZP, offsets, both_2R[0], both_2R[1], T, E=n_experts, P=P, K=K, BT=BT)
    return both_2R, offsets


def cut(both_2R: Tensor, offsets: Tensor, tile_rows: int) -> Routes:
    """Cut what `place` sorted into tiles of up to `tile_rows` rows, each of one expert."""
    R, E = both_2R.shape[1], len(offsets) - 1
    M = R // tile_rows + min(E, R)  # the most that R rows can need
    tiles_2M, n_tiles = both_2R.new_empty(2, M), both_2R.new_empty(1)
    routes = Routes(both_2R[0], both_2R[1], offsets, tiles_2M[0], tiles_2M[1], n_tiles)
    if M:
        _tile_kernel[(triton.cdiv(M, 128),)](
            offsets, routes.tile_expert_M, routes.tile_row_M, n_tiles, M,
            E=E, P=triton.next_power_of_2(E), BM=tile_rows, B=128,
        )  # fmt: skip
    return routes


def balanced_ids(n_tokens: int, n_experts: int, top_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Ids [T, K] int64 that load every expert alike (up to one row), K different ones per token: for benchmarks."""
    return (torch.arange(n_tokens * top_k, device=device) % n_experts).view(n_tokens, top_k)
