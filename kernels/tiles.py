"""Tile sizes of the Triton kernels: an explicit table by GPU architecture and shape class. Nothing is tuned silently.

`moe.kernels.tune` measures other choices on a machine and writes the better ones to a file that `choose` reads first.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moe.kernels import cards
from moe.kernels.cards import CARDS, Card

HAS_TRITON = importlib.util.find_spec("triton") is not None
# On CPU tensors the kernels run only in Triton's interpreter, which has to be chosen before they are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and HAS_TRITON:
    from moe.kernels import interpreter  # noqa: F401
# The products of triton_gluon.py where they can stand in for triton_tma.py's: off until a GPU has shown their gain.
GLUON = os.environ.get("GPT4_MOE_GLUON") == "1"


def why_not_triton(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take a tensor; None where they can."""
    if not HAS_TRITON:
        return "the triton package is not installed"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it needs bfloat16, float16 or float32, not {x.dtype}"
    if x.device.type == "cpu" and not INTERPRETED:
        return "it runs on CUDA; on a CPU only in the interpreter, with TRITON_INTERPRET=1 set before the import"
    if x.device.type not in ("cpu", "cuda"):
        return f"it does not run on {x.device.type}"
    return cards.why_not(x.device) if x.device.type == "cuda" and not INTERPRETED else None


@dataclass(frozen=True)
class Tile:
    """One product: BN output columns and BK of the summed dimension at a time.

    For a weight gradient, whose output has no row tiles, `rows` is the other side of its output tile.
    """

    columns: int
    depth: int
    warps: int = 8
    stages: int = 3
    group: int = 8  # row tiles that walk the columns together
    split: int = 1  # pieces in which the epilogue takes the tile
    rows: int = 0


@dataclass(frozen=True)
class Tiles:
    """The products of one forward and backward; all but the weight gradients share the tiles of `rows` rows."""

    rows: int
    up: Tile
    down: Tile
    down_backward: Tile
    dx: Tile
    dw: Tile
    tma: bool = False  # the products of triton_tma.py, where the operands allow it


@dataclass(frozen=True)
class PagedTile:
    """Attention over a paged cache: rows of one key head, positions at a time, and positions of one program."""

    rows: int
    positions: int
    split: int
    warps: int
    stages: int


PRODUCTS = ("up", "down", "down_backward", "dx", "dw")

