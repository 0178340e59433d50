"""Pictures of benchmarks of the engine, measured beside planned. matplotlib is imported on use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.io import figures

PANELS = (
    ("tpot_ms", "plan_tpot_ms", "Latency", "ms per token of one user, median"),
    ("throughput", "plan_throughput", "Throughput", "new tokens a second, of all users"),
    ("utilisation", "plan_utilisation", "Utilisation", "share of the peak FLOP/s"),
)


def draw_axes(rows: Sequence[Mapping[str, Any]], x: str, title: str, directory: Path) -> Path:
    """The three axes of serving over `x`, "batch" or "rate"; the experts that a pass touches are drawn in."""
    whole, axes = figures.figure(1, 3, width=4.6, height=3.6)
    at = [row[x] for row in rows]
    label = {"batch": "sequences that run together", "rate": "requests that arrive a second"}[x]
    for axis, (measured, planned, name, subtitle) in zip(axes, PANELS, strict=True):
        lines = ((measured, "measured", "o-"), (planned, "planned", "--"))
        for (key, text, style), colour in zip(lines, figures.COLOURS, strict=False):
            y = [row[key] for row in rows]
            axis.plot(at, y, style, color=colour, linewidth=1.8, markersize=4, label=text)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(at, [f"{value:g}" for value in at], minor=False)
        axis.minorticks_off()
        figures.plain_ticks(axis)
        figures.title(axis, name, subtitle, label)
    axes[1].legend(frameon=False, fontsize=9, labelcolor=figures.INK)
    _draw_experts(axes[2], at, rows)
    whole.suptitle(title, x=0.01, ha="left", fontsize=10, color=figures.MUTED)
    return figures.save(whole, directory, f"serving-{x}")


def _draw_experts(axis: Any, at: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> None:
    """Distinct experts of a layer in a pass, on a scale of its own at the right."""
    other = axis.twinx()
    other.plot(at, [row["experts"] for row in rows], "o:", color=figures.MUTED, markersize=3)
    other.plot(at, [row["experts_expected"] for row in rows], ":", color=figures.COLOURS[2])
    other.set_ylim(0)
    other.set_ylabel("experts of a layer: touched, expected (green)", color=figures.MUTED, fontsize=8)
    other.tick_params(colors=figures.MUTED, labelsize=9)
    for spine in other.spines.values():
        spine.set_visible(False)
