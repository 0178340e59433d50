"""The order in which routed rows stand in memory, sorted by expert, in Triton.

No sort, no atomics, no host sync: tokens are taken in blocks; each block counts its rows per expert, one scan over the
counts says where each block's rows of each expert begin, and each block then places its own. The order is the one of
a stable sort, so it is the same in every run. A few blocks are one program's, in one launch.

An id outside [0, E) ends in an assertion on the device, in the kernels that count, which read every id first: waiting
for the device to say so would cost more than the products of a few tokens.

Shape suffixes as in reference.py; Z token blocks, P experts rounded up to a power of two, M tiles of rows. Numbers that
follow from that of the tokens are not specialised on: every batch of a server is of another size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.gate.triton_gate import block_tokens
from moe.kernels.launcher import cdiv, power_of_2, remembered

# Views that begin anywhere; kernels read one number of them at a time, or a tile's.
VIEWS = ("order", "inverse", "offsets", "tile_expert", "tile_row", "n_tiles")
# Up to so many blocks are sorted by one program. It takes them one after another, a few microseconds each, which the
# host needs for every launch that this saves.
_BLOCKS_OF_ONE_PROGRAM = 4
# A tensor map counts the rows of an expert in 30 bits, and no card's memory holds the activations of so many.
_MAX_ROWS = 2**30


class Routes(NamedTuple):
    """Where the R = T*K routed rows stand. All int32."""

    order_R: Tensor  # sorted row -> flat (token, slot)
    inverse_R: Tensor  # flat (token, slot) -> sorted row
    offsets: Tensor  # [E + 1]: first row of each expert, then R
    tile_expert_M: Tensor  # the expert of each tile of rows, -1 for tiles not in use
    tile_row_M: Tensor  # its first row
    n_tiles: Tensor  # [1]: how many are in use


@triton.jit
def _count(ids, t, T, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Rows per expert [P] of the tokens t; asserts that their ids are ones."""
    e = tl.arange(0, P)
    total = tl.zeros((P,), tl.int32)
    known = t >= 0
    for j in tl.static_range(K):
        i = tl.load(ids + t.to(tl.int64) * K + j, mask=t < T, other=0)
        known = known & (i >= 0) & (i < E)
        hot = (e[None, :] == i[:, None]) & (t < T)[:, None]
        total += tl.sum(hot.to(tl.int32), axis=0)
    tl.device_assert(known, "ids outside [0, the number of experts)")
    return total


