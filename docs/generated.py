"""Fills the parts of README and docs that the program knows better than a writer: keys, shapes, predictions.

Such a part stands between the lines `<!-- NAME: docs/generated.py -->` and `<!-- end -->`; a function here makes it.
Run: python docs/generated.py. A test holds every page equal to what this writes.
"""

import ast
import dataclasses
import re
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe.config
from moe import plan
from moe.config import Config, load_config, shipped
from moe.io.toml import section_of, toml_value
from moe.plan.claims import check_claims

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (\w+): docs/generated\.py -->\n).*?(^<!-- end -->$)", re.MULTILINE | re.DOTALL)
SHAPES = ("gpt4-8k", "gpt4-32k", "gpt4-8k-gelu", "replica-1b", "replica-small", "replica-nano", "replica-tiny")


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with each of its blocks as it should be now."""
    makers = {"keys": keys, "shapes": shapes, "recipe": recipe, "verdicts": verdicts}
    return BLOCK.sub(lambda found: f"{found[1]}\n{makers[found[2]]()}\n\n{found[3]}", text)


# -------------------------------------------------------------------------------------------------------------- keys


def keys() -> str:
    """A table of every key of a configuration for each section: type, default, meaning."""
    return "\n\n".join(f"## {title}\n\n{said}\n\n{table}" for title, said, table in _sections(Config, ""))


def _sections(kind: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    hints, meanings, rows, below = typing.get_type_hints(kind), _meanings(kind), [], []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if section := section_of(hint):
            below += _sections(section, f"{prefix}{field.name}.")
            continue
        cells = f"`{prefix}{field.name}`", _type_text(hint), _default(field), meanings[field.name]
        rows.append(cells)
    title = f"`[{prefix.rstrip('.')}]`" if prefix else "The model"
    yield title, " ".join((kind.__doc__ or "").split()), _table(("key", "type", "default", "meaning"), rows)
    yield from below


def _meanings(kind: type) -> dict[str, str]:
    """The comment beside, or on the line above, each field of a dataclass of moe/config.py.

    Raises:
        ValueError: a field has none.
    """
    source = Path(moe.config.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
    meanings = {}
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if section_of(typing.get_type_hints(kind)[node.target.id]):
            continue
        beside = lines[node.lineno - 1][node.end_col_offset or 0 :].strip()
        comment = beside or lines[node.lineno - 2].strip()
        if not comment.startswith("# "):
            raise ValueError(f"moe/config.py:{node.lineno}: {node.target.id} has no comment that says what it means")
        meanings[node.target.id] = comment.removeprefix("# ")
    return meanings


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f'`"{choice}"`' for choice in typing.get_args(hint))
    names = {int: "whole number", float: "number", str: "string", bool: "true or false", int | str: "number or string"}
    if typing.get_origin(hint) is dict:
        return "table of whole numbers"
    return names.get(hint) or f"list of {len(typing.get_args(hint))} numbers"


def _default(field: Any) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "has to be given"  # of a section that is absent by default
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return f"`{toml_value(value)}`"


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
        _si(counts.total),
        _si(active),
        f"{_si(2 * active, ' ')}FLOP",
    )


def _si(value: float, space: str = "") -> str:
    """Four digits and a prefix: 1.834T, 22.72M."""
    prefixes = {1e12: "T", 1e9: "G" if space else "B", 1e6: "M"}
    scale = next(s for s in prefixes if value >= s)
    return f"{value / scale:.4g}{space}{prefixes[scale]}"


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
