"""Tables of text on the terminal, drawn by rich, which is imported on use."""

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.profile.tables import Table


def draw_table(title: str, columns: list[str], rows: list[list[str]], words: Collection[str] = ()) -> None:
    """Prints a table under its title; columns named in `words` are set left, the others right."""
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn()
    for name in columns:
        drawn.add_column(name, justify="left" if name in words else "right")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    # A pipe has no width to fit.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(Text(title), soft_wrap=True)
    console.print(drawn)


def print_table(table: "Table") -> None:
    """Prints a table of a profile."""
    draw_table(table.title, table.columns, table.rows, table.words)
