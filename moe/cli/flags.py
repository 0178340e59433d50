"""The flags that several groups of commands share."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from moe.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from moe.model import Transformer

# Given or not: there is no --no-NAME.
Flag = FlagCreatePairsOff[bool]
# Repeatable, each with one or more words.
Words = UseAppendAction[tuple[tuple[str, ...], ...]]
Settings = Annotated[Words, arg(name="set", metavar="KEY=VALUE ...")]

# Who guesses tokens for an engine.
Speculative = Annotated[
    str, arg(metavar="NAME", help="Who guesses tokens: none, ngram (the text itself), or a smaller checkpoint.")
]


def assignments(settings: Iterable[Iterable[str]]) -> list[str]:
    """All the KEY=VALUE of a command's --set, in order."""
    return [assignment for group in settings for assignment in group]


def within(flag: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError where the number of a flag is outside low .. high, as nan and the infinities are."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if value < low else f"at most {high:g}" if value > high else "a number"
        raise ConfigError(f"--{flag} {value}: must be {bound}")


def guesser(name: str, device: "torch.device", dtype: "torch.dtype | None" = None) -> "Transformer | str | None":
    """What `Engine` takes for the flag --speculative.

    Args:
        dtype: to cast a checkpoint to; None: as it is stored.

    Raises:
        ConfigError: neither a word that is known nor a directory.
    """
    if name in ("none", "ngram"):
        return None if name == "none" else name
    if not Path(name).is_dir():
        raise ConfigError(f"--speculative {name}: must be none, ngram, or a checkpoint's directory, which this is not")
    from moe import checkpoint

    model = checkpoint.load(name, device=device)
    return model if dtype is None else model.to(dtype)
