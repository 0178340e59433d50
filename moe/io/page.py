"""HTML pages: markup that cannot be forgotten to escape, tables, figures, and the page around the sections.

The page holds everything itself (style, script, pictures), and forbids the browser to fetch anything.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

_PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Table:
    """Cells as text, row by row. Columns named in `words` hold words and are set left, the others right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    words: tuple[str, ...] = ()


class Html(str):
    """Markup. Any other string is text, which `html` escapes."""


@dataclass(frozen=True)
class Section:
    """A part of a page: its title, a sentence on what is seen, then pictures and tables."""

    title: str
    says: str
    body: Sequence[Html]


def html(content: str) -> Html:
    """Markup as it is, text escaped."""
    return content if isinstance(content, Html) else Html(escape(content))


def tag(name: str, *content: str, **attributes: str) -> Html:
    """An element; `class_` and `aria_label` are the attributes class and aria-label."""
    given = "".join(f' {key.strip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(map(html, content))}</{name}>")


def table(t: Table, prose: bool = False) -> Html:
    """A table in a box of its own that scrolls where the page is narrower; `prose` breaks the lines of its words."""
    sides = ["w" if name in t.words else "n" for name in t.columns]
    head = tag("tr", *(tag("th", name, class_=side, scope="col") for name, side in zip(t.columns, sides, strict=True)))
    rows = [tag("tr", *(tag("td", c, class_=side) for c, side in zip(r, sides, strict=True))) for r in t.rows]
    whole = tag("table", tag("caption", t.title), tag("thead", head), tag("tbody", *rows))
    # Reachable by keyboard, as it may have to be scrolled.
    return tag(
        "div", whole, class_="scroll prose" if prose else "scroll", tabindex="0", role="region", aria_label=t.title
    )


def folded(title: str, *content: Html, is_open: bool = False) -> Html:
    """What opens on a click."""
    opening = Html("<details open>" if is_open else "<details>")
    return Html(f"{opening}{tag('summary', title)}{''.join(content)}</details>")


def figure(title: str, subtitle: str, picture: Html) -> Html:
    """A picture under its title."""
    caption = tag("figcaption", tag("b", title), " ", tag("span", subtitle))
    return tag("figure", caption, tag("div", picture, class_="scroll"))


def png(content: bytes, alt: str) -> Html:
    """A picture that the page holds."""
    return Html(f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">')


def panels(figures: Iterable[Html]) -> Html:
    """Figures side by side, as many as fit; four stand two by two."""
    shown = list(figures)
    return tag("div", *shown, class_="panels four" if len(shown) == 4 else "panels")


def key(entries: Iterable[tuple[str, str]]) -> Html:
    """What colours mean: (class, text)."""
    return tag("p", *(tag("span", tag("i", class_=name), text) for name, text in entries), class_="key")


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    numbered = [(f"s{i}", section) for i, section in enumerate(sections, 1)]
    links = [tag("a", section.title, href=f"#{anchor}") for anchor, section in numbered]
    parts = [
        tag("section", tag("h2", s.title), tag("p", s.says, class_="says"), *s.body, id=anchor)
        for anchor, s in numbered
    ]
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=html(title), subtitle=html(subtitle), links="".join(links), sections="\n".join(parts)
    )
