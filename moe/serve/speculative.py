"""Who guesses the next tokens: the request's own text, or a smaller model."""

from collections.abc import Sequence


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
