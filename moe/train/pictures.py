"""Pictures of a run, drawn from its metrics.jsonl: loss.png, experts.png, speed.png. matplotlib is imported on use.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from moe.train.metrics import read_metrics

PICTURES = "pictures"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _MUTED, _GRID = "#222222", "#767676", "#E6E6E6"
_MAX_LAYERS = 24  # panels in one picture; of deeper models, evenly spaced layers are shown


def draw(run_dir: str | Path) -> list[Path] | None:
    """Draws what `run_dir`/metrics.jsonl holds into `run_dir`/pictures; None where matplotlib is not installed.

    Returns:
        The PNG files; fewer where a run has not measured something (yet).
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    records = read_metrics(Path(run_dir))
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        return []
    place = Path(run_dir) / PICTURES
    place.mkdir(exist_ok=True)
    figures = {"loss": _loss(train, records), "experts": _experts(train), "speed": _speed(train)}
    for name, figure in figures.items():
        figure.savefig(place / f"{name}.png", dpi=150, facecolor="white")
    return [place / f"{name}.png" for name in figures]


def _loss(train: list[dict[str, Any]], records: list[dict[str, Any]]) -> Any:
    """Training loss on the left, held-out bits per byte beside the compressors' on the right."""
    evals = [r for r in records if r["kind"] == "eval"]
    figure, axes = _figure(1, 2 if evals else 1, width=5.6, height=4.2)
    scale, unit = _token_scale(train)
    x = np.array([r["tokens"] for r in train]) / scale
    lm = np.array([r["lm"] for r in train])
    smooth = _smoothed(lm)
    axes[0].plot(x, lm, color=_COLOURS[0], alpha=0.25, linewidth=1)
    axes[0].plot(x, smooth, color=_COLOURS[0], linewidth=2)
    _label_end(axes[0], x[-1], smooth[-1], f"{smooth[-1]:.2f}", _COLOURS[0])
    axes[0].set_xlim(0, x[-1])
    axes[0].set_ylim(*_range_without_start(lm))
    _title(axes[0], "Training loss", "nats per token; thin: each log point, thick: mean around it", f"tokens {unit}")
    if evals:
        final = next((r for r in records if r["kind"] == "final"), None)
        _bits_per_byte(axes[1], evals, final, scale, unit)
    return figure


