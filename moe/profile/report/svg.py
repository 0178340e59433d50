"""Pictures of the report as inline SVG, coloured by the page's style so that they fit light and dark.

Heatmaps are indexed PNGs of one pixel per cell, stretched, whose colours fade into the page: a few hundred bytes
whatever the number of experts, and right on any background.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from moe.io.page import Html

MORE, LESS = (230, 97, 0), (112, 84, 200)  # orange and violet, apart for any kind of colour vision
_LEVELS = 24  # of a colour, for two octaves
_NAN = 2 * _LEVELS + 1


@dataclass(frozen=True)
class Axis:
    """What runs along a side of a heatmap: a name, and the values at its two ends (None: cells count from 0)."""

    name: str
    end: float | None = None


def heatmap(ratio_RC: np.ndarray, rows: Axis, columns: Axis, label: str, width: float = 400, height: float = 0) -> Html:
    """Ratios to an even share on a scale of octaves: twice and half are equally far from the page's colour.

    Args:
        ratio_RC: nan leaves a grey cell.
        label: what a reader who does not see it is told.
        width, height: of the cells, in pixels; 0 makes cells 22 high. Values stand in cells that are large enough.
    """
    n_rows, n_columns = ratio_RC.shape
    height = height or 22 * n_rows
    left, top, bottom = 40.0, 6.0, 36.0
    cell_w, cell_h = width / n_columns, height / n_rows
    octave_RC = np.log2(np.maximum(np.nan_to_num(ratio_RC, nan=1.0), 2.0**-6)).clip(-2, 2)
    index_RC = np.where(np.isnan(ratio_RC), _NAN, np.rint(octave_RC * _LEVELS / 2) + _LEVELS).astype(np.uint8)
    data = base64.b64encode(_png(index_RC)).decode()
    parts = [
        f'<image x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>',
        f'<rect class="frame" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"/>',
    ]
    if cell_w >= 28 and cell_h >= 16:
        for r, c in np.argwhere(~np.isnan(ratio_RC)):
            strong = "more" if octave_RC[r, c] > 1.2 else "less" if octave_RC[r, c] < -1.2 else "ink"
            x, y = left + (c + 0.5) * cell_w, top + (r + 0.5) * cell_h + 4
            parts.append(_text(x, y, f"{ratio_RC[r, c]:.2f}", kind=strong))
    for at, name in _ticks(columns, n_columns, width):
        parts.append(_text(left + at, top + height + 14, name))
    for at, name in _ticks(rows, n_rows, height, least=14):
        parts.append(_text(left - 6, top + at + 4, name, anchor="end"))
    parts.append(_text(left + width / 2, top + height + 30, columns.name))
    parts.append(_text(11, top + height / 2, rows.name, turned=True))
    return _svg(left + width + 12, top + height + bottom, label, parts)


def scale(even: str = "even") -> Html:
    """What the colours of `heatmap` mean."""
    ratios = 2.0 ** np.linspace(-2, 2, 2 * _LEVELS + 1)[None]
    data = base64.b64encode(_png(np.rint(np.log2(ratios) * _LEVELS / 2 + _LEVELS).astype(np.uint8))).decode()
    parts = [
        f'<image x="34" y="2" width="280" height="12" preserveAspectRatio="none" href="data:image/png;base64,{data}"/>',
        '<rect class="frame" x="34" y="2" width="280" height="12"/>',
    ]
    names = ("¼ or less", "½", even, "2x", "4x or more")
    parts += [_text(34 + 70 * i, 28, name) for i, name in enumerate(names)]
    return _svg(350, 34, f"Scale: violet a quarter or less, page colour {even}, orange four times or more", parts)


def bars(
    series: Sequence[tuple[np.ndarray, np.ndarray | None]], label: str, x_name: str, y_name: str, even: float | None
) -> Html:
    """Bars side by side for 0, 1, ... n - 1, with half-lengths of their error bars; `even` is a dashed line."""
    n = len(series[0][0])
    width, height, left, top = max(360.0, 9.0 * n * len(series)), 170.0, 44.0, 8.0
    highest = max(
        float(np.nanmax(values + np.nan_to_num(error if error is not None else 0))) for values, error in series
    )
    highest = max(highest, even or 0.0, 1e-9) * 1.06
    step, bar = width / n, 0.8 * width / n / len(series)
    parts = _y_axis(left, top, width, height, highest, y_name)
    for i, (values, error) in enumerate(series):
        shapes, whiskers = "", ""
        for e, value in enumerate(values):
            x, y = left + step * (e + 0.1) + bar * i, top + height * (1 - value / highest)
            shapes += f"M{x:.1f} {top + height:g}V{y:.1f}h{max(bar - 0.6, 0.4):.1f}V{top + height:g}z"
            if error is not None and np.isfinite(error[e]):
                low = top + height * (1 - max(0.0, value - error[e]) / highest)
                high = top + height * (1 - (value + error[e]) / highest)
                whiskers += f"M{x + bar / 2:.1f} {low:.1f}V{high:.1f}"
        parts += [f'<path class="bar s{i % 6}" d="{shapes}"/>', f'<path class="error" d="{whiskers}"/>']
    if even is not None:
        y = top + height * (1 - even / highest)
        parts.append(f'<path class="even" d="M{left:g} {y:.1f}h{width:g}"/>')
    parts += [_text(left + at, top + height + 15, name) for at, name in _ticks(Axis(x_name), n, width)]
    parts.append(_text(left + width / 2, top + height + 31, x_name))
    return _svg(left + width + 8, top + height + 38, label, parts)


def histogram(mass: np.ndarray, uniform: np.ndarray, label: str, x_name: str, y_name: str) -> Html:
    """Two distributions over 0, 1, 2, ...: one as bars, the other as a dashed step line."""
    n = 1 + max(int(np.searchsorted(np.cumsum(m), 0.998)) for m in (mass, uniform))
    n = len(mass) if len(mass) <= 20 else n
    together = max(1, math.ceil(n / 40))  # values that share a bar
    n = min(math.ceil(n / together) * together, math.ceil(len(mass) / together) * together)
    binned = [np.pad(m, (0, max(0, n - len(m))))[:n].reshape(-1, together).sum(1) * 100 for m in (mass, uniform)]
    width, height, left, top = 300.0, 150.0, 44.0, 8.0
    highest = max(float(b.max()) for b in binned) * 1.06
    step = width / len(binned[0])
    parts = _y_axis(left, top, width, height, highest, y_name)
    shapes = "".join(
        f"M{left + step * i + 0.6:.1f} {top + height:g}V{top + height * (1 - v / highest):.1f}"
        f"h{max(step - 1.2, 0.5):.1f}V{top + height:g}z"
        for i, v in enumerate(binned[0])
    )
    steps = "".join(f"V{top + height * (1 - v / highest):.1f}h{step:.2f}" for v in binned[1])
    parts += [
        f'<path class="bar s0" d="{shapes}"/>',
        f'<path class="even" d="M{left:g} {top + height:g}{steps}V{top + height:g}"/>',
    ]
    every = max(1, math.ceil(len(binned[0]) / 9))
    for i in range(0, len(binned[0]), every):
        parts.append(_text(left + step * (i + 0.5), top + height + 15, str(i * together)))
    each = x_name if together == 1 else f"{x_name}, {together} to a bar"
    parts.append(_text(left + width / 2, top + height + 31, each))
    return _svg(left + width + 8, top + height + 38, label, parts)


def lines(
    x: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
    label: str,
    x_name: str,
    y_name: str,
    *,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    y_log: bool = False,
) -> Html:
    """Lines over an axis of octaves; each has a class, such as `line s0` or `even`. `band` lies between two of them."""
    width, height, left, top = 300.0, 170.0, 50.0, 8.0
    values = [v for _, ys in series for v in ys] + ([v for side in band for v in side] if band else [])
    floor = min(v for v in values if v > 0)  # of a logarithmic axis, where 0 lies at its foot
    lowest, highest = (math.log2(floor), math.log2(max(values))) if y_log else (0.0, max(values) * 1.06)
    x0, x1 = math.log2(x[0]), math.log2(x[-1])

    def at(xv: float, yv: float) -> str:
        y = math.log2(max(yv, floor)) if y_log else yv
        across, up = (math.log2(xv) - x0) / max(x1 - x0, 1e-9), (y - lowest) / max(highest - lowest, 1e-9)
        return f"{left + width * across:.1f} {top + height * (1 - up):.1f}"

    parts = []
    if y_log:
        for octave in range(math.ceil(lowest), math.floor(highest) + 1, max(1, round((highest - lowest) / 6))):
            y = float(at(x[0], 2.0**octave).split()[1])
            parts += [f'<path class="grid" d="M{left:g} {y:.1f}h{width:g}"/>']
            parts.append(_text(left - 6, y + 4, f"{2.0**octave:,g}", anchor="end"))
        parts.append(_text(11, top + height / 2, y_name, turned=True))
    else:
        parts += _y_axis(left, top, width, height, highest, y_name)
    for value in x[:: max(1, math.ceil(len(x) / 7))]:
        parts.append(_text(float(at(value, values[0]).split()[0]), top + height + 15, f"{value:,g}"))
    if band:
        outline = [at(a, b) for a, b in zip(x, band[0], strict=True)]
        outline += [at(a, b) for a, b in zip(reversed(x), reversed(band[1]), strict=True)]
        parts.append(f'<path class="band s0" d="M{"L".join(outline)}z"/>')
    for kind, ys in series:
        parts.append(f'<path class="{kind}" d="M{"L".join(at(a, b) for a, b in zip(x, ys, strict=True))}"/>')
    parts.append(f'<path class="axis" d="M{left:g} {top + height:g}h{width:g}"/>')
    parts.append(_text(left + width / 2, top + height + 31, x_name))
    return _svg(left + width + 22, top + height + 38, label, parts)


# ------------------------------------------------------------------------------------------------------------- parts


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Html:
    # It shrinks with the page, but not below what can still be read; its box scrolls then.
    size = f"max-width:{width:.0f}px;min-width:{min(width, max(280.0, 0.85 * width)):.0f}px"
    return Html(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="{size}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "", turned: bool = False) -> str:
    look = (f' class="{kind}"' if kind else "") + (f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{escape(text)}</text>'


def _y_axis(left: float, top: float, width: float, height: float, highest: float, name: str) -> list[str]:
    """Horizontal lines at round values from 0 on, the axis below, and its name."""
    parts = []
    for value in _round_values(highest):
        y = top + height * (1 - value / highest)
        parts.append(f'<path class="{"grid" if value else "axis"}" d="M{left:g} {y:.1f}h{width:g}"/>')
        parts.append(_text(left - 6, y + 4, f"{value:,g}", anchor="end"))
    return [*parts, _text(11, top + height / 2, name, turned=True)]


def _round_values(highest: float, most: int = 5) -> list[float]:
    """0 and up to `most` multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(highest / most))
    step = next(m * power for m in (1, 2, 5, 10) if highest / (m * power) <= most)
    return [round(i * step, 10) for i in range(int(highest / step + 1e-9) + 1)]


def _ticks(axis: Axis, cells: int, length: float, least: float = 26) -> list[tuple[float, str]]:
    """(position, name) of ticks: in the middle of whole cells, or at round values up to the axis's end."""
    if axis.end is not None:
        return [(length * value / axis.end, _short(value)) for value in _round_values(axis.end)]
    every = max(1, math.ceil(least * cells / length))
    return [(length * (i + 0.5) / cells, str(i)) for i in range(0, cells, every)]


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _png(index_RC: np.ndarray) -> bytes:
    """An indexed PNG: violet that fades out, then orange that fades in, and grey."""
    fade = np.abs(np.arange(-_LEVELS, _LEVELS + 1)) / _LEVELS
    colours = [LESS] * _LEVELS + [MORE] * (_LEVELS + 1) + [(128, 128, 128)]
    alphas = [*(round(255 * 0.95 * f) for f in fade), 60]
    height, width = index_RC.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(index_RC, dtype=np.uint8))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(part for colour in colours for part in colour)),
        (b"tRNS", bytes(alphas)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    found = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        found += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return found
