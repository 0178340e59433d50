"""Text as it streams: whole characters, stop strings never shown, whatever the tokens."""

from hypothesis import given
from hypothesis import strategies as st

from moe.serve.detokenize import TextStream


class Table:
    """A vocabulary of given byte strings; the last id is end-of-text."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eot_id = len(tokens)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


def pieces(tokens: list[bytes], stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(Table(tokens), stop)
    out = [stream.push(i) for i in range(len(tokens))]
    return [*out, stream.finish()], stream


def test_a_character_cut_in_two_waits_for_its_other_half():
    assert pieces(["é".encode()[:1], "é".encode()[1:] + b"a"], [])[0] == ["", "éa", ""]


def test_the_ids_that_end_a_text_are_a_choice():
    for ends, shown in ((None, "ab"), ([0], ""), ([1, 2], "a"), ([], "abc")):
        table = Table([b"a", b"b", b"c"])
        table.eot_id = 2
        text = TextStream(table, ends=ends)
        assert "".join([*map(text.push, range(3)), text.finish()]) == shown


def test_half_a_character_at_the_end_is_replaced():
    assert pieces([b"a", "é".encode()[:1]], [])[0] == ["a", "", "\ufffd"]


def test_the_beginning_of_a_stop_string_waits():
    assert pieces([b"one \n", b"\n", b"two"], ["\n\n"])[0] == ["one ", "", "", ""]
    assert pieces([b"one \n", b"two"], ["\n\n"])[0] == ["one ", "\ntwo", ""]


def test_end_of_text_ends_and_is_not_shown():
    stream = TextStream(Table([b"a\n"]), ["\n\n"])
    assert [stream.push(i) for i in (0, 1, 0)] == ["a", "\n", ""]
    assert stream.done


@given(
    st.text(alphabet="abé日\n", max_size=40),
    st.lists(st.integers(1, 3), min_size=40, max_size=160),
    st.lists(st.text(alphabet="abé\n", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_are_the_text_up_to_a_stop_string(text, cuts, stop):
    raw, tokens = text.encode(), []
    for n in cuts:
        tokens.append(raw[:n])
        raw = raw[n:]
    tokens.append(raw)
    out, _ = pieces(tokens, stop)
    joined = "".join(out)
    assert not any(s in joined for s in stop)
    if any(s in text for s in stop):
        assert any(text.startswith(joined + s) for s in stop)
    else:
        assert joined == text