_TINY = Tile(32, 32, warps=4, stages=2, group=2)
_SM80 = {
    "few": Tiles(
        16,
        up=Tile(64, 128, 4, 4),
        down=Tile(64, 128, 4, 4),
        down_backward=Tile(32, 64, 4, 3),
        dx=Tile(64, 64, 4, 4),
        dw=Tile(128, 16, 4, 3, rows=64),
    ),
    "some": Tiles(
        64,
        up=Tile(128, 64, 4, 3),
        down=Tile(128, 64, 4, 3),
        down_backward=Tile(64, 64, 8, 3),
        dx=Tile(128, 64, 4, 3),
        dw=Tile(128, 32, 8, 7, rows=128),
    ),
    "many": Tiles(
        128,
        up=Tile(128, 32, 4, 4, group=16),
        down=Tile(128, 32, 4, 4, group=16),
        down_backward=Tile(128, 32, 4, 4, group=16, split=8),
        dx=Tile(128, 32, 4, 4, group=16),
        dw=Tile(128, 32, 4, 7, group=16, rows=128),
    ),
}
_WIDE = Tiles(
    128,
    up=Tile(128, 64, 8, 3, group=16),
    down=Tile(128, 64, 8, 3, group=16),
    down_backward=Tile(64, 64, 8, 3, group=16, split=4),
    dx=Tile(128, 64, 8, 3, group=16),
    dw=Tile(128, 64, 8, 5, group=16, rows=128),
)
_SM90 = {**_SM80, "many": _WIDE}
# The pipeline of AMD's compiler gives a weight gradient more steps in shared memory, of which gfx942 has 65,536 B.
_GFX942 = {
    size: replace(sizes, dw=replace(sizes.dw, depth=min(32, sizes.dw.depth), stages=min(4, sizes.dw.stages)))
    for size, sizes in _SM90.items()
}
# float32 operands take twice the shared memory and run on other units: half the depth.
FLOAT32 = {
    "few": Tiles(16, *[Tile(32, 64, 4, 2)] * 4, dw=Tile(64, 16, 4, 2, rows=32)),
    "some": Tiles(32, *[Tile(64, 32, 4, 2)] * 4, dw=Tile(64, 32, 4, 2, rows=64)),
    "many": Tiles(
        64,
        up=Tile(64, 32, 4, 2),
        down=Tile(64, 32, 4, 2),
        down_backward=Tile(64, 32, 8, 2),
        dx=Tile(64, 32, 4, 2),
        dw=Tile(64, 32, 4, 2, rows=64),
    ),
}
_SM90_TMA = {
    "many": Tiles(
        128,
        up=Tile(256, 64, 8, 4, group=16),
        down=Tile(256, 64, 8, 4, group=16, split=2),
        down_backward=Tile(256, 64, 8, 4, group=16, split=8),
        dx=Tile(256, 64, 8, 4, group=16, split=2),
        dw=Tile(256, 64, 8, 4, group=16, split=2, rows=128),
        tma=True,
    ),
}
# There the accumulator leaves the tensor cores' own memory: half of it at a time has room in the registers.
_SM100_TMA = {
    "many": replace(_SM90_TMA["many"], down_backward=Tile(128, 64, 8, 4, group=16, split=8)),
}
TABLE: dict[str, dict[str, Tiles]] = {
    "sm_80": _SM80,
    "sm_86": _SM80,
    "sm_90": _SM90,
    "sm_90 tma": _SM90_TMA,
    "sm_100 tma": _SM100_TMA,
    "gfx942": _GFX942,
}
# Of triton_few.py, by the rows of a tile: 1 without tensor cores, 16 and 32 for few tokens, 64 where the rows must not
# depend on their number. Every product is a stream of weights, 16 kB a step; the steps in flight hide the memory's
# latency. Of 64 rows and 2-byte weights an H200 computes 64 operations a byte, and could do 200.
FEW = {1: Tile(8, 1024, 4, 2), 16: Tile(64, 128, 4, 4), 32: Tile(64, 128, 4, 3), 64: Tile(128, 64, 4, 3)}
FEW_FLOAT32 = {1: Tile(8, 512, 4, 2), 16: Tile(32, 64, 4, 4), 32: Tile(32, 64, 4, 4)}
_INTERPRETER = Tiles(16, *[_TINY] * 4, dw=Tile(32, 16, warps=4, stages=2, group=2, rows=32))
_TINY_FEW = Tile(32, 16, warps=4, stages=2, group=2)
_INTERPRETER_TMA = Tiles(
    16,
    up=_TINY,
    down=replace(_TINY, split=2),
    down_backward=replace(_TINY, split=4),
    dx=replace(_TINY, split=2),
    dw=Tile(32, 16, warps=4, stages=2, group=2, split=2, rows=32),
    tma=True,
)


def shape_class(n_rows: int, n_experts: int) -> str:
    """ "few" rows per expert, up to 16; "some", up to 64; or "many"."""
    per_expert = n_rows / n_experts
    return "few" if per_expert <= 16 else "some" if per_expert <= 64 else "many"


def rows(card: Card, tma: bool) -> Iterator[str]:
    """The rows of the table that a card can take, the fastest first.

    By what it has, not by its name: a card that is not in CARDS, sm_103 or sm_121, gets what its like get.

    Args:
        tma: whether TMA can read the operands.
    """
    if card.capability is None:
        yield "gfx942"
        return
    # Large tiles want tensor cores that read shared memory: wgmma of sm_90, tcgen05 of sm_100. RTX 50 has TMA, but
    # neither, and shared memory for less than half such a tile.
    if tma and card.capability[0] in (9, 10) and card.shared >= CARDS["sm_90"].shared:
        yield f"sm_{card.capability[0]}0 tma"
    if card.shared < CARDS["sm_80"].shared:
        yield "sm_86"
    else:
        yield "sm_90" if card.capability >= (9, 0) else "sm_80"


@cache  # of a table that does not change; what `tune` writes is not in it
def shipped(card: Card, size: str, tma: bool) -> tuple[str, Tiles]:
    """The key, row and shape class, and the tiles of the table for a card; arguments as of `rows`."""
    row = next(row for row in rows(card, tma) if size in TABLE[row])
    return f"{row} {size}", TABLE[row][size]


