"""What a run shows: plain lines for pipes and files, a live line of progress on a terminal.

`Reporter` is what the loop calls. `Lines` prints; `Live` needs rich, which the command line has.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol


class Reporter(Protocol):
    """The events of a run, in order. Records are those of metrics.jsonl."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> None: ...
    def start(self, steps: int, step: int, tokens_per_byte: float) -> None:
        """The run of `steps` steps is ready to make the one after `step`."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def step(self, step: int) -> None:
        """A step is done; called for each, so it must be cheap."""

    def train(self, record: dict[str, Any], seconds_per_step: float) -> None:
        """A log point."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """Held-out bits per byte."""

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Text that the model wrote."""

    def saved(self, step: int, place: Path) -> None:
        """A checkpoint is on disk."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Long work other than steps."""

    def finish(self, summary: dict[str, Any], run_dir: Path) -> None:
        """The run is complete."""


class Lines:
    """One line per event, without control characters."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens_per_byte = 0.0
        self._last_progress = 0.0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, steps: int, step: int, tokens_per_byte: float) -> None:
        self.steps, self.tokens_per_byte = steps, tokens_per_byte

    def note(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: int) -> None:
        pass

    def train(self, record: dict[str, Any], seconds_per_step: float) -> None:
        self.note(f"step {record['step']}/{self.steps}  {train_line(record, self.tokens_per_byte)}"
                  f"  ETA {clock((self.steps - record['step']) * seconds_per_step)}")  # fmt: skip

    def evaluation(self, record: dict[str, Any]) -> None:
        self.note(evaluation_line(record))

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        for sample in samples:
            self.note(f"sample at step {step}, {prompt_name(sample)}:\n{indented(sample)}")

    def saved(self, step: int, place: Path) -> None:
        self.note(f"saved {place}")

    def progress(self, what: str, done: int, total: int) -> None:
        if done < total and time.monotonic() - self._last_progress < 10:
            return
        self._last_progress = time.monotonic()
        self.note(f"{what}: {done:,} of {total:,}")

    def finish(self, summary: dict[str, Any], run_dir: Path) -> None:
        self.note(summary_text(summary, run_dir))


class Live:
    """Two live lines, a bar and the latest figures, under the lines that stay."""

    def __init__(self) -> None:
        from rich.console import Console, Group
        from rich.live import Live as LiveDisplay
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        self.console = Console(highlight=False)
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.figures = Text("", no_wrap=True, overflow="ellipsis")
        self.display = LiveDisplay(Group(self.bar, self.figures), console=self.console, refresh_per_second=8)
        self.lines = Lines()
        self._task: Any = None
        self._what = ""

    def __enter__(self) -> "Live":
        self.display.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.display.stop()

    def start(self, steps: int, step: int, tokens_per_byte: float) -> None:
        self.lines.start(steps, step, tokens_per_byte)
        self._show("training", step, steps, "steps")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int) -> None:
        self.bar.update(self._task, completed=step)

    def train(self, record: dict[str, Any], seconds_per_step: float) -> None:
        left = clock((self.lines.steps - record["step"]) * seconds_per_step)
        self.bar.update(self._task, completed=record["step"], text=f"steps, {left} left")
        self.figures.plain = train_line(record, self.lines.tokens_per_byte)

    def evaluation(self, record: dict[str, Any]) -> None:
        self.note(evaluation_line(record))

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        for sample in samples:
            self.console.rule(f"sample at step {step}, {prompt_name(sample)}", align="left")
            self.note(indented(sample))

    def saved(self, step: int, place: Path) -> None:
        self.note(f"saved {place}")

    def progress(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, "tokens")

    def finish(self, summary: dict[str, Any], run_dir: Path) -> None:
        from rich.table import Table

        table = Table(title="held-out bits per byte (lower is better)", title_justify="left")
        table.add_column("")
        table.add_column("bits/byte", justify="right")
        for name, value in {**summary["bits_per_byte"], **compressors(summary)}.items():
            table.add_row(name, f"{value:.3f}", style="bold" if name == "total" else "")
        self.console.print(table)
        self.note(places(summary, run_dir))

    def _show(self, what: str, done: int, total: int, text: str) -> None:
        """One bar at a time."""
        if what != self._what:
            if self._task is not None:
                self.bar.remove_task(self._task)
            self._task, self._what = self.bar.add_task(what, total=total, text=text), what
        self.bar.update(self._task, completed=done)


class Unbroken:
    """Hands all events on. Where nobody can read them any more once a signal came, they are dropped: a closed terminal
    must not keep a run from saving.

    Args:
        stopping: whether a signal came.
    """

    def __init__(self, reporter: Reporter, stopping: Callable[[], bool]) -> None:
        self._reporter, self._stopping = reporter, stopping

    def __enter__(self) -> Any:
        self._reporter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._unless_gone(self._reporter.__exit__, *error)

    def __getattr__(self, name: str) -> Any:
        return partial(self._unless_gone, getattr(self._reporter, name))

    def _unless_gone(self, event: Callable[..., None], *args: Any, **more: Any) -> None:
        try:
            event(*args, **more)
        except OSError:
            if not self._stopping():
                raise
            # What print still holds would be written, in vain and for another status, when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reporter() -> Reporter:
    """`Live` on a terminal, else `Lines`."""
    return Live() if sys.stdout.isatty() else Lines()


def train_line(record: dict[str, Any], tokens_per_byte: float) -> str:
    """The figures of a log point."""
    bits = record["lm"] / math.log(2) * tokens_per_byte
    return (
        f"loss {record['loss']:.4f}  {bits:.3f} bits/byte  {record['tokens_per_second']:,.0f} tokens/s  "
        f"MFU {record['mfu']:.1%}  busiest expert {record['load_max_over_mean']:.2f}x"
    )


def evaluation_line(record: dict[str, Any]) -> str:
    """The figures of an evaluation."""
    parts = "  ".join(f"{name} {value:.3f}" for name, value in record["bits_per_byte"].items())
    return f"step {record['step']}  held-out bits/byte: {parts}"


def compressors(summary: dict[str, Any]) -> dict[str, float]:
    """The reference compressors under the names of their commands."""
    flags = {"gzip": "gzip -9", "xz": "xz -9e"}
    return {flags[name]: value for name, value in summary["compression"].items()}


def summary_text(summary: dict[str, Any], run_dir: Path) -> str:
    """The end of a run in plain text."""
    rows = {**summary["bits_per_byte"], **compressors(summary)}
    table = "\n".join(f"  {name:<12} {value:.3f}" for name, value in rows.items())
    return f"held-out bits per byte (lower is better):\n{table}\n{places(summary, run_dir)}"


def places(summary: dict[str, Any], run_dir: Path) -> str:
    """Where everything is."""
    final, pictures = run_dir / "final", run_dir / "pictures"
    drawn = f", pictures in {pictures}" if pictures.is_dir() else ""
    try_ = f"moe chat {final}" if summary.get("chat") else f'moe generate {final} --prompt "Once"'
    return f"{summary['tokens']:,} tokens in {clock(summary['train_seconds'])}; model in {final}{drawn}\ntry: {try_}"


def prompt_name(sample: dict[str, str]) -> str:
    """The prompt on one line."""
    return repr(sample["prompt"]) if sample["prompt"] else "no prompt"


def indented(sample: dict[str, str]) -> str:
    """A sample, set off from the log and free of control characters, which a young model does write."""
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in sample["prompt"] + sample["text"])
    return "\n".join("  | " + line for line in text.splitlines())


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"
