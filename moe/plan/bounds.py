"""What an argument of the planner may be: a number of a kind, within bounds that no sum over them leaves.

Not a number, infinite, negative, or beyond all that can be built: an error that names argument, value and bounds.
"""

import math
import operator
from typing import Any, SupportsFloat

from moe.io.toml import require

MANY = 10**12  # of tokens, sequences, chips: nobody has as many


def whole(low: int = 1, high: int = MANY, **named: Any) -> None:
    """Each a whole number from `low` to `high`.

    Raises:
        ConfigError: it is none.
    """
    for name, value in named.items():
        try:
            ok = low <= operator.index(value) <= high
        except TypeError:
            ok = isinstance(value, float) and value.is_integer() and low <= value <= high
        require(ok, name, value, f"must be a whole number from {low:,} to {high:,}")


def real(low: float, high: float, rule: str = "", **named: SupportsFloat) -> None:
    """Each a number, or a quantity in base units, from `low` to `high`; `rule` says what it is.

    Raises:
        ConfigError: it is none.
    """
    for name, value in named.items():
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        plain = number if hasattr(value, "dims") else value
        require(low <= number <= high, name, plain, f"{rule or 'must be'} from {low:g} to {high:g}")


def share(**named: SupportsFloat) -> None:
    """Each above 0 and at most 1: a millionth is the least that anything reaches."""
    real(1e-6, 1, "is a share: above 0, at most 1:", **named)


def amount(**named: SupportsFloat) -> None:
    """Each a quantity greater than 0, in base units: tokens, bytes, dollars."""
    real(1e-30, 1e60, "must be greater than 0:", **named)
