"""The products `up`, `down` and `dx` in Gluon for Hopper: one warp loads, two warp groups multiply. Off by default.

Triton's own compiler lets every warp load, multiply and store in turns; here the three go on side by side. A program
keeps a ring of STAGES slots in shared memory. The producer, one warp, waits for an empty slot, names the bytes that
will come, and asks TMA for a box of rows and a box of weights; it is ahead by a whole ring, so the next tile's loads
run while this one is stored. Each of the two consumers, a warp group, multiplies its half of the tile's rows, and
returns a slot when the products that read it are complete. The consumers wait for the ring alone, never for each
other, so one stores while the other keeps the tensor cores busy.

Tiles, their order and the ragged stores are triton_tma.py's, and so are results, to the order of float32 sums. Never
timed on a GPU: the setting GPT4_MOE_GLUON=1 (tiles.py) chooses it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.ragged_tma import create_ragged_descriptor

from moe.kernels import cards, tiles
from moe.kernels.experts import triton_tma
from moe.kernels.experts.triton_activation import ACTIVATION_CODES, SWIGLU, activate
from moe.kernels.experts.triton_pointer import Experts, walk
from moe.kernels.experts.triton_routes import Routes
from moe.kernels.experts.triton_tma import _ragged
from moe.kernels.tiles import Tile, Tiles

# What is not of this variant: the same module functions, so that the op takes one module or the other.
rows, down_backward, weight_gradient = triton_tma.rows, triton_tma.down_backward, triton_tma.weight_gradient

# Triton 3.6 has longer names for them.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _produce(
    a, w, a_ring, w_ring, full, empty, tile_expert, tile_row, n_tiles, offsets, N, depth, n_programs,
    K_FIRST: gl.constexpr, G: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring. A new barrier has completed the phase before its first, which opens the first round of slots."""
    BH: gl.constexpr = BN // G
    num_n = (N + BH - 1) // BH
    step = 0
    for tile in range(gl.program_id(0), gl.load(n_tiles) * num_n, n_programs):
        e = gl.load(tile_expert + tile // num_n)
        pn, row, _, _ = walk(tile, e, num_n, tile_row, offsets, BM, GROUP_M)
        for k in range(0, depth, BK):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES + 1) & 1)
            mbarrier.expect(full.index(slot), (BM + BN) * BK * 2)
            load_box(a, [row, k], full.index(slot), a_ring.index(slot))
            if K_FIRST:
                load_box(w, [e, 0, pn * BH, k], full.index(slot), w_ring.index(slot))
            else:
                load_box(w, [e, 0, k, pn * BH], full.index(slot), w_ring.index(slot))
            step += 1


