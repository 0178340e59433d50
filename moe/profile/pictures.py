"""Pictures of a routing profile: load.png, time.png, sources.png, together.png, serving.png."""

from pathlib import Path
from typing import Any

import numpy as np

from moe.io import figures
from moe.profile.serving import StepLoad
from moe.profile.statistics import RoutingProfile


def draw(p: RoutingProfile, place: Path) -> list[Path]:
    """Draws the profile into the directory; returns the PNG files, sources.png only where two sources were profiled.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = {"load": _load(p), "time": _time(p), "together": _together(p)}
    if len(p.sources) > 1:
        drawn["sources"] = _sources(p)
    return [figures.save(figure, place, name) for name, figure in drawn.items()]


def draw_serving(steps: list[StepLoad], n_experts: int, place: Path) -> Path:
    """Draws decoding steps into the directory; returns serving.png. Raises ImportError as `draw`."""
    return figures.save(_serving(steps, n_experts), place, "serving")


def _load(p: RoutingProfile) -> Any:
    """Layers down, experts across, colour by load relative to an even one."""
    load_LE = p.load_LE.numpy() * p.n_experts
    n_layers = len(load_LE)
    figure, (axis,) = figures.figure(1, 1, width=8.0, height=max(2.6, 1.6 + 0.3 * min(n_layers, 40)))
    image = figures.octaves(axis, load_LE)
    if load_LE.size <= 400:
        for layer, row in enumerate(load_LE):
            for e, value in enumerate(row):
                axis.text(e, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=figures.INK)
    title = f"busiest {load_LE.max():.2f}x, idlest {load_LE.min():.2f}x the mean; {p.tokens:,} tokens"
    figures.title(axis, "Load of each expert", title, "expert", grid=False)
    axis.set_ylabel("layer", color=figures.MUTED)
    _whole_ticks(axis, p.n_experts, n_layers)
    figures.octave_bar(figure, image, [axis])
    return figure


def _time(p: RoutingProfile) -> Any:
    """One panel per layer: experts down, passes across."""
    passes, load_NLE = (t.numpy() for t in p.load_over_time)
    layers = figures.shown_layers(load_NLE.shape[1])
    figure, axes, rows = figures.panels(len(layers))
    image = None
    for axis, layer in zip(axes, layers, strict=False):
        image = figures.octaves(
            axis, load_NLE[:, layer].T * p.n_experts, extent=(0, passes.sum(), p.n_experts - 0.5, -0.5)
        )
        worst = f"within a pass the busiest has {float(p.pass_max_over_mean_L[layer]):.2f}x"
        figures.title(axis, f"Layer {layer}", worst, "forward pass", grid=False)
        axis.set_ylabel("expert", color=figures.MUTED)
    figures.octave_bar(figure, image, axes, shrink=min(1.0, 1.4 / rows))
    return figure


def _together(p: RoutingProfile) -> Any:
    """One panel per layer: how much more often than by chance two experts serve a token together."""
    lift_LEE = p.coactivation_lift_LEE.numpy()
    layers = figures.shown_layers(len(lift_LEE))
    figure, axes, rows = figures.panels(len(layers), height=3.4)
    image = None
    for axis, layer in zip(axes, layers, strict=False):
        lift_EE = lift_LEE[layer]
        image = figures.octaves(axis, lift_EE)
        best = np.nan_to_num(lift_EE, nan=0.0)
        i, j = sorted(np.unravel_index(best.argmax(), best.shape))
        pair = f"most: {i} and {j}, {best[i, j]:.1f}x as often as by chance"
        figures.title(axis, f"Layer {layer}", pair, "expert", grid=False)
        axis.set_ylabel("expert", color=figures.MUTED)
        _whole_ticks(axis, p.n_experts, p.n_experts)
    figures.octave_bar(figure, image, axes, shrink=min(1.0, 1.4 / rows), even="chance")
    return figure


def _sources(p: RoutingProfile) -> Any:
    """One panel per layer: each source's share of every expert, with four standard errors."""
    shares = p.sources
    layers = figures.shown_layers(len(p.counts_LE))
    figure, axes, _ = figures.panels(len(layers), height=2.9)
    x, width = np.arange(p.n_experts), 0.8 / len(shares)
    names = list(shares)
    _, z_LE = p.specialisation(names[0], names[1])
    for axis, layer in zip(axes, layers, strict=False):
        for i, (name, share) in enumerate(shares.items()):
            axis.bar(
                x + (i - (len(shares) - 1) / 2) * width,
                100 * share.mean_LE[layer].numpy(),
                width,
                yerr=400 * share.error_LE[layer].numpy(),
                color=figures.COLOURS[i % len(figures.COLOURS)],
                error_kw={"ecolor": figures.MUTED, "elinewidth": 0.8},
                label=name,
            )
        axis.axhline(100 / p.n_experts, color=figures.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        clear = int((z_LE[layer].abs() > 4).sum())
        said = f"{clear} of {p.n_experts} experts differ between {names[0]} and {names[1]}; bars: 4 standard errors"
        figures.title(axis, f"Layer {layer}", said, "expert")
        axis.set_ylabel("% of the routed tokens", color=figures.MUTED)
        axis.set_xticks(range(0, p.n_experts, max(1, p.n_experts // 16)))
    axes[0].legend(frameon=False, fontsize=9, labelcolor=figures.INK, ncols=len(shares), loc="upper right")
    return figure


def _serving(steps: list[StepLoad], n_experts: int) -> Any:
    """Distinct experts, and the spread of an expert's tokens, by batch size; the real trace and uniform routing."""
    figure, (left, right) = figures.figure(1, 2, width=5.4, height=3.8)
    batch = [s.batch for s in steps]
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    left.plot(batch, [s.distinct_uniform for s in steps], color=figures.MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    left.plot(batch, [s.distinct for s in steps], color=figures.COLOURS[0], linewidth=2)
    left.set_ylim(0, n_experts * 1.08)
    x_label = "sequences in the batch"
    figures.title(left, "Experts that a decoding step reads", "solid: this trace; dashed: uniform routing", x_label)
    low, high = ([max(s.tokens_p5, 0.5) for s in steps], [max(s.tokens_p95, 0.5) for s in steps])
    right.fill_between(batch, low, high, color=figures.COLOURS[0], alpha=0.25, linewidth=0)
    for values in ([s.tokens_p5_uniform for s in steps], [s.tokens_p95_uniform for s in steps]):
        right.plot(batch, np.maximum(values, 0.5), color=figures.MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    right.plot(batch, [s.mean for s in steps], color=figures.INK, linewidth=1)
    right.plot(batch, [s.busiest for s in steps], color=figures.COLOURS[1], linewidth=2)
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    figures.label_end(right, batch[-1], steps[-1].busiest, "busiest", figures.COLOURS[1])
    figures.label_end(right, batch[-1], steps[-1].mean, "mean", figures.INK)
    figures.title(right, "Tokens of an expert in a step", "band: 5% to 95%; dashed: the same, uniform", x_label)
    return figure


def _whole_ticks(axis: Any, columns: int, rows: int) -> None:
    axis.set_xticks(range(0, columns, max(1, columns // 16)))
    axis.set_yticks(range(0, rows, max(1, rows // 16)))
