"""Who guesses the next tokens: the request's own text, or a smaller model."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from moe.serve.request import Request


class Proposal(NamedTuple):
    """Guesses at a request's next tokens, and what each was drawn from; None: they were named without chance."""

    drafts: list[int]
    q_KV: Tensor | None = None


class Proposer(Protocol):
    """Who guesses."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        """For each request, at its newest token, so many guesses at most."""
        ...

    def forget(self, request: Request) -> None:
        """The request is done, or has lost its keys and values."""
        ...


class NGram:
    """The request's own text: what followed the last time that its end stood in it (prompt lookup)."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        """See `Proposer`."""
        return [Proposal(ngram(r.tokens, n) if n else []) for r, n in zip(requests, counts, strict=True)]

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def ngram(tokens: Sequence[int], n: int, longest: int = 3, window: int = 2048) -> list[int]:
    """Up to `n` tokens that followed the last time the text's end stood in it, the longest end first (prompt lookup).

    Args:
        longest: tokens of the end that have to agree, at most. window: how far back to look.
    """
    text = list(tokens[-window:])
    for size in range(min(longest, len(text) - 1), 0, -1):
        end = text[-size:]
        for i in range(len(text) - size - 1, -1, -1):
            if text[i : i + size] == end:
                return text[i + size : i + size + n]
    return []
