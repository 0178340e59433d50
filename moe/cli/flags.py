"""The flags that several groups of commands share."""

from collections.abc import Iterable
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from moe.errors import ConfigError

# Given or not: there is no --no-NAME.
Flag = FlagCreatePairsOff[bool]
# Repeatable, each with one or more words.
Words = UseAppendAction[tuple[tuple[str, ...], ...]]
Settings = Annotated[Words, arg(name="set", metavar="KEY=VALUE ...")]


def assignments(settings: Iterable[Iterable[str]]) -> list[str]:
    """All the KEY=VALUE of a command's --set, in order."""
    return [assignment for group in settings for assignment in group]


def within(flag: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError where the number of a flag is outside low .. high, as nan and the infinities are."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if value < low else f"at most {high:g}" if value > high else "a number"
        raise ConfigError(f"--{flag} {value}: must be {bound}")
