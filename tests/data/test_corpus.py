"""What is held out: a part of few documents, one of many, a fraction, text of its own; long documents in pieces."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data import TokenData, is_held_out, parse_source, prepare, rows
from moe.data.corpus import _line_break
from moe.data.rows import text_pieces
from moe.data.sources import read_pieces
from moe.errors import DataError
from moe.io import pieces
from moe.io.pieces import PIECE, pieces_of
from moe.tokenizer import Tokenizer, cl100k, train_bpe
from tests.data.small_corpus import WORDS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([" ".join(WORDS) * 30], 280)


def prose(n_lines: int, seed: int = 0, words: int = 9) -> str:
    rng = random.Random(seed)
    return "".join(" ".join(rng.choice(WORDS) for _ in range(words)) + "\n" for _ in range(n_lines))


def stored(data: TokenData, split: str) -> dict[str, str]:
    """The text of each document, from its tokens."""
    found = {}
    for source in data.sources:
        table, stream = data.documents(source, split), data.tokens(source, split)
        for name, begin, n, n_bytes in zip(table.names, table.offsets, table.n_tokens, table.n_bytes, strict=True):
            ids = stream[int(begin) : int(begin + n)].tolist()
            assert ids.pop() == data.eot_id
            found[f"{source}/{name}"] = data.tokenizer().decode_bytes(ids).decode()
            assert len(found[f"{source}/{name}"].encode()) == n_bytes
    return found


def make(out: Path, sources: list[Path], tokenizer: Tokenizer | None, **how) -> tuple[TokenData, list[str]]:
    info = prepare(sources, out, tokenizer=tokenizer, **{"vocab_size": 280, **how})
    assert {s: [i.documents for i in splits.values()] for s, splits in info.splits.items()} == {
        s: [
            len(info_of)
            for info_of in (TokenData.open(out).documents(s, "train"), TokenData.open(out).documents(s, "val"))
        ]
        for s in info.splits
    }
    return TokenData.open(out), info.notices


HELD_OUT = next(f"{i}.txt" for i in itertools.count() if is_held_out(f"{i}.txt"))


@pytest.mark.parametrize("name", ["book.txt", HELD_OUT])
def test_one_text_file(tmp_path: Path, name: str) -> None:
    """Its last twentieth is held out, from a line break on, whatever side its name would be on."""
    assert not is_held_out("book.txt")
    text = prose(2000)
    (tmp_path / name).write_text(text)
    data, notices = make(tmp_path / "out", [tmp_path / name], None)
    (train,), (held_out,) = stored(data, "train").values(), stored(data, "val").values()
    assert train + held_out == text
    assert train.endswith("\n")
    assert len(held_out) / len(text) == pytest.approx(0.05, abs=0.001)
    assert data.tokenizer().fingerprint == train_bpe([train], 280).fingerprint
    assert data.index["sources"][Path(name).stem]["val"]["bytes"] == len(held_out)
    assert (data.path / "heldout.bin").read_text() == held_out
    assert "the last 0.05 of its document is held out" in notices[0]
    assert "little text is held out" in notices[1]
    assert prepare([tmp_path / name], tmp_path / "out", vocab_size=280).reused
    with pytest.raises(DataError, match="other sources or settings"):
        prepare([tmp_path / name], tmp_path / "out", vocab_size=280, validation=0.1)


def test_fractions_of_few_and_of_many(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for n in (3, 60):
        (tmp_path / str(n)).mkdir()
        for i in range(n):
            (tmp_path / str(n) / f"{i}.txt").write_text(prose(100, seed=i))
    few, _ = make(tmp_path / "a", [tmp_path / "3"], tokenizer, validation=0.2)
    for i in range(3):
        parts = [stored(few, split)[f"3/{i}.txt"] for split in ("train", "val")]
        assert "".join(parts) == prose(100, seed=i)
        assert len(parts[1]) == pytest.approx(0.2 * len(prose(100, seed=i)), rel=0.1)
    held_out = {}
    for fraction in (0.1, 0.4, "0.4"):
        many, _ = make(tmp_path / f"b{fraction}", [tmp_path / "60"], tokenizer, validation=fraction)
        held_out[fraction] = set(stored(many, "val"))
        assert len(stored(many, "train")) + len(held_out[fraction]) == 60
        assert set(stored(many, "val").values()) <= {prose(100, seed=i) for i in range(60)}
        assert len(held_out[fraction]) == pytest.approx(60 * float(fraction), abs=5 * (60 * 0.25) ** 0.5)
    assert held_out[0.1] < held_out[0.4] == held_out["0.4"]


def test_one_document_of_many_where_the_rule_chose_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "many").mkdir()
    names = list(itertools.islice((f"{i}.txt" for i in itertools.count() if not is_held_out(f"{i}.txt")), 25))
    for name in names:
        (tmp_path / "many" / name).write_text(prose(5, seed=int(name[:-4])))
    data, notices = make(tmp_path / "out", [tmp_path / "many"], tokenizer)
    assert len(stored(data, "val")) == 1
    assert len(stored(data, "train")) == 24
    assert "alone is held out" in notices[0]


@pytest.mark.parametrize("of", ["only source", "name", "own name", "inside"])
def test_text_of_its_own_is_held_out(tmp_path: Path, tokenizer: Tokenizer, of: str) -> None:
    """And all else is trained on, also what the rule would hold out."""
    (tmp_path / "mine").mkdir()
    for i in range(30):
        (tmp_path / "mine" / f"{i}.txt").write_text(prose(5, seed=i))
    place = tmp_path / "mine" / "held" if of == "inside" else tmp_path / "held"
    place.mkdir()
    for i in (1, 2):
        (place / f"{i}.txt").write_text(prose(200, seed=100 + i))
    (tmp_path / "other.txt").write_text(prose(9, seed=50))
    sources = [tmp_path / "mine", *([tmp_path / "other.txt"] if of in ("name", "own name") else [])]
    validation = f"mine={place}" if of == "name" else place
    data, notices = make(tmp_path / "out", sources, tokenizer, validation=validation)
    source = "held" if of == "own name" else "mine"
    expected = {f"{source}/{i}.txt": prose(200, seed=100 + i) for i in (1, 2)}
    assert stored(data, "val") == expected
    train = {f"mine/{i}.txt": prose(5, seed=i) for i in range(30)}
    assert stored(data, "train") == train | ({"other/other.txt": prose(9, seed=50)} if len(sources) > 1 else {})
    assert not any("held out for validation" in notice or "for training" in notice for notice in notices)
    with pytest.raises(DataError, match="other sources or settings"):
        prepare(sources, tmp_path / "out", tokenizer=tokenizer)
    assert prepare(sources, tmp_path / "out", tokenizer=tokenizer, validation=validation).reused


def test_a_relative_path_is_no_name(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of what is named is held out, also where its files are named after a test set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(prose(50))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "test.jsonl").write_text('{"text": "a b c"}\n')
    data, _ = make(tmp_path / "out", [tmp_path / "mine.txt"], tokenizer, validation="held")
    assert stored(data, "val") == {"mine/test.jsonl#0": "a b c"}


def test_a_sample_of_one_long_document_is_its_beginning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text(prose(1000))
    parts = {}
    for sample in (0.1, 0.5, 1.0):
        data, _ = make(tmp_path / str(sample), [tmp_path / "book.txt"], tokenizer, sample=sample)
        (parts[sample],) = stored(data, "train").values()
        assert stored(data, "val") == stored(TokenData.open(tmp_path / "0.1"), "val")
        assert len(parts[sample]) == pytest.approx(sample * 0.95 * len(prose(1000)), rel=0.01)
    assert parts[1.0].startswith(parts[0.5])
    assert parts[0.5].startswith(parts[0.1])


def test_nothing_to_hold_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "emoji.txt").write_text("😀")  # which cannot be cut
    for name in ("a.txt", "emoji.txt"):
        with pytest.raises(DataError, match="no document is held out for validation"):
            prepare([tmp_path / name], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(DataError, match="source '' is empty"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer, validation="")
    with pytest.raises(DataError, match=r"no document is held out for validation: .*`validation=PATH`"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "b.txt").write_text(prose(1000))
    _, notices = make(tmp_path / "out", [tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer)
    assert "source 'a': no document is held out for validation" in notices


def test_where_a_document_is_cut() -> None:
    assert _line_break("ab\ncd\nef", 3, 9) == 3
    assert _line_break("ab\ncd\nef", 5, 9) == 6
    assert _line_break("ab cd ef gh", 7, 9) == 8
    assert _line_break("title\n" + "x" * 994, 900, 25) == 900  # the only line break is out of reach
    assert _line_break("é" * 10, 9, 0) == 4
    assert _line_break("x", 0, 5) == 1


# ----------------------------------------------------------------------------------------------------- long documents


@settings(max_examples=60)
@given(st.text(st.sampled_from("ab 1.'\n\r\té日"), min_size=1, max_size=400))
def test_pieces_have_the_tokens_of_the_whole(text: str) -> None:
    """GPT-4's split makes the same pieces of both, wherever there is a line break or a space to cut at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LONG", 12)
        patch.setattr(pieces, "PIECE", 8)
        parts = list(pieces_of(text))
    assert "".join(parts) == text
    assert all(parts)
    good = all(
        (a[-1] == "\n" and not b[0].isspace()) or (b[0] == " " and not a[-1].isspace())
        for a, b in itertools.pairwise(parts)
    )
    if good:
        assert [i for part in parts for i in cl100k().encode(part)] == cl100k().encode(text)


