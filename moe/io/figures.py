"""The look of all pictures: panels, titles, labels, colours. matplotlib is imported on use.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, GRID = "#222222", "#767676", "#E6E6E6"
MAX_LAYERS = 24  # panels in one picture; of deeper models, evenly spaced layers are shown


NO_PICTURES = 'no pictures: matplotlib is not installed (pip install "gpt4-moe[plot]")'


def can_draw() -> bool:
    """Whether matplotlib is installed; does not load it. `NO_PICTURES` is what to say where it is not."""
    return importlib.util.find_spec("matplotlib") is not None


def require() -> None:
    """Before work that ends in pictures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not can_draw():
        raise ImportError('pictures need matplotlib: pip install "gpt4-moe[plot]"')


def shown_layers(n_layers: int) -> np.ndarray:
    """The layers that get a panel."""
    return np.unique(np.linspace(0, n_layers - 1, min(n_layers, MAX_LAYERS)).round().astype(int))


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of panels, width x height inches each, without pyplot and its global state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require()
    from matplotlib.figure import Figure

    whole = Figure(figsize=(width * columns, height * rows), layout="constrained")
    whole.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)  # type: ignore[union-attr]
    return whole, list(whole.subplots(rows, columns, squeeze=False).flat)


def panels(n: int, height: float = 2.6) -> tuple[Any, list[Any], int]:
    """A figure of `n` panels, one per layer, its panels, and in how many rows they stand."""
    columns = min(n, 2 if n <= 4 else 4)
    rows = math.ceil(n / columns)
    whole, axes = figure(rows, columns, width=5.2 if columns <= 2 else 3.4, height=height)
    for axis in axes[n:]:
        axis.set_axis_off()
    return whole, axes, rows


def octaves(axis: Any, ratio: np.ndarray, extent: tuple[float, ...] | None = None) -> Any:
    """An image of ratios on a scale of octaves: twice and half are equally far from white."""
    values = np.log2(np.maximum(ratio, 2.0**-6))
    return axis.imshow(values, aspect="auto", cmap="PuOr_r", vmin=-2, vmax=2, interpolation="nearest", extent=extent)


def octave_bar(whole: Any, image: Any, axes: list[Any], shrink: float = 1.0, even: str = "even") -> None:
    """The scale of `octaves`; `even` names its middle."""
    bar = whole.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], shrink=shrink, aspect=18, pad=0.02)
    bar.ax.set_yticklabels(["¼ or less", "½", even, "2x", "4x or more"], color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def title(axis: Any, text: str, subtitle: str, x_label: str, grid: bool = True) -> None:
    """What a panel says about itself, and its spines: those of a plot, or none around an image."""
    axis.set_title(text, loc="left", fontsize=12, fontweight="bold", color=INK, pad=20)
    axis.annotate(
        subtitle, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=MUTED
    )
    axis.set_xlabel(x_label, color=MUTED)
    axis.tick_params(colors=MUTED, labelsize=9, length=3 if grid else 0)
    for side in ("top", "right") if grid else ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(MUTED)
    if grid:
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)


def plain_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10, ... of a logarithmic axis, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Any, place: Path, name: str) -> Path:
    """Writes NAME.png into the directory; returns its path."""
    place.mkdir(parents=True, exist_ok=True)
    figure.savefig(place / f"{name}.png", dpi=150, facecolor="white")
    return place / f"{name}.png"


def label_end(axis: Any, x: float, y: float, text: str, colour: str) -> None:
    """A label at the right end of a line."""
    axis.annotate(
        text, (x, y), xytext=(5, 0), textcoords="offset points", color=colour, fontsize=9, va="center",
        annotation_clip=False,
    )  # fmt: skip


def label_ends(axis: Any, x: float, labels: list[tuple[float, str, str]]) -> None:
    """Labels at the right ends of lines, pushed apart where they would overlap."""
    low, high = axis.get_ylim()
    gap = 0.055 * (high - low)
    places: list[float] = []
    for value, text, colour in sorted(labels):
        place = max(value, places[-1] + gap) if places else value
        places.append(place)
        label_end(axis, x, place, text, colour)
