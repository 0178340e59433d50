"""Efficiency constants from measured steps, and how well they predict steps that they have not seen.

A row of measurements holds what a step computes and moves, and how long it took: seconds = flop / rate + bytes /
bandwidth. Training appends one to plan.csv in the run's directory, `moe profile step` to plan.csv beside its --out.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import ConfigError
from moe.io.toml import shown

FILE = "plan.csv"
COLUMNS = ("kind", "name", "device", "dtype", "tokens", "flop", "bytes", "seconds", "memory", "predicted_memory")


@dataclass(frozen=True)
class Step:
    """One measured step."""

    kind: str
    name: str
    device: str
    dtype: str
    flop: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What was fitted. `rate` in FLOP/s and `bandwidth` in byte/s, infinite where it does not limit."""

    rate: float
    bandwidth: float
    steps: list[Step]
    predicted: list[float]  # seconds, fitted on all steps
    held_out: list[float]  # seconds, each predicted from the other steps alone

    def error(self, held_out: bool = True) -> float:
        """Mean relative deviation of predicted from measured seconds."""
        guesses = self.held_out if held_out else self.predicted
        pairs = [(g, s.seconds) for g, s in zip(guesses, self.steps, strict=True) if math.isfinite(g)]
        return sum(abs(g / t - 1) for g, t in pairs) / len(pairs) if pairs else math.nan


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Append a row of COLUMNS to a CSV file, which gets its header when it is new."""
    place = Path(path)
    new = not place.is_file()
    with place.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_steps(path: str | Path) -> list[Step]:
    """Measured steps of a CSV file with at least the columns flop and seconds.

    Raises:
        ConfigError: no such file, a column missing, a value that is not a positive number.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return [_step(row, f"{path}, row {i + 1}") for i, row in enumerate(rows)]


def _step(row: dict[str, str], place: str) -> Step:
    def positive(key: str, default: float | None = None) -> float:
        text = row.get(key) or ""
        if not text and default is not None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (1e-30 < value < 1e60 or (default is not None and value == 0)):
            raise ConfigError(f"{place}: {key} = {shown(text)}: must be a number greater than 0")
        return value

    text = {key: row.get(key) or "" for key in ("kind", "name", "device", "dtype")}
    return Step(**text, flop=positive("flop"), bytes=positive("bytes", 0.0), seconds=positive("seconds"))


def calibrate(steps: Sequence[Step]) -> Calibration:
    """Fit rate and bandwidth by least squares of relative deviations, both kept positive.

    Raises:
        ConfigError: fewer than two steps: nothing would be held out.
    """
    if len(steps) < 2:
        raise ConfigError(f"{len(steps)} measured steps: at least 2 are needed, one to fit on and one to hold out")
    rate, bandwidth = _fit(steps)
    held_out = [_seconds(step, *_fit([s for j, s in enumerate(steps) if j != i])) for i, step in enumerate(steps)]
    return Calibration(rate, bandwidth, list(steps), [_seconds(s, rate, bandwidth) for s in steps], held_out)


def _seconds(step: Step, rate: float, bandwidth: float) -> float:
    return step.flop / rate + step.bytes / bandwidth


def _fit(steps: Iterable[Step]) -> tuple[float, float]:
    """The two positive constants that minimise sum of (predicted / measured - 1)^2."""
    ratios = [(s.flop / s.seconds, s.bytes / s.seconds) for s in steps]
    xx, yy, xy = (sum(f(x, y) for x, y in ratios) for f in (lambda x, y: x * x, lambda x, y: y * y, lambda x, y: x * y))
    sx, sy = sum(x for x, _ in ratios), sum(y for _, y in ratios)
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        a, b = (sx * yy - sy * xy) / determinant, (sy * xx - sx * xy) / determinant
        if a > 0 and b > 0:
            return 1 / a, 1 / b
    # One of them would be negative, or the two cannot be told apart: the one that alone fits better.
    only_x, only_y = sx / xx, sy / yy if yy else math.inf
    loss_x = sum((only_x * x - 1) ** 2 for x, _ in ratios)
    loss_y = sum((only_y * y - 1) ** 2 for _, y in ratios) if yy else math.inf
    return (1 / only_x, math.inf) if loss_x <= loss_y else (math.inf, 1 / only_y)
