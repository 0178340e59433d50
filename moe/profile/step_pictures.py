"""Pictures of a step: where its time goes with the floors in it, its roofline, and memory over the step."""

from pathlib import Path
from typing import Any

import numpy as np

from moe.io import figures
from moe.profile.step import Memory, StepProfile

PHASES = {"forward": 0, "backward": 1, "recompute": 4, "update": 2, "": 5}  # -> colour


def draw_step(p: StepProfile, place: Path) -> Path:
    """Draws time and roofline into the directory; returns step.png. Raises ImportError without matplotlib."""
    return figures.save(step_figure(p), place, "step")


def draw_memory(memory: Memory, place: Path) -> Path:
    """Draws allocated memory over the step into the directory; returns memory.png. Raises ImportError, too."""
    return figures.save(memory_figure(memory), place, "memory")


def step_figure(p: StepProfile) -> Any:
    """Time and roofline side by side, as a matplotlib figure."""
    figure, (left, right) = figures.figure(1, 2, width=6.4, height=5.2)
    _bars(left, p)
    _roofline(right, p)
    return figure


def memory_figure(memory: Memory) -> Any:
    """Allocated memory over the step, as a matplotlib figure."""
    figure, (axis,) = figures.figure(1, 1, width=8.0, height=3.2)
    seconds, gib = np.array(memory.seconds) * 1e3, np.array(memory.bytes) / 2**30
    axis.step(seconds, gib, where="post", color=figures.INK, linewidth=1)
    phases = np.array(memory.phases)
    for phase, colour in PHASES.items():
        if phase and (phases == phase).any():
            axis.fill_between(
                seconds, gib, where=phases == phase, step="post", color=figures.COLOURS[colour], alpha=0.3,
                linewidth=0, label=phase,
            )  # fmt: skip
    axis.legend(frameon=False, fontsize=9, labelcolor=figures.INK, ncols=4, loc="upper left")
    axis.set_ylim(0, max(gib.max(), 1e-9) * 1.25)
    axis.set_ylabel("GiB", color=figures.MUTED)
    peak = int(gib.argmax())
    figures.title(
        axis, "Memory over one step", f"peak {gib[peak]:.2f} GiB, in the {memory.phases[peak] or 'rest'}; traced", "ms"
    )
    return figure


def _bars(axis: Any, p: StepProfile) -> None:
    """One bar per component, its phases side by side; a dark line where the floor of each phase would end."""
    totals: dict[str, float] = {}
    for row in p.rows:
        totals[row.component] = totals.get(row.component, 0.0) + row.seconds
    order = sorted(totals, key=lambda component: totals[component])
    for y, component in enumerate(order):
        begin = 0.0
        for row in sorted((r for r in p.rows if r.component == component), key=lambda r: list(PHASES).index(r.phase)):
            ms = row.seconds * 1e3
            axis.barh(y, ms, left=begin, height=0.72, color=figures.COLOURS[PHASES[row.phase]], alpha=0.85, linewidth=0)
            if row.floor is not None:
                axis.barh(y, min(row.floor * 1e3, ms), left=begin, height=0.28, color=figures.INK, linewidth=0)
            begin += ms
        axis.annotate(
            f"{totals[component] / p.seconds:.1%}", (begin, y), xytext=(4, 0), textcoords="offset points",
            fontsize=8, color=figures.MUTED, va="center",
        )  # fmt: skip
    axis.set_yticks(range(len(order)), order)
    seen = [phase for phase in PHASES if phase and any(row.phase == phase for row in p.rows)]
    for phase in seen:
        axis.barh(0, 0, color=figures.COLOURS[PHASES[phase]], alpha=0.85, label=phase)
    axis.barh(0, 0, color=figures.INK, label="floor")
    axis.legend(frameon=False, fontsize=9, labelcolor=figures.INK, loc="lower right")
    axis.set_xlim(0, max(totals.values()) * 1e3 * 1.14)
    what = f"{p.config}, {p.what}, {p.batch} x {p.seq_len}, {p.dtype} on {p.device}"
    figures.title(axis, f"A step of {p.seconds * 1e3:,.1f} ms", what, "ms")
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=figures.GRID, linewidth=0.8)


def _roofline(axis: Any, p: StepProfile) -> None:
    """Every row that has FLOP, under the roofs that were measured."""
    rows = [(r, r.flop / r.bytes, r.flop / r.seconds / 1e9) for r in p.rows if r.flop and r.bytes and r.seconds]
    product, product_fp32, copy = (
        rate / 1e9 for rate in (p.ceilings.product, p.ceilings.product_fp32, p.ceilings.copy)
    )
    low = min([product / copy, *(x for _, x, _ in rows)]) / 3
    high = max([product / copy, *(x for _, x, _ in rows)]) * 3
    bottom, top = min([product / 10, *(y for *_, y in rows)]) / 2, product * 2
    intensities = np.geomspace(low, high, 200)
    if p.dtype != "float32":
        axis.plot(intensities, np.minimum(intensities * copy, product_fp32), color=figures.MUTED, linewidth=1)
    axis.plot(intensities, np.minimum(intensities * copy, product), color=figures.INK, linewidth=1.5)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(bottom, top)
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    for row, *point in rows:
        area = 12 + 400 * row.seconds / p.seconds
        axis.scatter(*point, s=area, color=figures.COLOURS[PHASES[row.phase]], alpha=0.75, linewidth=0, clip_on=False)
    _name_points(axis, [(x, y, r.component, figures.COLOURS[PHASES[r.phase]]) for r, x, y in rows])
    axis.set_ylabel("GFLOP/s", color=figures.MUTED)
    roofs = f"roofs: {product:,.0f} GFLOP/s (a large product), {copy:,.0f} GB/s (a copy); area: time"
    figures.title(axis, "Roofline", roofs, "FLOP per byte")


def _name_points(axis: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Names to the right of the panel, at the height of their points or as near as there is room, with a line."""
    bottom, top = np.log(axis.get_ylim())
    place, gap = -1.0, 0.045
    heights = []
    for _, y, *_ in sorted(points, key=lambda point: point[1]):
        place = max((np.log(y) - bottom) / (top - bottom), place + gap)
        heights.append(place)
    surplus = max(0.0, max(heights, default=0.0) - 1.0)
    for height, (x, y, name, colour) in zip(heights, sorted(points, key=lambda point: point[1]), strict=True):
        axis.annotate(
            name, (x, y), xytext=(1.03, height - surplus), textcoords="axes fraction", fontsize=8, color=colour,
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": figures.GRID, "linewidth": 0.8, "shrinkB": 3},
        )  # fmt: skip