@gluon.jit
def _put(out, buffer, r0, r1, r2, g, column, values, BM: gl.constexpr, BN: gl.constexpr):
    """Stores a piece of a tile through the consumer's buffer, once the store before has read that."""
    tma.store_wait(0)
    buffer.reshape([BM // 2, BN // 2]).store(values.to(out.dtype))
    fence_async_shared()
    store_box(out, [r0, r1, r2, g, column], buffer)


@gluon.jit
def _consume(
    raw, act, a_ring, w_ring, buffers, full, empty, tile_expert, tile_row, n_tiles, offsets, N, depth, n_programs,
    HALF: gl.constexpr, K_FIRST: gl.constexpr, G: gl.constexpr, ACT: gl.constexpr, STORE_RAW: gl.constexpr,
    STORE_ACT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Multiplies and stores the upper (HALF = 0) or lower half of every tile's rows."""
    BH: gl.constexpr = BN // G
    num_n = (N + BH - 1) // BH
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros((BM // 2, BN), gl.float32, layout)
    buffer = buffers.index(HALF)
    step = 0
    for tile in range(gl.program_id(0), gl.load(n_tiles) * num_n, n_programs):
        e = gl.load(tile_expert + tile // num_n)
        pn, row, first, size = walk(tile, e, num_n, tile_row, offsets, BM, GROUP_M)
        for k in range(0, depth, BK):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            a_half = a_ring.index(slot).slice(HALF * (BM // 2), BM // 2)
            if K_FIRST:
                w_box = w_ring.index(slot).reshape([BN, BK]).permute((1, 0))
            else:
                w_box = w_ring.index(slot).reshape([BK, BN])
            acc = warpgroup_mma(a_half, w_box, acc, use_acc=k > 0, is_async=True)
            # The product before this one is complete, and its slot free; this one runs on.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        r0, r1, r2 = _ragged(first, size, row - first + HALF * (BM // 2))
        # Gate and up; or, without a gate, two halves of the columns.
        left, right = acc.reshape([BM // 2, 2, BN // 2]).permute([0, 2, 1]).split()
        column = pn * BH
        if STORE_RAW:
            _put(raw, buffer, r0, r1, r2, 0, column, left, BM, BN)
            _put(raw, buffer, r0, r1, r2, G - 1, column + BH - BN // 2, right, BM, BN)
        if STORE_ACT:
            if G == 2:
                _put(act, buffer, r0, r1, r2, 0, column, activate(left, right, ACT), BM, BN)
            else:
                _put(act, buffer, r0, r1, r2, 0, column, activate(left, left, ACT), BM, BN)
                _put(act, buffer, r0, r1, r2, 0, column + BN // 2, activate(right, right, ACT), BM, BN)
    tma.store_wait(0)


@gluon.jit
def product_kernel(
    a, w, raw, act, tile_expert, tile_row, n_tiles, offsets, N, depth, n_programs,
    K_FIRST: gl.constexpr, G: gl.constexpr, ACT: gl.constexpr, STORE_RAW: gl.constexpr, STORE_ACT: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """raw = a @ w (stored on request), act = activation(raw) (likewise).

    w is [E, G, N, depth] where K_FIRST (`up`: one box holds a gate half and an up half; `down`), else
    [E, 1, depth, N] (the gradient of x).
    """
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    if K_FIRST:
        w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 1, G, BN // G, BK], w.layout)
    else:
        w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 1, 1, BK, BN], w.layout)
    out: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)  # as _box has it
    buffers = gl.allocate_shared_memory(a.dtype, [2, 1, 1, BM // 2, 1, BN // 2], out)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)  # the producer, with the bytes it expects
        mbarrier.init(empty.index(slot), count=2)  # the consumers
    fence_async_shared()
    # 12 warps (the producer's group counts whole) share 65,536 registers: 168 each, of which the producer gives away.
    gl.warp_specialize(
        [
            (_consume, (
                raw, act, a_ring, w_ring, buffers, full, empty, tile_expert, tile_row, n_tiles, offsets, N, depth,
                n_programs, 0, K_FIRST, G, ACT, STORE_RAW, STORE_ACT, BM, BN, BK, GROUP_M, STAGES,
            )),
            (_consume, (
                raw, act, a_ring, w_ring, buffers, full, empty, tile_expert, tile_row, n_tiles, offsets, N, depth,
                n_programs, 1, K_FIRST, G, ACT, STORE_RAW, STORE_ACT, BM, BN, BK, GROUP_M, STAGES,
            )),
            (_produce, (
                a, w, a_ring, w_ring, full, empty, tile_expert, tile_row, n_tiles, offsets, N, depth, n_programs,
                K_FIRST, G, BM, BN, BK, GROUP_M, STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the launches


def fits(sizes: Tiles, device: torch.device) -> bool:
    """Whether this variant has tiles of such sizes, and the GPU its instructions: Hopper's, which later ones lack."""
    ours = (sizes.up, sizes.down, sizes.dx)
    # 64 rows of each warp group, boxes as wide as the swizzle.
    if sizes.rows != 128 or any(t.columns < 128 or t.depth < 64 for t in ours):
        return False
    card = cards.card(device)
    return card.arch == "sm_90" and all(_shared_bytes(t) <= card.shared for t in ours)


def _shared_bytes(tile: Tile) -> int:
    """The ring, a buffer of half the columns for each half of the rows, and barriers and arguments (about 300)."""
    return tile.stages * (128 + tile.columns) * tile.depth * 2 + 128 * tile.columns + 1024


def up(
    x_RD: Tensor,
    experts: Experts,
    routes: Routes,
    top_k: int,
    activation: str,
    sizes: Tiles,
    store_h: bool,
    store_act: bool,
) -> tuple[Tensor, Tensor]:
    """As in triton_pointer.py."""
    _, G, F, _ = experts.w_in_EGFD.shape
    R = len(x_RD)
    h_RJ, act_RF = x_RD.new_empty(R if store_h else 0, G * F), x_RD.new_empty(R if store_act else 0, F)
    _product(
        x_RD,
        experts.w_in_EGFD,
        h_RJ.view(R, G, F) if store_h else None,
        act_RF.view(R, 1, F) if store_act else None,
        routes,
        sizes,
        sizes.up,
        activation=ACTIVATION_CODES[activation],
    )
    return h_RJ, act_RF


def down(act_RF: Tensor, experts: Experts, routes: Routes, sizes: Tiles) -> Tensor:
    """As in triton_pointer.py."""
    w_E1DF, R = experts.w_out_EDF.unsqueeze(1), len(act_RF)
    y_RD = act_RF.new_empty(R, w_E1DF.shape[2])
    _product(act_RF, w_E1DF, y_RD.view(R, 1, -1), None, routes, sizes, sizes.down)
    return y_RD


def dx(dh_RJ: Tensor, experts: Experts, routes: Routes, sizes: Tiles) -> Tensor:
    """As in triton_pointer.py."""
    w_E1JD, R = experts.w_in_EGFD.flatten(1, 2).unsqueeze(1), len(dh_RJ)
    dx_RD = dh_RJ.new_empty(R, w_E1JD.shape[3])
    _product(dh_RJ, w_E1JD, dx_RD.view(R, 1, -1), None, routes, sizes, sizes.dx, k_first=False)
    return dx_RD


def _product(
    a: Tensor,
    w: Tensor,
    raw: Tensor | None,
    act: Tensor | None,
    routes: Routes,
    sizes: Tiles,
    tile: Tile,
    k_first: bool = True,
    activation: int = SWIGLU.value,
) -> None:
    """Launches: a [R, depth], w [E, G, N, depth] or [E, 1, depth, N], raw [R, G, N], act [R, 1, N].

    `tile.warps` and `tile.split` have no say: the warps are the kernel's, and a tile leaves in halves.
    """
    G, N, n = w.shape[1], w.shape[2 if k_first else 3], tiles.programs(a.device)
    box = (1, G, tile.columns // G, tile.depth) if k_first else (1, 1, tile.depth, tile.columns)
    out = [sizes.rows // 2, 1, tile.columns // 2]
    product_kernel[(n,)](
        _box(a, a.shape, a.stride(), (sizes.rows, tile.depth)), _box(w, w.shape, w.stride(), box),
        _ragged_box(raw, out), _ragged_box(act, out),
        routes.tile_expert_M, routes.tile_row_M, routes.n_tiles, routes.offsets, N, a.shape[1], n,
        K_FIRST=k_first, G=G, ACT=activation, STORE_RAW=raw is not None, STORE_ACT=act is not None,
        BM=sizes.rows, BN=tile.columns, BK=tile.depth, GROUP_M=tile.group, STAGES=tile.stages,
        num_warps=4,
    )  # fmt: skip


def _ragged_box(t: Tensor | None, block: list[int]) -> TensorDescriptor | None:
    if t is None:
        return None
    made = create_ragged_descriptor(t, block)
    return _box(t, made.shape, made.strides, made.block_shape)


def _box(t: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(t, list(shape), list(strides), list(block), layout)
