"""The grouped products of the expert MLP for Hopper: persistent programs that read and write through TMA.

Each streaming multiprocessor keeps one program, which walks over the tiles. Its two loops, over tiles and over the
steps of each, are flattened into one: while a tile is finished and stored, the loads of the next one are under way.
Rows come already sorted by expert; a ragged descriptor (triton.tools.ragged_tma) ends at the last row of an expert, so
tiles need no masks. Weights must be contiguous in their last dimension, and every row begin at a multiple of 16 bytes;
all else is as in triton_pointer.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels import tiles
from moe.kernels.experts.triton_activation import ACTIVATION_CODES, activate, activate_backward
from moe.kernels.experts.triton_pointer import Experts, swizzle, walk
from moe.kernels.experts.triton_routes import VIEWS, Routes
from moe.kernels.experts.triton_rows import gather
from moe.kernels.launcher import cdiv, remembered
from moe.kernels.tiles import Tiles


@triton.jit
def _ragged(first, size, row):
    """The leading coordinates of a ragged descriptor's row, counted from `first`; those from `size` on do not exist.

    The library's own load and store do this too, but not under the interpreter.
    """
    billion = 0x40000000
    return billion, first + size, billion - size + row


@remembered
@triton.jit(do_not_specialize_on_alignment=VIEWS)
def up_kernel(
    x, w, h, act, tile_expert, tile_row, n_tiles, offsets, D, F, n_programs,
    G: tl.constexpr, ACT: tl.constexpr, STORE_H: tl.constexpr, STORE_ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """h = x @ w_in.T (stored on request), act = activation(h). One box of w holds a gate half and an up half."""
    BH: tl.constexpr = BN // G
    num_n = tl.cdiv(F, BH)
    for tile in tl.range(tl.program_id(0), tl.load(n_tiles) * num_n, n_programs, flatten=True):
        e = tl.load(tile_expert + tile // num_n)
        pn, row, first, size = walk(tile, e, num_n, tile_row, offsets, BM, GROUP_M)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, D, BK):
            a = x.load([row, k])
            b = w.load([e, 0, pn * BH, k]).reshape(BN, BK)
            acc = tl.dot(a, b.T, acc)
        r0, r1, r2 = _ragged(first, size, row - first)
        # Gate and up; or, without a gate, two halves of the columns. All boxes have one shape: they share the memory
        # on their way out.
        left, right = tl.split(acc.reshape(BM, 2, BN // 2).permute(0, 2, 1))
        f = pn * BH
        if STORE_H:
            h.store([r0, r1, r2, 0, f], left.to(h.dtype).reshape(1, 1, BM, 1, BN // 2))
            h.store([r0, r1, r2, G - 1, f + BH - BN // 2], right.to(h.dtype).reshape(1, 1, BM, 1, BN // 2))
        if STORE_ACT:
            if G == 2:
                y = activate(left, right, ACT).to(act.dtype)
                act.store([r0, r1, r2, 0, f], y.reshape(1, 1, BM, 1, BN // 2))
            else:
                left = activate(left, left, ACT).to(act.dtype)
                right = activate(right, right, ACT).to(act.dtype)
                act.store([r0, r1, r2, 0, f], left.reshape(1, 1, BM, 1, BN // 2))
                act.store([r0, r1, r2, 0, f + BN // 2], right.reshape(1, 1, BM, 1, BN // 2))


@remembered
@triton.jit(do_not_specialize_on_alignment=VIEWS)
def down_kernel(
    a, w, y, tile_expert, tile_row, n_tiles, offsets, N, depth, n_programs,
    K_FIRST: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = a @ w: w is [E, N, depth] where K_FIRST (the down-projection), else [E, depth, N] (the gradient of x)."""
    num_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.load(n_tiles) * num_n, n_programs, flatten=True):
        e = tl.load(tile_expert + tile // num_n)
        pn, row, first, size = walk(tile, e, num_n, tile_row, offsets, BM, GROUP_M)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, depth, BK):
            a_tile = a.load([row, k])
            if K_FIRST:
                acc = tl.dot(a_tile, w.load([e, pn * BN, k]).reshape(BN, BK).T, acc)
            else:
                acc = tl.dot(a_tile, w.load([e, k, pn * BN]).reshape(BK, BN), acc)
        r0, r1, r2 = _ragged(first, size, row - first)
        if SPLIT == 1:
            y.store([r0, r1, r2, pn * BN], acc.to(y.dtype).reshape(1, 1, BM, BN))
        else:
            # In halves, which need half the shared memory on their way out.
            left, right = tl.split(acc.reshape(BM, 2, BN // 2).permute(0, 2, 1))
            y.store([r0, r1, r2, pn * BN], left.to(y.dtype).reshape(1, 1, BM, BN // 2))
            y.store([r0, r1, r2, pn * BN + BN // 2], right.to(y.dtype).reshape(1, 1, BM, BN // 2))


@triton.jit
def _down_backward_epilogue(
    da, h, dh, act, r0, r1, r2, weight, f, G: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """As in triton_pointer.py. Rows past the expert's end and columns past F read as zeros, and are not stored."""
    if SPLIT > 1:
        BH: tl.constexpr = BN // 2
        HALF: tl.constexpr = SPLIT // 2
        left, right = tl.split(da.reshape(BM, 2, BH).permute(0, 2, 1))
        part = _down_backward_epilogue(left, h, dh, act, r0, r1, r2, weight, f, G, ACT, HALF, BM, BH)
        part += _down_backward_epilogue(right, h, dh, act, r0, r1, r2, weight, f + BH, G, ACT, HALF, BM, BH)
    else:
        # Gate and up in one load: each waits for the memory.
        if G == 2:
            gate, up = tl.split(h.load([r0, r1, r2, 0, f]).reshape(BM, 2, BN).permute(0, 2, 1))
        else:
            gate = h.load([r0, r1, r2, 0, f]).reshape(BM, BN)
            up = gate
        y, dgate, dup = activate_backward(gate.to(tl.float32), up.to(tl.float32), ACT)
        part = tl.sum(da * y, axis=1)
        act.store([r0, r1, r2, 0, f], (weight[:, None] * y).to(act.dtype).reshape(1, 1, BM, 1, BN))
        da = da * weight[:, None]
        dh.store([r0, r1, r2, 0, f], (da * dgate).to(dh.dtype).reshape(1, 1, BM, 1, BN))
        if G == 2:
            dh.store([r0, r1, r2, 1, f], (da * dup).to(dh.dtype).reshape(1, 1, BM, 1, BN))
    return part


@remembered
@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=VIEWS)
def down_backward_kernel(
    dy, w, h, weights, dh, act, dweights, order, tile_expert, tile_row, n_tiles, offsets, R, D, F, n_programs,
    G: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As in triton_pointer.py, with dy already in the order of the rows."""
    num_n = tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), tl.load(n_tiles) * num_n, n_programs, flatten=True):
        e = tl.load(tile_expert + tile // num_n)
        pn, row, first, size = walk(tile, e, num_n, tile_row, offsets, BM, GROUP_M)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, D, BK):
            acc = tl.dot(dy.load([row, k]), w.load([e, k, pn * BN]).reshape(BK, BN), acc)
        rows = row + tl.arange(0, BM)
        live = rows < first + size
        flat = tl.load(order + rows, mask=live, other=0)
        weight = tl.load(weights + flat, mask=live, other=0.0).to(tl.float32)
        r0, r1, r2 = _ragged(first, size, row - first)
        part = _down_backward_epilogue(acc, h, dh, act, r0, r1, r2, weight, pn * BN, G, ACT, SPLIT, BM, BN)
        flat = tl.load(order + rows, mask=live, other=0)  # again: no register is free to keep it
        tl.store(dweights + pn.to(tl.int64) * R + flat, part, mask=live)


@remembered
@triton.jit(do_not_specialize_on_alignment=VIEWS)
def weight_gradient_kernel(
    a, b, dw, offsets, N, C, n_programs,
    E: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dw[e] = a.T @ b over the rows of expert e; a ragged load gives zeros past them.

    One loop over all steps of all tiles of a program; the compiler flattens none whose inner bounds are loaded. An
    expert without rows takes one step, of zeros.
    """
    num_n = tl.cdiv(N, BN)
    num_c = tl.cdiv(C, BC)
    per_expert = num_n * num_c
    program = tl.program_id(0)
    i = tl.arange(0, P)
    size_i = tl.load(offsets + i + 1, mask=i < E, other=0) - tl.load(offsets + i, mask=i < E, other=0)
    # Of the first n tiles, cdiv(n - program, n_programs) are this program's; n = i * per_expert before expert i.
    before_i = (i * per_expert + n_programs - 1 - program) // n_programs
    until_i = ((i + 1) * per_expert + n_programs - 1 - program) // n_programs
    steps_i = (until_i - before_i) * tl.maximum(tl.cdiv(size_i, BR), 1)
    tile = program - n_programs
    left = 0  # steps of the tile still to do
    row = 0
    e = 0
    pn = 0
    pc = 0
    first = 0
    size = 0
    acc = tl.zeros((BN, BC), dtype=tl.float32)
    for _ in range(0, tl.sum(tl.where(i < E, steps_i, 0))):
        row += BR
        if left == 0:
            tile += n_programs
            e = tile // per_expert
            pn, pc = swizzle(tile % per_expert, num_n, num_c, GROUP_M)
            first = tl.load(offsets + e)
            size = tl.load(offsets + e + 1) - first
            left = tl.maximum(tl.cdiv(size, BR), 1)
            row = 0
        left -= 1
        r0, r1, r2 = _ragged(first, size, row)
        a_tile = a.load([r0, r1, r2, pn * BN]).reshape(BR, BN)
        b_tile = b.load([r0, r1, r2, pc * BC]).reshape(BR, BC)
        acc = tl.dot(a_tile.T, b_tile, acc)
        if left == 0:
            if SPLIT == 1:
                dw.store([e, pn * BN, pc * BC], acc.to(dw.dtype).reshape(1, BN, BC))
            else:
                one, two = tl.split(acc.reshape(BN, 2, BC // 2).permute(0, 2, 1))
                dw.store([e, pn * BN, pc * BC], one.to(dw.dtype).reshape(1, BN, BC // 2))
                dw.store([e, pn * BN, pc * BC + BC // 2], two.to(dw.dtype).reshape(1, BN, BC // 2))
            acc = tl.zeros((BN, BC), dtype=tl.float32)


# ------------------------------------------------------------------------------------------------------- the launches


def fits(x_TD: Tensor, experts: Experts) -> bool:
    """Whether TMA can read the operands: all 16-bit, no biases, contiguous weights, rows of multiples of 16 bytes."""
    w_in, w_out = experts.w_in_EGFD, experts.w_out_EDF
    return (
        x_TD.dtype in (torch.bfloat16, torch.float16)
        and w_in.dtype == x_TD.dtype
        and experts.b_in_EGF is None
        and experts.b_out_ED is None
        and w_in.is_contiguous()
        and w_out.is_contiguous()
        and w_out.shape[1] % 8 == w_out.shape[2] % 8 == 0 < x_TD.shape[0]
        and (w_in.data_ptr() | w_out.data_ptr()) % 16 == 0
    )


def rows(x_TD: Tensor, routes: Routes, top_k: int) -> Tensor:
    """A copy of the tokens in the order of the rows, [R, D]: TMA on Hopper cannot gather."""
    return gather(x_TD, routes, top_k)


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
    w, (_, G, F, D), R, tile = experts.w_in_EGFD, experts.w_in_EGFD.shape, len(x_RD), sizes.up
    BH = tile.columns // G
    h_RJ, act_RF = x_RD.new_empty(R if store_h else 0, G * F), x_RD.new_empty(R if store_act else 0, F)
    n = tiles.programs(x_RD.device)
    up_kernel[(n,)](
        _box(x_RD, sizes.rows, tile.depth), _box(w, 1, G, BH, tile.depth),
        create_ragged_descriptor(h_RJ.view(R, G, F), [sizes.rows, 1, tile.columns // 2]) if store_h else None,
        create_ragged_descriptor(act_RF.view(R, 1, F), [sizes.rows, 1, tile.columns // 2]) if store_act else None,
        routes.tile_expert_M, routes.tile_row_M, routes.n_tiles, routes.offsets, D, F, n,
        G=G, ACT=ACTIVATION_CODES[activation], STORE_H=store_h, STORE_ACT=store_act,
        BM=sizes.rows, BN=tile.columns, BK=tile.depth, GROUP_M=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h_RJ, act_RF


def down(act_RF: Tensor, experts: Experts, routes: Routes, sizes: Tiles) -> Tensor:
    """As in triton_pointer.py."""
    return _rows_by_weights(act_RF, experts.w_out_EDF, routes, sizes, sizes.down, k_first=True)


def dx(dh_RJ: Tensor, experts: Experts, routes: Routes, sizes: Tiles) -> Tensor:
    """As in triton_pointer.py."""
    return _rows_by_weights(dh_RJ, experts.w_in_EGFD.flatten(1, 2), routes, sizes, sizes.dx, k_first=False)


def _rows_by_weights(a: Tensor, w: Tensor, routes: Routes, sizes: Tiles, tile: tiles.Tile, k_first: bool) -> Tensor:
    R, depth = a.shape
    N = w.shape[1] if k_first else w.shape[2]
    y_RN, n = a.new_empty(R, N), tiles.programs(a.device)
    box = (tile.columns, tile.depth) if k_first else (tile.depth, tile.columns)
    down_kernel[(n,)](
        _box(a, sizes.rows, tile.depth), _box(w, 1, *box),
        create_ragged_descriptor(y_RN, [sizes.rows, tile.columns // tile.split]),
        routes.tile_expert_M, routes.tile_row_M, routes.n_tiles, routes.offsets, N, depth, n,
        K_FIRST=k_first, SPLIT=tile.split,
        BM=sizes.rows, BN=tile.columns, BK=tile.depth, GROUP_M=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_RN


def down_backward(
    dy_RD: Tensor,
    experts: Experts,
    weights_TK: Tensor,
    h_RJ: Tensor,
    routes: Routes,
    activation: str,
    sizes: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in triton_pointer.py."""
    w, (_, D, F), R, tile = experts.w_out_EDF, experts.w_out_EDF.shape, len(dy_RD), sizes.down_backward
    G, n = experts.w_in_EGFD.shape[1], tiles.programs(dy_RD.device)
    dh_RJ, act_RF = torch.empty_like(h_RJ), h_RJ.new_empty(R, F)
    parts_NR = h_RJ.new_empty(cdiv(F, tile.columns), R, dtype=torch.float32)
    columns = tile.columns // tile.split
    piece = [sizes.rows, 1, columns]
    down_backward_kernel[(n,)](
        _box(dy_RD, sizes.rows, tile.depth), _box(w, 1, tile.depth, tile.columns),
        create_ragged_descriptor(h_RJ.view(R, G, F), [sizes.rows, G, columns]), weights_TK,
        create_ragged_descriptor(dh_RJ.view(R, G, F), piece), create_ragged_descriptor(act_RF.view(R, 1, F), piece),
        parts_NR, routes.order_R, routes.tile_expert_M, routes.tile_row_M,
        routes.n_tiles, routes.offsets, R, D, F, n,
        G=G, ACT=ACTIVATION_CODES[activation], SPLIT=tile.split,
        BM=sizes.rows, BN=tile.columns, BK=tile.depth, GROUP_M=tile.group,
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
    """As in triton_pointer.py; here both are in the order of the rows, never in pairs, and of 16 bits."""
    N, C, tile = a.shape[1], b.shape[1], sizes.dw
    dw, n = a.new_empty(n_experts, N, C), tiles.programs(a.device)
    weight_gradient_kernel[(n,)](
        create_ragged_descriptor(a, [tile.depth, tile.rows]), create_ragged_descriptor(b, [tile.depth, tile.columns]),
        _box(dw, 1, tile.rows, tile.columns // tile.split), routes.offsets, N, C, n,
        E=n_experts, P=triton.next_power_of_2(n_experts), SPLIT=tile.split,
        BN=tile.rows, BC=tile.columns, BR=tile.depth, GROUP_M=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dw


def _box(t: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))