def _bits_per_byte(
    axis: Any, evals: list[dict[str, Any]], final: dict[str, Any] | None, scale: float, unit: str
) -> None:
    x = np.array([r["tokens"] for r in evals]) / scale
    names = list(evals[-1]["bits_per_byte"])
    if len(names) == 2:  # one source: the total says the same
        names = names[:1]
    labels = []
    for i, name in enumerate(names):
        y = np.array([r["bits_per_byte"][name] for r in evals])
        colour = _INK if name == "total" else _COLOURS[i % len(_COLOURS)]
        axis.plot(x, y, color=colour, linewidth=1.2 if name == "total" else 2, marker="o", markersize=3, clip_on=False)
        labels.append((y[-1], f"{name} {y[-1]:.2f}", colour))
    if final is not None:
        for name, flags in (("gzip", "gzip -9"), ("xz", "xz -9e")):
            value = final["compression"][name]
            axis.axhline(value, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
            labels.append((value, f"{flags} {value:.2f}", _MUTED))
    values = [y for r in evals for y in r["bits_per_byte"].values()] + [label[0] for label in labels]
    axis.set_ylim(max(0.0, min(values) - 0.15 * (max(values) - min(values)) - 0.02), max(values) * 1.03)
    axis.set_xlim(0, x[-1])
    _label_ends(axis, x[-1], labels)
    _title(axis, "Held-out text", "bits per byte, lower is better; dashed: general compressors", f"tokens {unit}")


def _experts(train: list[dict[str, Any]]) -> Any:
    """One panel per layer: experts down, tokens across, colour by load relative to an even one."""
    load_TLE = np.array([r["load"] for r in train])
    n_layers, n_experts = load_TLE.shape[1:]
    layers = np.unique(np.linspace(0, n_layers - 1, min(n_layers, _MAX_LAYERS)).round().astype(int))
    columns = min(len(layers), 2 if len(layers) <= 4 else 4)
    rows = math.ceil(len(layers) / columns)
    figure, axes = _figure(rows, columns, width=5.2 if columns <= 2 else 3.4, height=2.6)
    scale, unit = _token_scale(train)
    end = train[-1]["tokens"] / scale
    image = None
    for axis, layer in zip(axes, layers, strict=False):
        # In octaves: twice and half the even load are equally far from white.
        octaves_ET = np.log2(np.maximum(load_TLE[:, layer].T * n_experts, 2.0**-6))
        image = axis.imshow(
            octaves_ET, aspect="auto", cmap="PuOr_r", vmin=-2, vmax=2, interpolation="nearest",
            extent=(0, end, n_experts - 0.5, -0.5),
        )  # fmt: skip
        worst = (load_TLE[-1, layer] * n_experts).max()
        _title(axis, f"Layer {layer}", f"busiest expert at the end: {worst:.2f}x", f"tokens {unit}", grid=False)
        axis.set_ylabel("expert", color=_MUTED)
        axis.set_yticks(range(0, n_experts, max(1, n_experts // 4)))
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], shrink=min(1.0, 1.4 / rows), aspect=18, pad=0.02)
    bar.ax.set_yticklabels(["¼ or less", "½", "even", "2x", "4x or more"], color=_INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    return figure


def _speed(train: list[dict[str, Any]]) -> Any:
    figure, (axis,) = _figure(1, 1, width=6.4, height=3.2)
    scale, unit = _token_scale(train)
    x = np.array([r["tokens"] for r in train]) / scale
    y = np.array([r["tokens_per_second"] for r in train])
    axis.plot(x, y, color=_COLOURS[2], linewidth=1.5)
    axis.set_xlim(0, x[-1])
    axis.set_ylim(0, 1.15 * y.max())
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    _label_end(axis, x[-1], y[-1], f"{y[-1]:,.0f}", _COLOURS[2])
    _title(axis, "Speed", f"tokens per second; median {np.median(y):,.0f}", f"tokens {unit}")
    return figure


# ------------------------------------------------------------------------------------------------------------ style


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of panels, width x height inches each, without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)  # type: ignore[union-attr]
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _title(axis: Any, title: str, subtitle: str, x_label: str, grid: bool = True) -> None:
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=20)
    axis.annotate(
        subtitle, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_MUTED
    )
    axis.set_xlabel(x_label, color=_MUTED)
    axis.tick_params(colors=_MUTED, labelsize=9, length=3 if grid else 0)
    for side in ("top", "right") if grid else ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_MUTED)
    if grid:
        axis.grid(axis="y", color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)


def _label_end(axis: Any, x: float, y: float, text: str, colour: str) -> None:
    axis.annotate(
        text, (x, y), xytext=(5, 0), textcoords="offset points", color=colour, fontsize=9, va="center",
        annotation_clip=False,
    )  # fmt: skip


def _label_ends(axis: Any, x: float, labels: list[tuple[float, str, str]]) -> None:
    """Labels at the right ends of lines, pushed apart where they would overlap."""
    low, high = axis.get_ylim()
    gap = 0.055 * (high - low)
    places: list[float] = []
    for value, text, colour in sorted(labels):
        place = max(value, places[-1] + gap) if places else value
        places.append(place)
        _label_end(axis, x, place, text, colour)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value's neighbours: up to a fortieth of the run to each side, fewer near the ends."""
    sums = np.cumsum([0.0, *values])
    i = np.arange(len(values))
    reach = np.minimum(len(values) // 40, np.minimum(i, len(values) - 1 - i))
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def _range_without_start(values: np.ndarray) -> tuple[float, float]:
    """Limits that leave room for what happens after the first steep fall."""
    top = float(np.quantile(values, 0.98)) if len(values) > 20 else float(values.max())
    low = float(values.min())
    margin = 0.08 * max(top - low, 0.1)
    return low - margin, top + margin


def _token_scale(train: list[dict[str, Any]]) -> tuple[float, str]:
    most = train[-1]["tokens"]
    for scale, unit in ((1e9, "(billions)"), (1e6, "(millions)"), (1e3, "(thousands)")):
        if most >= 2 * scale:
            return scale, unit
    return 1.0, ""