@triton.jit
def _place(ids, order, inverse, t, T, first, P: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Store the places of the tokens' rows, and return how many each expert has; `first` [P]: where they begin."""
    live = t < T
    e = tl.arange(0, P)
    own = tl.zeros((BT, P), tl.int32)
    for j in tl.static_range(K):
        i = tl.load(ids + t.to(tl.int64) * K + j, mask=live, other=-1).to(tl.int32)
        own += (e[None, :] == i[:, None]).to(tl.int32)
    before = tl.cumsum(own, axis=0) - own + first[None, :]
    for j in tl.static_range(K):
        i = tl.load(ids + t.to(tl.int64) * K + j, mask=live, other=-1).to(tl.int32)
        hot = e[None, :] == i[:, None]
        row = tl.sum(tl.where(hot, before, 0), axis=1)
        tl.store(inverse + t * K + j, row, mask=live)
        tl.store(order + row, t * K + j, mask=live)
        before += hot.to(tl.int32)
    return tl.sum(own, axis=0)


@triton.jit
def _store_tiles(first, size, tile_expert, tile_row, m, M, E: tl.constexpr, P: tl.constexpr, BM):
    """The expert and first row of the tiles m, from each expert's first row and number of rows, [P]."""
    e = tl.arange(0, P)
    tiles = (size + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    # The expert is the number of experts whose tiles all come before.
    past = (ends[None, :] <= m[:, None]) & (e < E)[None, :]
    expert = tl.sum(past.to(tl.int32), axis=1)
    own = e[None, :] == expert[:, None]
    row = tl.sum(tl.where(own, (first - (ends - tiles) * BM)[None, :], 0), axis=1) + m * BM
    tl.store(tile_expert + m, tl.where(expert < E, expert, -1), mask=m < M)
    tl.store(tile_row + m, tl.where(expert < E, row, 0), mask=m < M)


@remembered
@triton.jit(do_not_specialize=["T", "M", "BM"], do_not_specialize_on_alignment=["ids", *VIEWS], debug=True)
def _route_kernel(
    ids, order, inverse, offsets, tile_expert, tile_row, n_tiles, T, M, BM,
    E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program: all that the kernels below do, to the same bits."""
    e = tl.arange(0, P)
    size = tl.zeros((P,), tl.int32)
    for start in range(0, T, BT):
        size += _count(ids, start + tl.arange(0, BT), T, E, P, K)
    first = tl.cumsum(size, axis=0) - size
    tl.store(offsets + e, first, mask=e < E)
    tl.store(offsets + E, tl.sum(size, axis=0))
    begin = first
    for start in range(0, T, BT):
        begin += _place(ids, order, inverse, start + tl.arange(0, BT), T, begin, P, K, BT)
    for tile in range(0, M, B):
        _store_tiles(first, size, tile_expert, tile_row, tile + tl.arange(0, B), M, E, P, BM)
    tl.store(n_tiles, tl.sum((size + BM - 1) // BM, axis=0))


@remembered
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["ids"], debug=True)
def _count_kernel(ids, counts, T, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Rows per expert of each block of tokens."""
    block = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, P)
    tl.store(counts + block * P + e, _count(ids, tl.program_id(0) * BT + tl.arange(0, BT), T, E, P, K))


@remembered
@triton.jit(do_not_specialize=["Z"])
def _scan_kernel(counts, bases, offsets, Z, E: tl.constexpr, P: tl.constexpr, BZ: tl.constexpr):
    """One program. Per expert: how many rows the blocks before each block have, and its first row."""
    e = tl.arange(0, P)
    z = tl.arange(0, BZ)
    total = tl.zeros((P,), tl.int32)
    for start in range(0, Z, BZ):
        at = (start + z)[:, None].to(tl.int64) * P + e[None, :]
        inside = (start + z < Z)[:, None]
        c = tl.load(counts + at, mask=inside, other=0)
        tl.store(bases + at, tl.cumsum(c, axis=0) - c + total[None, :], mask=inside)
        total += tl.sum(c, axis=0)
    tl.store(offsets + e, tl.cumsum(total, axis=0) - total, mask=e < E)
    tl.store(offsets + E, tl.sum(total, axis=0))


@remembered
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["ids", *VIEWS])
def _place_kernel(
    ids, bases, offsets, order, inverse, T, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):
    """Each row's place: its expert's first row + the rows of earlier blocks, earlier tokens, earlier slots."""
    block = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, P)
    first = tl.load(offsets + e, mask=e < E, other=0) + tl.load(bases + block * P + e)
    _place(ids, order, inverse, tl.program_id(0) * BT + tl.arange(0, BT), T, first, P, K, BT)


