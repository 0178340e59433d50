"""Who guesses the next tokens, and the guess that costs nothing: what followed in the request's own text. No torch."""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from moe.serve.request import Request

if TYPE_CHECKING:
    from torch import Tensor


class Proposal(NamedTuple):
    """Guesses at a request's next tokens, and what each was drawn from; None: they were named without chance."""

    drafts: list[int]
    q_KV: "Tensor | None" = None


class Proposer(Protocol):
    """Who guesses. Whatever it says, and whatever it has kept, tokens are distributed as without it."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        """For each request, at its newest token, so many guesses at most."""
        ...

    def behind(self, request: Request) -> int:
        """Tokens of the request that the proposer has to compute before it can guess at it."""
        ...

    def forget(self, request: Request) -> None:
        """The request is done, or has lost its keys and values."""
        ...


class NGram:
    """The request's own text: what followed the last time that its end stood in it (prompt lookup, Saxena 2023)."""

    def __init__(self) -> None:
        self._texts: dict[Request, _Text] = {}

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        """See `Proposer`."""
        return [Proposal(self._text(r).next(r.tokens, n) if n else []) for r, n in zip(requests, counts, strict=True)]

    def behind(self, request: Request) -> int:
        """Nothing is computed."""
        return 0

    def forget(self, request: Request) -> None:
        """See `Proposer`."""
        self._texts.pop(request, None)

    def _text(self, request: Request) -> "_Text":
        text = self._texts.get(request)
        if text is None:
            text = self._texts[request] = _Text()
        return text


class _Text:
    """Where each token of a growing text stood, as chains of places: where it stood last, and before that, and so on.

    A step of a long text costs as little as one of a short text.
    """

    longest = 3  # tokens of the end that have to agree, at most
    tries = 32  # of the last places of the newest token

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._before = array("i")

    def next(self, tokens: Sequence[int], n: int) -> list[int]:
        """`n` tokens that may follow; none where the newest token is new. `tokens` only ever grow."""
        for i in range(len(self._before), len(tokens)):
            self._before.append(self._last.get(tokens[i], -1))
            self._last[tokens[i]] = i
        best, place = 0, -1
        at, end = self._before[-1], len(tokens) - 1
        for _ in range(self.tries):
            if at < 0:
                break
            size = 1
            while size < self.longest and size <= at and tokens[at - size] == tokens[end - size]:
                size += 1
            if size > best:
                best, place = size, at
            if best == self.longest:
                break
            at = self._before[at]
        if place < 0:
            return []
        # A text that repeats itself reaches its own end; it then goes on as it did before.
        period, found = end - place, list(tokens[place + 1 : place + 1 + n])
        while len(found) < n:
            found.append(found[-period])
        return found
