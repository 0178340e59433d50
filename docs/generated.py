"""Fills the parts of README and docs that the program knows better than a writer: keys, shapes, predictions.

Such a part stands between the lines `<!-- NAME: docs/generated.py -->` and `<!-- end -->`; a function here makes it.
Run: python docs/generated.py. A test holds every page equal to what this writes.
"""

import re
from collections import Counter
from pathlib import Path

from moe import plan
from moe.cli.configs import si
from moe.config import Config, load_config, shipped
from moe.io.keys import sections
from moe.kernels import cards, tiles
from moe.plan.claims import check_claims

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (\w+): docs/generated\.py -->\n).*?(^<!-- end -->$)", re.MULTILINE | re.DOTALL)
SHAPES = ("gpt4-8k", "gpt4-32k", "gpt4-8k-gelu", "replica-1b", "replica-small", "replica-nano", "replica-tiny")


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with each of its blocks as it should be now."""
    makers = {"keys": keys, "shapes": shapes, "recipe": recipe, "verdicts": verdicts, "cards": gpus}
    return BLOCK.sub(lambda found: f"{found[1]}\n{makers[found[2]]()}\n\n{found[3]}", text)


# -------------------------------------------------------------------------------------------------------------- keys


def keys() -> str:
    """A table of every key of a configuration for each section: type, default, meaning."""
    parts = []
    for section in sections(Config):
        title = f"`[{section.name}]`" if section.name else "The model"
        rows = [(f"`{k.name}`", _choices(k.type), _code(k.default), k.meaning) for k in section.keys]
        parts.append(f"## {title}\n\n{section.about}\n\n{_table(('key', 'type', 'default', 'meaning'), rows)}")
    return "\n\n".join(parts)


def _choices(kind: str) -> str:
    return re.sub(r'"\w+"', r"`\g<0>`", kind)


def _code(default: str) -> str:
    return default if default.startswith("has ") else f"`{default}`"


# ------------------------------------------------------------------------------------------------------- the planner


def shapes() -> str:
    """The shipped models: shape, parameters, FLOP."""
    head = (
        "configuration", "width x layers", "query heads x width", "experts, top-k, d_ff", "vocabulary", "context",
        "parameters", "used per token", "forward per token",
    )  # fmt: skip
    assert set(SHAPES) <= set(shipped())
    return _table(head, [_shape(load_config(name)) for name in SHAPES])


def _shape(cfg: Config) -> tuple[str, ...]:
    counts = plan.params(cfg)
    a, e = cfg.attention, cfg.experts
    active = counts.active["output"]
    gelu = " GELU" if e.activation == "gelu" else ""
    return (
        f"`{cfg.name}`",
        f"{cfg.d_model:,} x {cfg.n_layers}",
        f"{a.n_heads} x {a.head_dim}",
        f"{e.n_experts}, {e.top_k}, {e.d_ff:,}{gelu}",
        f"{cfg.vocab_size:,}",
        f"{cfg.max_seq_len:,}",
        si(counts.total),
        si(active),
        f"{si(2 * active, ' ')}FLOP",
    )


def recipe() -> str:
    """Hours, dollars and MFU of replica-1b-web, as `moe plan train --floor` predicts them."""
    rows = []
    for dp, hardware in ((8, "h100-sxm"), (8, "a100-80"), (1, "h100-sxm")):
        layout = plan.load_layout("node-8").replace(dp=dp)
        run = plan.predict_small_run(load_config("replica-1b-web"), layout, plan.load_hardware(hardware))
        cells = [f"{dp} x {hardware}"]
        for key, unit, digits in (("hours", "h", 2), ("cost", "USD", 0), ("mfu", "%", 0)):
            low, high = (f"{run[f'run.{end}.{key}'].to(unit):.{digits}f}" for end in ("floor", "slow"))
            cells.append(f"{low} to {high}{'%' * (unit == '%')}")
        rows.append(tuple(cells))
    return _table(("predicted, not run", "hours", "dollars", "MFU"), rows)


def verdicts() -> str:
    """How the article's figures fare, as `moe plan check` says."""
    counts = Counter(v.verdict for v in check_claims())
    meaning = {
        "REPRODUCED": "what the planner computes is inside the claim's range",
        "WITH-ASSUMPTION": "the same, with something assumed that nobody states",
        "CONFLICT": "its other figures, or arithmetic, say otherwise",
        "UNIT-ERROR": "the right figure in a wrong unit: TFLOPS for GFLOP per token, cents for dollars",
        "UNDERDETERMINED": "hangs on what nobody knows",
        "EXTERNAL": "a fact that no model can check",
    }
    rows = [(verdict, str(counts[verdict]), said) for verdict, said in meaning.items()]
    return _table(("verdict", "claims", "meaning"), [*rows, ("all", str(counts.total()), "")])


# ------------------------------------------------------------------------------------------------------- the kernels


def gpus() -> str:
    """What each kind of GPU gets of the Triton kernels: path, tiles of the first product, and why."""
    head = (
        "GPU", "target", "shared memory a block", "many rows, contiguous 16-bit weights", "other 16-bit weights",
        "float32", "why",
    )  # fmt: skip
    return _table(head, [_gpu(card) for card in cards.CARDS.values()])


def _gpu(card: cards.Card) -> tuple[str, ...]:
    about = card.name, card.arch, f"{card.shared:,} B"
    if reason := cards.refusal(card):
        return *about, "reference", "reference", "reference", reason
    (_, first), (_, other) = (tiles.shipped(card, "many", tma) for tma in (True, False))
    if first.tma:
        why = "TMA, and tensor cores that read shared memory"
    elif card.capability is None:
        why = "no TMA"
    else:
        why = "TMA, but no tensor cores that read shared memory" if card.capability >= (9, 0) else "no TMA"
    return *about, *(_tiles(t) for t in (first, other, tiles.FLOAT32["many"])), why


def _tiles(sizes: tiles.Tiles) -> str:
    up = sizes.up
    return f"{'TMA' if sizes.tma else 'pointers'}: {sizes.rows} x {up.columns} x {up.depth}, {up.stages} stages"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    """Writes every page again that is not as it should be."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (now := filled(text)) != text:
            page.write_text(now, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
