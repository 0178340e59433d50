"""Pictures of the planner's results, and the page "the article, recomputed". matplotlib is imported on use."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.errors import ConfigError
from moe.io import figures, page
from moe.plan.claims import Verdict
from moe.plan.experts import load_quantile, touched
from moe.plan.hardware import load_hardware
from moe.plan.layout import load_layout
from moe.plan.models import load_shape
from moe.plan.search import evaluate
from moe.plan.sweeps import BATCHES, Row, sweep


def draw_sweep(rows: Sequence[Row], directory: Path) -> Path:
    """Latency, throughput and utilisation over the batch, a line for each setting, the experts touched drawn in."""
    whole, axes = figures.figure(1, 3, width=4.6, height=3.6)
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["hardware"], row["layout"], row["weights"], row["context"]), []).append(row)
    constant = [len({key[i] for key in lines}) == 1 for i in range(4)]
    panels = (
        ("latency_ms", "Latency", "ms per token of one user"),
        ("throughput", "Throughput", "tokens/s of all GPUs"),
        ("utilisation", "Utilisation", "share of the dense peak"),
    )
    for axis, (name, label, subtitle) in zip(axes, panels, strict=True):
        for i, (key, line) in enumerate(lines.items()):
            colour = figures.COLOURS[i % len(figures.COLOURS)]
            x, y = [row["batch"] for row in line], [row[name] for row in line]
            axis.plot(x, y, color=colour, linewidth=1.8)
            fits = [(a, b) for a, b, row in zip(x, y, line, strict=True) if row["fits"]]
            axis.plot([a for a, _ in fits], [b for _, b in fits], "o", color=colour, markersize=4)
            text = " ".join(str(part) for part, same in zip(key, constant, strict=True) if not same)
            if axis is not axes[0]:  # where the right side is the scale of the experts
                figures.label_end(axis, float(x[-1]), float(y[-1]), text, colour)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        figures.plain_ticks(axis)
        figures.title(axis, label, subtitle, "sequences in a pass; dots: they fit in memory")
    _draw_touched(axes[0], next(iter(lines.values())))
    return _save(whole, directory, "serving")


def _draw_touched(axis: Any, line: Sequence[Row]) -> None:
    """The share of experts that a pass touches, on a scale of its own at the right."""
    most = max(float(row["experts"]) for row in line)
    if not most:
        return
    other = axis.twinx()
    other.plot([row["batch"] for row in line], [row["experts"] for row in line], ":", color=figures.MUTED)
    other.set_ylim(0, most * 1.05)
    other.set_ylabel("distinct experts touched (dotted)", color=figures.MUTED, fontsize=9)
    other.tick_params(colors=figures.MUTED, labelsize=9)
    for spine in other.spines.values():
        spine.set_visible(False)


def draw_experts(n_experts: int, top_k: int, directory: Path) -> Path:
    """Distinct experts touched, and the range of tokens that an expert gets, over the tokens of a pass."""
    whole, (left, right) = figures.figure(1, 2, width=5.2, height=3.4)
    batches = [2**i for i in range(13)]
    blue, red = figures.COLOURS[:2]
    left.plot(batches, [touched(n_experts, top_k, b) for b in batches], color=blue)
    left.plot(batches, [min(n_experts, b * top_k) for b in batches], ":", color=figures.MUTED)
    left.set_xscale("log", base=2)
    left.set_ylim(0)
    figures.title(left, "Experts touched", "of a layer, mean; dotted: min(E, B k)", "tokens in a pass")
    low, high = ([load_quantile(n_experts, top_k, b, level) for b in batches] for level in (0.05, 0.95))
    right.fill_between(batches, low, high, color=red, alpha=0.25, linewidth=0)
    right.plot(batches, [b * top_k / n_experts for b in batches], color=red)
    right.set_xscale("log", base=2)
    right.set_yscale("symlog", linthresh=1)
    right.set_ylim(0)
    figures.title(right, "Tokens per expert", "mean, and from the 5% to the 95% quantile", "tokens in a pass")
    return _save(whole, directory, "experts")


def draw_frontier(rows: Sequence[Row], directory: Path) -> Path:
    """Cost against latency of every way to divide a layer over chips; the frontier of those that none beats."""
    whole, (axis,) = figures.figure(1, 1, width=6.4, height=4.2)
    for i, strategy in enumerate(sorted({str(row["strategy"]) for row in rows})):
        points = [row for row in rows if row["strategy"] == strategy]
        colour = figures.COLOURS[i]
        axis.plot([r["latency_ms"] for r in points], [r["usd_per_1k"] for r in points], "o", color=colour,
                  markersize=4, alpha=0.6, label=strategy)  # fmt: skip
    best = sorted((r for r in rows if r["best"]), key=lambda r: float(r["latency_ms"]))
    axis.plot([r["latency_ms"] for r in best], [r["usd_per_1k"] for r in best], color=figures.INK, linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    figures.plain_ticks(axis)
    axis.legend(frameon=False, fontsize=9, labelcolor=figures.INK)
    figures.title(axis, "Cost against latency", "USD per 1,000 tokens; line: none beats these in both", "ms per token")
    return _save(whole, directory, "frontier")


def _save(whole: Any, directory: Path, name: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    whole.savefig(path, dpi=130)
    return path


# --------------------------------------------------------------------------------------------------------- the page


def check_report(path: Path) -> None:
    """Before the claims are computed. Raises as `write_report`."""
    if path.suffix not in (".html", ".md"):
        raise ConfigError(f"path = {str(path)!r}: must end in .html or .md")
    figures.require()


def write_report(verdicts: Sequence[Verdict], model: str, path: Path) -> None:
    """One page with every claim, its verdict and what was computed; .html holds its pictures, .md has them beside it.

    Raises:
        ConfigError: another kind of file.
        ImportError: matplotlib is not installed.
    """
    check_report(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = load_shape(model)
    pictures = path.parent / f"{path.stem}-pictures"
    layouts, hardware = [load_layout("gpt4-serve")], ["a100-40", "h100-sxm"]
    drawn = [
        ("Serving on 128 GPUs at 8k", draw_sweep(sweep(shape, layouts, hardware, batches=BATCHES), pictures)),
        ("Experts", draw_experts(shape.n_experts, shape.top_k, pictures)),
    ]
    text = _html(verdicts, shape.name, drawn) if path.suffix == ".html" else _markdown(verdicts, shape.name, drawn)
    path.write_text(text, encoding="utf-8")
    if path.suffix == ".html":
        for _, picture in drawn:
            picture.unlink()
        pictures.rmdir()


def _headline(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(v.verdict for v in verdicts)
    external = counts.pop("EXTERNAL", 0)
    parts = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    checkable = f"{len(verdicts) - external} of its {len(verdicts)} claims can be checked: {parts}."
    return f"{checkable} The other {external} are external facts."


def _design() -> str:
    """The article's layout against an expert on each node, in one sentence."""
    shape, found = load_shape("gpt4-8k"), []
    for name in ("gpt4-serve", "gpt4-serve-ep"):
        found.append(evaluate(shape, load_layout(name), load_hardware("a100-80"), 256, 8192))
    one, other = found
    return (
        f"At 256 sequences a pass and 8k of context on 128 A100-80, tensor 8 x pipeline 16 gives a user "
        f"{one.per_user:.1f} tokens/s at ${one.usd_per_1k:.4f} per 1k tokens; an expert on each node, no pipeline, "
        f"{other.per_user:.1f} tokens/s at ${other.usd_per_1k:.4f}."
    )


