"""What commands show: text as it comes, tables, JSON and CSV, and one result of the planner explained.

rich is imported on use, so that --json does not wait for it.
"""

import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from moe.cli.flags import Flag

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from moe.plan.quantities import Sheet
    from moe.profile.tables import Table


def write(text: str) -> None:
    """Writes to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Text for a terminal: a model may write escape sequences. What goes to a file or a pipe is left as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def progress_bar(transient: bool = False) -> "Progress":
    """rich's bar for a piece of work whose size is known, on a terminal; nothing in a pipe."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not sys.stdout.isatty(), transient=transient)


# ------------------------------------------------------------------------------------------------------------- tables


def console(stderr: bool = False) -> "Console":
    """Where a command prints: as wide as the terminal, or COLUMNS where that is set; a pipe has no width to fit."""
    from rich.console import Console

    free = not os.environ.get("COLUMNS", "").isdigit() and not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(highlight=False, stderr=stderr, width=200 if free else None)


def draw_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = (), bold: str = ""
) -> None:
    """Prints a table under its title; columns named in `words` are set left and may be folded, the others right; the
    row that begins with `bold` stands out.

    Where that is too wide, each row is a paragraph, a line for each column: no figure is ever cut.
    """
    from rich.measure import Measurement
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn()
    for i, name in enumerate(columns):
        word = name in words
        longest = max((len(part) for row in rows for part in row[i].split()), default=0)
        drawn.add_column(
            name, justify="left" if word else "right", no_wrap=not word, overflow="fold",
            min_width=min(longest, 40) if word else None,
        )  # fmt: skip
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row), style="bold" if bold and row[0] == bold else "")
    to = console()
    to.print(Text(title), soft_wrap=True)
    if Measurement.get(to, to.options.update(width=10_000), drawn).minimum <= to.width:
        to.print(drawn)
        return
    wide = max(map(len, columns))
    for row in rows:
        to.print()
        for name, cell in zip(columns, row, strict=True):
            to.print(Text(f"{name:{wide}}  {cell}"), soft_wrap=True)


def check_pictures(place: Path | None) -> None:
    """Before the work: raises ImportError where pictures are asked for and cannot be drawn."""
    if place is not None:
        from moe.io import figures

        figures.require()


def print_notices(console: "Console", notices: Sequence[str]) -> None:
    """What there is to say about data that were read, a line each."""
    for notice in notices:
        console.print(f"notice: {notice}", markup=False, soft_wrap=True)


def print_left_out(console: "Console", what: str, skipped: Sequence[str]) -> None:
    """How many names were left out since they are `what`, and the first of them."""
    if skipped:
        shown = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        console.print(f"{what}, left out: {len(skipped):,} ({shown})", markup=False, soft_wrap=True)


def print_table(table: "Table") -> None:
    """Prints a table of a profile."""
    draw_table(table.title, table.columns, table.rows, table.words)


# ---------------------------------------------------------------------------------------------------- planner's sheets

WORDS = {  # columns of words; the others hold numbers
    *("", "note", "claim", "computed", "id", "verdict", "layout", "hardware", "strategy", "attention", "weights"),
}


@dataclass(frozen=True)
class Show:
    """How results are shown."""

    json: Annotated[Flag, arg(help="Print JSON.")] = False
    csv: Annotated[Path | None, arg(help="Write the results to this CSV file.")] = None
    explain: Annotated[str | None, arg(help="Print a result's formula, with the numbers.", metavar="KEY")] = None


Output = Annotated[Show, OmitArgPrefixes, arg(name="")]
SHOW = Show()


def show_sheet(title: str, sheet: "Sheet", show: Show, contract: dict[str, Any] | None = None) -> int:
    """A sheet as a table, JSON or CSV, or one result explained."""
    if show.explain is not None:
        print(sheet.explain(show.explain))
    elif show.json:
        quantities = {key: q.as_dict() for key, q in sheet.items()}
        print_json({**contract, "quantities": quantities} if contract is not None else quantities)
    else:
        rows = [[key, str(q), q.note] for key, q in sheet.items() if not _inner_stage(key, sheet)]
        draw_table(title, ["", "value", "note"], rows, WORDS)
        if len(rows) < len(sheet):
            print("stages between the second and the last are left out; --json and --csv have them")
        assumptions = sorted({a for q in sheet.values() for a in q.assumptions})
        if assumptions:
            print(f"assumes: {', '.join(assumptions)}")
    if show.csv is not None:
        lines: list[dict[str, Any]] = []
        for key, q in sheet.items():
            d = q.as_dict()
            low, high = d.get("interval", (d["value"], d["value"]))
            lines.append({"key": key, "value": d["value"], "unit": d["unit"], "lo": low, "hi": high})
        write_csv(lines, show.csv)
    return 0


def _inner_stage(key: str, sheet: "Sheet") -> bool:
    """Whether a result is that of a pipeline stage between the second and the last: most of these are alike."""
    stage = key.partition(".")[0].removeprefix("stage")
    return stage.isdigit() and int(stage) > 1 and any(other.startswith(f"stage{int(stage) + 1}.") for other in sheet)


def show_rows(
    title: str, rows: Sequence[Mapping[str, Any]], show: Show, shown: Sequence[Mapping[str, Any]] | None = None
) -> int:
    """Rows as a table (of those `shown`, where they are given), JSON or CSV."""
    from moe.plan.quantities import number

    if show.json:
        print_json(list(rows))
    else:
        listed = rows if shown is None else shown
        cells = [
            [number(v) if isinstance(v, int | float) and not isinstance(v, bool) else _word(v) for v in row.values()]
            for row in listed
        ]
        draw_table(title, list(listed[0]) if listed else [], cells, WORDS)
    write_csv(rows, show.csv)
    return 0


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def print_json(content: Any) -> None:
    """Print JSON; what is not finite is refused."""
    print(json.dumps(content, indent=1, allow_nan=False))


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Write rows of the same columns as CSV, where a path is given."""
    if path is None:
        return
    from moe.plan.sweeps import to_csv

    path.write_text(to_csv([dict(row) for row in rows]), encoding="utf-8")
    print(f"csv: {path}", file=sys.stderr)
