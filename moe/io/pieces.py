"""Long texts in pieces, cut so that they have the tokens of the whole. The standard library only."""

from collections.abc import Iterator

# A text of more characters than this comes in pieces of PIECE: a tokenizer needs some 175 bytes for each of them.
LONG = 2**20
PIECE = 2**18


def pieces_of(text: str) -> Iterator[str]:
    """A text whole, or in pieces where it is long."""
    begin = 0
    while len(text) - begin > LONG:
        part = text[begin : begin + PIECE + 1]
        cut = place_to_cut(part, PIECE)
        yield part[:cut]
        begin += cut
    yield text[begin:] if begin else text


def place_to_cut(text: str, limit: int) -> int:
    """The last good place in (0, limit] to cut a text of more characters than `limit`.

    Best is after a line feed between two characters that are no spaces, then any before a character that is none, then
    before a space: there GPT-4's pattern, and those of its relatives, begin a token in any case, so that the pieces
    have the tokens of the whole. In a text without such a place, the limit itself.
    """

    def places(mark: str, shift: int) -> Iterator[int]:
        at = text.rfind(mark, 0, limit + 1 - shift)
        while at > 0:
            yield at + shift
            at = text.rfind(mark, 0, at)

    return (
        next((at for at in places("\n", 1) if not text[at].isspace() and not text[at - 2].isspace()), 0)
        or next((at for at in places("\n", 1) if not text[at].isspace()), 0)
        or next((at for at in places(" ", 0) if not text[at - 1].isspace()), 0)
        or limit
    )
