"""Tables of text on the terminal, drawn by rich."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.profile.tables import Table


def print_table(table: "Table") -> None:
    """Draws a table; a pipe gets it 200 columns wide."""
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn()
    for name in table.columns:
        drawn.add_column(name, justify="left" if name in table.words else "right")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    # A pipe has no width to fit.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(Text(table.title), soft_wrap=True)
    console.print(drawn)