def _markdown(verdicts: Sequence[Verdict], name: str, drawn: Sequence[tuple[str, Path]]) -> str:
    lines = ["# The article, recomputed", "", f"Model: {name}. {_headline(verdicts)}", "", _design(), ""]
    for title, picture in drawn:
        lines += [f"![{title}]({picture.parent.name}/{picture.name})", ""]
    lines += ["| | claim | verdict | computed |", "|---|---|---|---|"]
    for v in _ordered(verdicts):
        cells = (v.claim.id, v.claim.text, v.verdict, v.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _html(verdicts: Sequence[Verdict], name: str, drawn: Sequence[tuple[str, Path]]) -> str:
    figures = [page.figure(title, "", page.png(picture.read_bytes(), title)) for title, picture in drawn]
    rows = [[v.claim.id, v.claim.text, v.verdict, v.reason] for v in _ordered(verdicts)]
    columns = ["", "claim", "verdict", "computed"]
    claims = page.Table("The claims that can be checked, then the external facts", columns, rows, words=tuple(columns))
    sections = [
        page.Section("What serves it best", _design(), figures),
        page.Section("Claims", _headline(verdicts), [page.table(claims, prose=True)]),
    ]
    return page.page("The article, recomputed", f"Model: {name}. {_headline(verdicts)}", sections)


def _ordered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """External facts last."""
    return sorted(verdicts, key=lambda v: v.verdict == "EXTERNAL")
