"""The report's section on time: a training step's forward and backward, component by component, and its memory.

The pictures are those of step_pictures.py, drawn into the page with its own colours, so that they fit light and dark.
"""

import io
import re
from html import escape
from typing import Any

from torch import Tensor

from moe.io import figures
from moe.io.page import Html, Section, table, tag
from moe.model import Transformer
from moe.profile import step, step_pictures, tables

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
    try:
        times, curve = step_pictures.step_figure(found), step_pictures.memory_figure(memory)
        drawn = {
            "Time of each component with its floor, and each component under the roofline": times,
            "Allocated memory over the step, by phase": curve,
        }
        pictures = [tag("figure", tag("div", inline_svg(f, said), class_="scroll")) for said, f in drawn.items()]
    except ImportError as error:
        pictures = [tag("p", f"No pictures: {error}", class_="terms")]
    says = "Where a forward and backward pass spends its time, beside the least that this machine could take."
    said = [tag("p", line, class_="terms") for line in tables.ceilings(found).splitlines()]
    return Section("Time", says, [*pictures, table(tables.parts(found)), *said, _TERMS])


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
    for colour, name in _PAINT.items():
        drawing = re.sub(re.escape(colour), f"var(--{name})", drawing, flags=re.IGNORECASE)
    # Its own opening tag fixes a size and names a version of XML; the page's style sets the width.
    box = re.search(r'viewBox="[^"]*"', drawing)
    assert box is not None
    inside = drawing[drawing.index(">", box.end()) + 1 :]
    width = picture.get_figwidth() * 72
    opening = f'<svg {box[0]} style="max-width:{width:.0f}px" role="img" aria-label="{escape(label)}">'
    return Html(opening + re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL))
