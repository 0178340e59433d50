"""Text from tokens as they come: whole characters, and of stop strings nothing."""

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol


class Vocabulary(Protocol):
    """What is needed of a `moe.tokenizer.Tokenizer`."""

    eot_id: int

    @property
    def vocab_size(self) -> int: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class TextStream:
    """The text of a growing sequence of tokens, in pieces that are safe to print at once.

    The pieces, joined, are the decoded text up to the first stop string or end-of-text, which are left out. Bytes that
    are not UTF-8 become U+FFFD, as in `Tokenizer.decode`.

    Args:
        stop: strings that end the text; where two end at the same token, the one that begins first counts.
        ends: ids that end the text; None: end-of-text. Another special token shows its name.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, tokenizer: Vocabulary, stop: Sequence[str] = (), ends: Collection[int] | None = None) -> None:
        if "" in stop:
            raise ValueError("stop = '': an empty stop string would end every text before it begins; leave it out")
        self.done = False
        self._tokenizer = tokenizer
        self._stop = list(stop)
        self._ends = {tokenizer.eot_id} if ends is None else set(ends)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token_id: int, may_end: bool = True) -> str:
        """Takes one token; returns what may be printed now, often nothing. After `done` it takes no more.

        Args:
            may_end: whether a stop string that this token completes ends the text.
        """
        if self.done:
            return ""
        if token_id in self._ends:
            return self.finish()
        if token_id >= self._tokenizer.vocab_size:
            return ""  # a model may have more ids than its tokenizer; they stand for no text
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id)), may_end)

    def finish(self) -> str:
        """Ends the text; returns what was held back."""
        if self.done:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if not self.done:  # a held beginning of a stop string that never came
            text, self._held, self.done = text + self._held, "", True
        return text

    def _release(self, new: str, may_end: bool = True) -> str:
        text, held = self._held + new, len(self._held)
        # Only what the new text completes: another stop string may stand in what was held, from when none could end.
        begins = [i for s in self._stop if (i := text.find(s, max(0, held + 1 - len(s)))) >= 0]
        if begins and may_end:
            self.done, self._held = True, ""
            return text[: min(begins)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