@remembered
@triton.jit(do_not_specialize=["M", "BM"], do_not_specialize_on_alignment=VIEWS)
def _tile_kernel(offsets, tile_expert, tile_row, n_tiles, M, BM, E: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """The expert and first row of every tile."""
    e = tl.arange(0, P)
    first = tl.load(offsets + e, mask=e < E, other=0)
    size = tl.load(offsets + e + 1, mask=e < E, other=0) - first
    _store_tiles(first, size, tile_expert, tile_row, tl.program_id(0) * B + tl.arange(0, B), M, E, P, BM)
    if tl.program_id(0) == 0:
        tl.store(n_tiles, tl.sum((size + BM - 1) // BM, axis=0))


# ------------------------------------------------------------------------------------------------------- the launches


def route(ids_TK: Tensor, n_experts: int, tile_rows: int) -> tuple[Routes, Tensor]:
    """Sort the routed rows by expert, stably, and cut them into tiles of up to `tile_rows` rows, each of one expert.

    Args:
        ids_TK: chosen experts, int64 or int32 in [0, E). A token may name an expert twice.

    Returns:
        the routes, and their order with its inverse, [2, R]: with the offsets all that `cut` needs to make them again.

    Raises:
        ValueError: more than 2^30 rows.
    """
    T, K = ids_TK.shape
    BT = block_tokens(n_experts)
    if not 0 < T <= _BLOCKS_OF_ONE_PROGRAM * BT:
        both_2R, offsets = place(ids_TK, n_experts)
        return cut(both_2R, offsets, tile_rows), both_2R
    both_2R = ids_TK.new_empty(2, T * K, dtype=torch.int32)
    offsets = both_2R.new_empty(n_experts + 1)
    routes = _routes(both_2R, offsets, tile_rows)
    M, P = routes.tile_row_M.shape[0], power_of_2(n_experts)
    _route_kernel[(1,)](
        ids_TK.contiguous(), *routes, T, M, tile_rows,
        E=n_experts, P=P, K=K, BT=BT, B=_tile_block(P), sanitize_overflow=False,
    )  # fmt: skip
    return routes, both_2R


def place(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """`route`'s order and inverse, int32 [2, R], and offsets, int32 [E + 1], of any number of tokens."""
    T, K = ids_TK.shape
    if T * K > _MAX_ROWS:
        raise ValueError(f"ids {[T, K]}: {T * K:,} routed rows, at most {_MAX_ROWS:,}; give fewer tokens at a time")
    ids_TK = ids_TK.contiguous()
    P, BT = power_of_2(n_experts), block_tokens(n_experts)
    Z = cdiv(T, BT)
    both_2R = ids_TK.new_empty(2, T * K, dtype=torch.int32)
    offsets = both_2R.new_empty(n_experts + 1)
    if T == 0:
        return both_2R, offsets.zero_()
    order_R, inverse_R = both_2R.unbind()
    counts_ZP, bases_ZP = both_2R.new_empty(2, Z, P).unbind()
    _count_kernel[(Z,)](ids_TK, counts_ZP, T, E=n_experts, P=P, K=K, BT=BT, sanitize_overflow=False)
    _scan_kernel[(1,)](counts_ZP, bases_ZP, offsets, Z, E=n_experts, P=P, BZ=max(16, 2048 // P))
    _place_kernel[(Z,)](ids_TK, bases_ZP, offsets, order_R, inverse_R, T, E=n_experts, P=P, K=K, BT=BT)
    return both_2R, offsets


def cut(both_2R: Tensor, offsets: Tensor, tile_rows: int) -> Routes:
    """The routes of what `place` sorted."""
    routes = _routes(both_2R, offsets, tile_rows)
    if M := routes.tile_row_M.shape[0]:
        E = offsets.shape[0] - 1
        P = power_of_2(E)
        B = _tile_block(P)
        _tile_kernel[(cdiv(M, B),)](*routes[2:], M, tile_rows, E=E, P=P, B=B)
    return routes


def _routes(both_2R: Tensor, offsets: Tensor, tile_rows: int) -> Routes:
    """With tiles that nothing has filled in yet."""
    R, E = both_2R.shape[1], offsets.shape[0] - 1
    M = R // tile_rows + min(E, R)  # the most that R rows can need
    return Routes(*both_2R.unbind(), offsets, *both_2R.new_empty(2 * M + 1).split_with_sizes((M, M, 1)))


def _tile_block(P: int) -> int:
    """Tiles at a time: their one-hot matrix must fit a program's registers."""
    return max(16, min(128, 4096 // P))


def balanced_ids(n_tokens: int, n_experts: int, top_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Ids [T, K] int64 that load every expert alike (up to one row), K different ones per token: for benchmarks."""
    return (torch.arange(n_tokens * top_k, device=device) % n_experts).view(n_tokens, top_k)
