"""The picture of a ladder: loss against compute, the law through the rungs, and what it said of the held-out one."""

from pathlib import Path
from typing import Any

import numpy as np

from moe.io import figures
from moe.ladder.rungs import Climbed

NAME = "ladder"


def draw(climbed: Climbed, place: str | Path) -> Path | None:
    """Draws `place`/ladder.png, with or without the held-out loss; None where matplotlib is not installed."""
    if not figures.can_draw():
        return None
    assert climbed.prediction is not None
    figure, (axis,) = figures.figure(1, 1, width=7.2, height=4.8)
    _law(axis, climbed)
    _rungs(axis, climbed)
    _scales(axis, climbed)
    _held_out(axis, climbed)
    name = climbed.ladder.base.name
    off = "" if climbed.error is None else f": the prediction is off by {climbed.error:+.2%}"
    subtitle = "held-out nats per token; dashed: where the law predicts, band: the law without one rung"
    figures.title(axis, f"Scaling ladder of {name}{off}", subtitle, "training compute (FLOP)")
    return figures.save(figure, Path(place), NAME)


def _law(axis: Any, climbed: Climbed) -> None:
    """The fitted law, dashed beyond the rungs, in the band of the laws that lack one of them."""
    p, rungs, top = climbed.prediction, climbed.ladder.rungs, climbed.ladder.held_out
    assert p is not None
    low, high = rungs[0].flop / 1.6, top.flop * 1.35
    C = np.geomspace(low, high, 200)
    laws = np.array([[law.loss(c) for c in C] for law in (p.law, *p.without_one)])
    axis.fill_between(C, laws.min(0), laws.max(0), color=figures.COLOURS[0], alpha=0.12, linewidth=0)
    inside = rungs[-1].flop >= C
    axis.plot(C[inside], laws[0][inside], color=figures.COLOURS[0], linewidth=2)
    axis.plot(C[~inside], laws[0][~inside], color=figures.COLOURS[0], linewidth=2, linestyle=(0, (4, 3)))
    axis.annotate(
        str(p.law), (0, 0), xytext=(8, 8), xycoords="axes fraction", textcoords="offset points",
        fontsize=9, color=figures.COLOURS[0],
    )  # fmt: skip
    axis.set_xlim(low, high)


def _rungs(axis: Any, climbed: Climbed) -> None:
    """The rungs with their names, which keep to their side of the law."""
    assert climbed.prediction is not None
    for rung, measured in zip(climbed.ladder.rungs, climbed.measured, strict=True):
        axis.plot([rung.flop], [measured.loss], "o", color=figures.COLOURS[0], markersize=7)
        under = measured.loss < climbed.prediction.law.loss(rung.flop)
        offset, side = ((-6, -13), "right") if under else ((6, 6), "left")
        axis.annotate(
            rung.name, (rung.flop, measured.loss), xytext=offset, textcoords="offset points", fontsize=9,
            color=figures.INK, ha=side,
        )  # fmt: skip


def _held_out(axis: Any, climbed: Climbed) -> None:
    """Hollow: predicted; filled: measured. What they are stands right of the panel, apart however close they are."""
    p, top, colour = climbed.prediction, climbed.ladder.held_out, figures.COLOURS[1]
    assert p is not None
    hollow = {"markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 2}
    axis.plot([top.flop], [p.loss], "o", markersize=12, **hollow)
    labels = [(p.loss, f"predicted {p.loss:.3f}", colour)]
    if climbed.held_out is not None:
        axis.plot([top.flop], [climbed.held_out.loss], "o", color=colour, markersize=6)
        labels.append((climbed.held_out.loss, f"measured {climbed.held_out.loss:.3f}", colour))
    highest = max(loss for loss, _, _ in labels)
    axis.annotate(
        top.name, (top.flop, highest), xytext=(0, 10), textcoords="offset points", fontsize=9, color=colour, ha="center"
    )
    figures.label_ends(axis, axis.get_xlim()[1], labels)


def _scales(axis: Any, climbed: Climbed) -> None:
    """Logarithmic both ways, with losses written out: they often span less than one power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    assert climbed.prediction is not None
    axis.set_xscale("log")
    axis.set_yscale("log")
    values = [m.loss for m in climbed.measured] + [climbed.prediction.loss]
    values += [climbed.held_out.loss] if climbed.held_out else []
    margin = (max(values) / min(values)) ** 0.15
    axis.set_ylim(min(values) / margin, max(values) * margin)
    axis.yaxis.set_major_locator(MaxNLocator(7))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.4g}"))
    axis.xaxis.set_major_locator(LogLocator(base=10))