@pytest.mark.parametrize("separator", ["\n", "\r\n", " "])
def test_a_long_file_has_the_tokens_of_the_whole(tmp_path: Path, tokenizer: Tokenizer, separator: str) -> None:
    text = prose(40_000, words=8).replace("\n", separator) + "é 日\n\n"
    assert len(text) > pieces.LONG
    (tmp_path / "book.txt").write_bytes(text.encode())
    parts = [piece.text for piece in read_pieces(parse_source(tmp_path / "book.txt"))]
    assert len(parts) > 3
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 2 * PIECE
    data, _ = make(tmp_path / "out", [tmp_path / "book.txt"], tokenizer)
    ids = data.tokens("book", "train")[:].tolist() + data.tokens("book", "val")[:].tolist()
    (train,), (held_out,) = stored(data, "train").values(), stored(data, "val").values()
    assert train + held_out == text
    assert ids == [*tokenizer.encode(train), tokenizer.eot_id, *tokenizer.encode(held_out), tokenizer.eot_id]
    assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_batch(["a", text]) == [tokenizer.encode("a"), tokenizer.encode(text)]
    # A row of that length, too.
    assert list(pieces_of(text)) != [text]
    assert "".join(pieces_of(text)) == text


def test_a_long_file_that_turns_out_to_be_no_text_is_left_out_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\n" * 300_000 + b"\xff")
    with pytest.raises(rows.NotText, match=r"not UTF-8 \(byte 1,500,000\)"):
        next(iter(text_pieces(tmp_path / "a.txt")))


MEMORY = """
import resource, sys
from moe.io import pieces
pieces.LONG, pieces.PIECE = 2**15, 2**13
from moe.data import prepare
sys.modules[prepare.__module__]._BATCH_BYTES = 2**15
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
prepare([sys.argv[1] + "/small.txt"], sys.argv[1] + "/a", tokenizer=sys.argv[1] + "/tokenizer.json")
before = peak()
prepare([sys.argv[1] + "/large.txt"], sys.argv[1] + "/b", tokenizer=sys.argv[1] + "/tokenizer.json")
print(peak() - before)
"""


def test_memory_does_not_grow_with_a_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """2 MB, of which every byte took 175 encoded whole, after a tenth of it; pieces and batches are small here."""
    text = prose(6_000)
    tokenizer.save(tmp_path)
    for name, times in (("small", 1), ("large", 10)):
        with (tmp_path / f"{name}.txt").open("w") as file:
            for _ in range(times):
                file.write(text)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert int(done.stdout) < 60  # MiB; 350 encoded whole
