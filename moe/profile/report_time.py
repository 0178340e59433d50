"""The report's section on time: a training step's forward and backward, component by component, and its memory.

The pictures are those of step_pictures.py, drawn into the page with its own colours, so that they fit light and dark.
"""

import io
import re
from typing import Any

from torch import Tensor

from moe import figures
from moe.model import Transformer
from moe.profile import step, step_pictures, tables
from moe.profile.markup import Html, Section, figure, table, tag

# A colour of the pictures -> the page's variable for it.
_PAINT = {figures.INK: "ink", figures.MUTED: "muted", figures.GRID: "line"}
_PAINT |= {colour: f"s{i}" for i, colour in enumerate(figures.COLOURS)}


def time_section(model: Transformer, tokens_BS: Tensor, rounds: int) -> Section:
    """Measures forward and backward of `tokens_BS`, int64 [B, S + 1], on the model's device.

    Without matplotlib there are tables, and no pictures.
    """
    run = step.make_run(model, "backward", tokens_BS)
    found = step.profile_step(model, run, rounds=rounds)
    memory = step.trace_step(model, run)
    pictures: list[Html] = []
    try:
        drawn = {"Time and roofline": step_pictures.step_figure(found), "Memory": step_pictures.memory_figure(memory)}
        pictures = [figure(name, "", inline_svg(picture, name)) for name, picture in drawn.items()]
    except ImportError as error:
        pictures = [tag("p", f"No pictures: {error}", class_="terms")]
    says = "Where a forward and backward pass spends its time, beside the least that this machine could take."
    body = [*pictures, table(tables.parts(found)), tag("p", tables.ceilings(found), class_="terms"), _TERMS]
    return Section("Time", says, body)


_TERMS = tag(
    "p",
    "Floor: the greater of FLOP over the rate of a large matrix product and bytes over that of a large copy, both "
    "measured in the same process; of the roofline: floor over time. Up and down: the experts' two products, the "
    "activation with the first; permute and combine: tokens into the order of their experts, and back.",
    class_="terms",
)


def inline_svg(picture: Any, label: str) -> Html:
    """A matplotlib figure as SVG in the page's colours, on no background."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        picture.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for colour, name in _PAINT.items():
        drawing = re.sub(re.escape(colour), f"var(--{name})", drawing, flags=re.IGNORECASE)
    # Sizes in points would fix the width; the page's style sets it.
    drawing = re.sub(r'^<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}"', drawing)
    drawing = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", drawing, count=1)
    drawing = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", drawing, count=1)
    if "aria-label" not in drawing[:400]:
        drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return Html(re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL))
