"""`moe data` as a user meets it: the commonest first datasets, what is said of them, and what stops in one line."""

import json
from pathlib import Path

import pytest

from moe.data import TokenData
from tests.conftest import run_cli

BOOK = "".join(f"Line {i} of a book that has one file and many lines.\n" for i in range(400))


def test_one_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    assert run_cli("data", "prepare", tmp_path / "book.txt", "--out", tmp_path / "d", "--vocab-size", 270) == 0
    shown = capsys.readouterr().out
    assert "notice: source 'book': the last 0.05 of its document is held out" in shown
    assert "notice: little text is held out (book" in shown
    data = TokenData.open(tmp_path / "d")
    assert data.n_bytes("book", "train") + data.n_bytes("book", "val") == len(BOOK)


def test_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "other.txt").write_text(BOOK[:1000])
    command = ["data", "prepare", tmp_path / "book.txt", "--vocab-size", 270]
    for i, (validation, expected) in enumerate((("0.5", len(BOOK) / 2), (tmp_path / "other.txt", 1000))):
        assert run_cli(*command, "--out", tmp_path / str(i), "--validation", validation) == 0
        data = TokenData.open(tmp_path / str(i))
        assert data.n_bytes("book", "val") == pytest.approx(expected, abs=100)
    capsys.readouterr()
    for validation, complaint in (("2", "validation is 2, expected a fraction"), ("nowhere", "nowhere does not exist")):
        assert run_cli(*command, "--out", tmp_path / "no", "--validation", validation) == 1
        error = capsys.readouterr().err
        assert complaint in error
        assert "Traceback" not in error
    assert not (tmp_path / "no").exists()


def test_splits_and_columns_are_chosen_after_the_path(tmp_path: Path) -> None:
    for name, n in (("train", 40), ("test", 30)):
        rows = [json.dumps({"body": f"{name} {i} " * 9}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    command = ["data", "prepare", "--vocab-size", 259]
    assert run_cli(*command, f"x={tmp_path},text=body", "--out", tmp_path / "out" / "a") == 0
    sizes = {split: len(TokenData.open(tmp_path / "out" / "a").documents("x", split)) for split in ("train", "val")}
    assert sizes == {"train": 40, "val": 30}
    assert run_cli(*command, f"x={tmp_path},text=body,split=test", "--out", tmp_path / "out" / "b") == 0
    data = TokenData.open(tmp_path / "out" / "b")
    assert sum(len(data.documents("x", split)) for split in ("train", "val")) == 30


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl, line 1: not valid JSON (a number of more than 4,300"),
        ("a.jsonl", b'{"text": ' * 50_000, "a.jsonl, line 1: not valid JSON (nested too deeply)"),
        ("a.jsonl", b'{"text": null}', "field 'text' is null"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a lone surrogate"),
        ("a.txt", b"a\0b", "a NUL byte"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.txt", b"caf\xe9", "not UTF-8 (byte 3)"),
        ("a.txt.gz", b"\x1f\x8b\x08", "cut short"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.csv", b"x\n1\n", "no column 'text'"),
        ("a.txt", b"", "no readable documents"),
    ],
)
def test_files_that_cannot_be_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run_cli("data", "prepare", tmp_path / name, "--out", tmp_path / "d", "--vocab-size", 257) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not (tmp_path / "d").exists()
