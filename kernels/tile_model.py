"""What a tile takes, and about how long one lasts beside another, by arithmetic: to choose which are worth compiling.

The clocks order candidates of one product and say no more: caches, clocks and schedulers are not in them.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from moe.kernels.cards import Card
from moe.kernels.tiles import Tile

LATENCY = 700  # clocks from the request of a line of memory to its use, as microbenchmarks find it on A100 and H100
L2_BYTES = 32  # that a multiprocessor gets a clock from the L2 cache: half the 64 of NVIDIA's white papers
DRAM_BYTES = 14  # its share of what the memory gives: 3.35 TB/s of 132 at 1.8 GHz, 2.0 of 108 at 1.4
STEP = 40  # clocks in which a block only waits for its warps, at every step
# Dense 16-bit FLOP of one multiprocessor in a clock; of a card that is not here, what the smallest have.
FLOP = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192, "gfx942": 2048, "gfx950": 4096}
REGISTERS = 65_536  # of a multiprocessor


class Shape(NamedTuple):
    """An expert MLP, and how many tokens it is to be fast for."""

    d_model: int
    d_ff: int
    experts: int
    top_k: int
    tokens: int
    gates: int = 2


class Product(NamedTuple):
    """`experts` products [M, K] x [K, N]."""

    name: str  # of tiles.PRODUCTS
    experts: int
    M: int
    N: int
    K: int
    gates: int


def product(name: str, shape: Shape) -> Product:
    """One of tiles.PRODUCTS at a shape whose tokens go to all experts alike; "dw" is the gradient of w_in."""
    D, F, J = shape.d_model, shape.d_ff, shape.gates * shape.d_ff
    rows = -(-shape.tokens * shape.top_k // shape.experts)
    sides = {"up": (rows, J, D), "down": (rows, D, F), "down_backward": (rows, F, D), "dx": (rows, D, J)}
    return Product(name, shape.experts, *sides.get(name, (J, D, rows)), shape.gates)


def shared_bytes(
    card: Card, product: str, tile: Tile, rows: int, tma: bool, itemsize: int = 2, tensor_cores: bool = True
) -> int:
    """Shared memory of a block in bytes; the compiler's own is within MARGIN of it, and SCRATCH (test_ahead.py).

    Operands have a place for each step on its way; through TMA also the step that is multiplied, and what leaves, which
    then stays beside the operands of the next tile.

    Args:
        product: of tiles.PRODUCTS.
        rows: the tile's rows, `Tiles.rows`; of "dw" the tile has its own.
        tensor_cores: whether they multiply, and not the plain units, as float32 is exactly.
    """
    rows = tile.rows if product == "dw" else rows
    step = (rows + tile.columns) * tile.depth * itemsize
    if not tma:
        steps = tile.stages - 1
        if product == "dw":  # which reads the rows' places first: NVIDIA's pipeline gives that every other stage
            steps = steps - 1 if card.capability is None else steps // 2
        # Tensor cores that read shared memory (sm_90, sm_100), if a tile has the 64 rows that they take, still read one
        # step when the next is to be loaded; from Triton 3.9 on gfx950 copies past the registers: one more for either.
        reads_on = card.capability is not None and card.capability[0] in (9, 10) and tensor_cores and rows >= 64
        return step * (max(1, steps) + (reads_on or card.arch == "gfx950"))
    # Of `up` gate and up leave one after the other; of down_backward both come in, and a piece is on its way out.
    out = rows * tile.columns * itemsize // (2 if product == "up" else tile.split)
    return step * tile.stages + out * (3 if product == "down_backward" else 1)


MARGIN, SCRATCH = 0.05, 2048


def accumulator(tile: Tile, rows: int) -> int:
    """Registers of a thread that hold the accumulator."""
    return rows * tile.columns // (32 * tile.warps)


def blocks(card: Card, tile: Tile, rows: int, shared: int, tma: bool) -> int:
    """Blocks that a multiprocessor runs at once; of persistent programs there is one."""
    if tma:
        return 1
    registers = 32 * tile.warps * min(255, accumulator(tile, rows) + 64)
    return max(1, min(card.shared // max(shared, 1), REGISTERS // registers, 2048 // (32 * tile.warps)))


def waves(card: Card, product: Product, tile: Tile, rows: int, n_blocks: int) -> float:
    """Tiles of all experts over the places for them."""
    tiles = product.experts * -(-product.M // rows) * -(-product.N // tile.columns)
    return tiles / (card.multiprocessors * n_blocks)


def clocks(card: Card, product: Product, tile: Tile, rows: int, tma: bool) -> float:
    """About how long a product takes: whole waves of tiles, each as long as its multiplications or its loads."""
    rows = tile.rows if product.name == "dw" else rows
    n_blocks = blocks(card, tile, rows, shared_bytes(card, product.name, tile, rows, tma), tma)
    math = 2 * rows * tile.columns * tile.depth / FLOP.get(card.arch, 1024)
    # Operands come from the L2 cache if other tiles read them too; weights that one tile of rows reads, from memory.
    a, b = 2 * rows * tile.depth / L2_BYTES, 2 * tile.columns * tile.depth / L2_BYTES
    if rows >= product.M:
        b *= L2_BYTES / DRAM_BYTES
    step = max(n_blocks * math, n_blocks * (a + b), LATENCY / max(1, tile.stages - 1)) + STEP
    out = n_blocks * 2 * rows * tile.columns / L2_BYTES
    return -(-waves(card, product, tile, rows, n_blocks) // 1) * (-(-product.K // tile.depth) * step + LATENCY + out)


def candidates(card: Card, product: Product, tile: Tile, rows: int, tma: bool, most: int = 12) -> Iterator[Tile]:
    """The tiles that may be faster than `tile`: the `most` best of those that fit, and its own in other groups.

    Their epilogues take pieces as wide as its own. Of tiles that differ in their stages alone, it is the best, or the
    one with the most.
    """
    most_pieces = 8 if product.name == "down_backward" else 2 if tma and product.name != "up" else 1

    def slow(t: Tile) -> tuple[float, int]:
        return clocks(card, product, t, rows, tma), -t.stages

    found = []
    for columns, depth, warps in itertools.product((32, 64, 128, 256), (16, 32, 64, 128), (4, 8)):
        split = max(1, min(most_pieces, tile.split * columns // tile.columns))
        alike = [replace(tile, columns=columns, depth=depth, warps=warps, stages=n, split=split) for n in range(2, 8)]
        found += sorted((t for t in alike if t != tile and fits(card, product, t, rows, tma)), key=slow)[:1]
    yield from sorted(found, key=slow)[:most]
    yield from (replace(tile, group=group) for group in (4, 8, 16) if group != tile.group)


def fits(card: Card, product: Product, tile: Tile, rows: int, tma: bool) -> bool:
    """Whether a tile has room in a block's shared memory and a thread's registers, and is no wider than its product."""
    rows = tile.rows if product.name == "dw" else rows
    shared = shared_bytes(card, product.name, tile, rows, tma)
    return (
        shared <= card.shared
        and 4 <= accumulator(tile, rows) <= 128
        and tile.columns < 2 * product.N
        and tile.depth < 2 * product.K
    )