def choose(device: torch.device, dtype: torch.dtype, n_rows: int, n_experts: int, tma: bool) -> Tiles:
    """The tiles for R routed rows. A machine's own file (see `tune`) counts before the table.

    Args:
        tma: whether TMA can read the operands.
    """
    if INTERPRETED:
        return _INTERPRETER_TMA if tma else _INTERPRETER
    size = shape_class(n_rows, n_experts)
    if dtype == torch.float32:
        return FLOAT32[size]
    card = cards.card(device)
    key, found = shipped(card, size, tma)
    return tuned(card).get(key, found)


def few_rows(dtype: torch.dtype, n_tokens: int, batch_invariant: bool) -> int:
    """The rows of a tile of triton_few.py: one number for any number of tokens where results must not depend on it."""
    if batch_invariant:
        return 16 if dtype == torch.float32 else 64  # float32 has no tensor cores to spare for empty rows
    return 1 if n_tokens == 1 else 16 if n_tokens <= 16 else 32


def choose_few(dtype: torch.dtype, n_rows: int) -> Tile:
    """The tile of triton_few.py for that many rows, the same for both products and every number of tokens."""
    return _TINY_FEW if INTERPRETED else (FEW_FLOAT32 if dtype == torch.float32 else FEW)[n_rows]


def choose_paged(device: torch.device, dtype: torch.dtype, kept: torch.dtype, n_shared: int, width: int) -> PagedTile:
    """The tile of triton_paged.py for `n_shared` query heads of each key head, all of that width.

    As many rows as fill tiles to within an eighth of what sixteens would, at most 64. Splits whose parts, 8 bytes
    written and read, are a sixth of the bytes of keys and values at most, where a number of those has two bytes.

    Args:
        kept: the type of keys and values: those of eight bits pass through the registers, as all of float32 do, and
            fewer of them at a time.
    """
    if INTERPRETED:
        return PagedTile(rows=16, positions=16, split=32, warps=4, stages=2)
    card, wide = cards.card(device), dtype == torch.float32
    few = wide or width > 128
    fits = [n for n in (16, 32, 64) if -(-n_shared // n) * n <= 9 / 8 * -(-n_shared // 16) * 16]
    rows = 16 if few else fits[-1]
    # But on Hopper 64 rows leave few registers for keys and values: more positions spill, of eight bits the more so.
    crowded = rows == 64 and not (card.capability and card.capability[0] == 9)
    narrow = few or crowded or kept != dtype or card.shared < CARDS["sm_80"].shared
    split = max(512, 1 << (12 * n_shared - 1).bit_length())
    least = wide or (crowded and kept != dtype)
    return PagedTile(rows, 16 if least else 32 if narrow else 64, split, warps=4, stages=2)


def programs(device: torch.device) -> int:
    """How many persistent programs a device runs at once: one per multiprocessor."""
    return 3 if INTERPRETED else cards.card(device).multiprocessors


def tuned_path(card: Card) -> Path:
    """Where `tune` writes for a GPU: GPT4_MOE_TILES, or a file of its own in the user's cache folder."""
    if given := os.environ.get("GPT4_MOE_TILES"):
        return Path(given)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "gpt4-moe" / f"tiles-{card.name.replace(' ', '-')}.json"


@cache
def tuned(card: Card) -> dict[str, Tiles]:
    """The tuned tiles of a GPU of this machine by row and shape class; empty where `tune` never ran."""
    path = tuned_path(card)
    return load(path, card) if path.exists() else {}


def load(path: Path, card: Card) -> dict[str, Tiles]:
    """Read a file of `save`.

    Raises:
        ValueError: it is not such a file, or its tiles are for another kind of GPU; the message names both.
    """
    try:
        record = json.loads(path.read_text())
        theirs = Card(**record["card"])
        table = {
            size: Tiles(**{**values, **{name: Tile(**values[name]) for name in PRODUCTS}})
            for size, values in record["tiles"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of tile sizes ({error!r}); delete it, or run moe.kernels.tune") from error
    if theirs.arch != card.arch or theirs.shared > card.shared:
        raise ValueError(
            f"{path}: tile sizes of {theirs.name} ({theirs.arch}, {theirs.shared:,} B of shared memory a block), and "
            f"this is {card.name} ({card.arch}, {card.shared:,} B); unset GPT4_MOE_TILES, or run moe.kernels.tune here"
        )
    return table


def save(path: Path, card: Card, table: dict[str, Tiles]) -> None:
    """Write the tuned tiles of a GPU, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"card": card._asdict(), "tiles": {size: asdict(tiles) for size, tiles in table.items()}}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


assert {f.name for f in fields(Tiles)} == {"rows", "tma", *PRODUCTS}
