"""What files hold: rows of JSONL, JSON, CSV and parquet, or one text, compressed or not; long texts come in pieces.

Each reader keeps a small part of a file in memory, and names file and row in its errors.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moe.data.hub import EXTRA_HINT
from moe.errors import DataError
from moe.io.pieces import LONG, PIECE, place_to_cut

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Row from 0, its place in words, its values by column.
Row = tuple[int, str, dict[str, Any]]


def plain_name(name: str) -> str:
    """A file's name without the suffix of its compression."""
    return next((name.removesuffix(suffix) for suffix in _OPENERS if name.endswith(suffix)), name)


def suffix_of(name: str) -> str:
    """A file's suffix, without that of its compression: ".jsonl" of "a.jsonl.gz"."""
    return Path(plain_name(name)).suffix


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where its name says so. Raises DataError where it cannot be read."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}: {error.strerror}; make it readable or leave it out") from None
        raise DataError(f"{path}: cut short, or not compressed as its name says ({error}); copy it again") from None


# ------------------------------------------------------------------------------------------------------------- texts


class NotText(Exception):
    """Why something is no text, in words."""


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a file, in pieces where it is long.

    Raises:
        NotText: before the first piece, where it is not UTF-8 or has NUL bytes, which only binary files have.
    """
    decoder, size = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(path) as file:
        while True:
            chunk = file.read(PIECE)
            if b"\0" in chunk:
                raise NotText(f"a NUL byte (byte {size + chunk.index(0):,}): it is binary, or UTF-16")
            begin = size - len(decoder.getstate()[0])  # of what is decoded now
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise NotText(f"not UTF-8 (byte {begin + error.start:,}): convert it with iconv") from None
            if not chunk:
                break
            size += len(chunk)
    yield from _stream(path) if size > LONG else [_whole(path)]


def _whole(path: Path) -> str:
    with opened(path) as file:
        return file.read().decode()  # bytes, then decode: text mode would turn CRLF into LF


def _stream(path: Path) -> Iterator[str]:
    decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
    with opened(path) as file:
        while chunk := file.read(PIECE):
            text += decoder.decode(chunk)
            while len(text) > 2 * PIECE:  # what is left is never a crumb
                cut = place_to_cut(text, PIECE)
                yield text[:cut]
                text = text[cut:]
    yield text + decoder.decode(b"", final=True)


def clean(text: str) -> str | None:
    """The text of a row, or None where it holds NUL or a lone surrogate (JSON can write both)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return None if "\0" in text else text


# -------------------------------------------------------------------------------------------------------------- rows


def json_rows(path: Path, fields: str) -> Iterator[Row]:
    """The objects of a JSONL file, a line each; blank lines count, and are left out. Of a .json: those of its list.

    Args:
        fields: what an object should have, for the message of an error.

    Raises:
        DataError: a line is not a JSON object.
    """
    whole = suffix_of(path.name) == ".json"
    for row, where, value in _json_list(path) if whole else _json_lines(path):
        if not isinstance(value, dict):
            raise DataError(f"{where}: a {type(value).__name__}, expected an object with {fields}")
        yield row, where, value


def _json_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    with opened(path) as lines:
        for row, line in enumerate(lines):
            where = f"{path}, line {row + 1}"
            if line.strip():
                yield row, where, _json(line, where, "one JSON object per line is expected", first=row == 0)


def _json_list(path: Path) -> Iterator[tuple[int, str, Any]]:
    with opened(path) as file:
        values = _json(file.read(), str(path), "a list of objects is expected", first=True)
    if not isinstance(values, list) or not values:
        kind = "an empty list" if values == [] else f"a {type(values).__name__}"
        raise DataError(f"{path}: {kind}, expected a list of objects; or write JSONL, one object per line")
    for row, value in enumerate(values):
        yield row, f"{path}, row {row}", value


def _json(content: bytes, where: str, expected: str, *, first: bool) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig" if first else "utf-8"))
    except RecursionError:
        why = "nested too deeply"
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        why = str(error)
    except ValueError:  # the limit of Python against numbers that take long to read
        why = "a number of more than 4,300 digits: write it as text"
    raise DataError(f"{where}: not valid JSON ({why}); {expected}")


def csv_rows(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a header; `choose` as in `parquet_rows`. What is not UTF-8 is no text later.

    Raises:
        DataError: not a readable table.
    """
    csv.field_size_limit(2**30)  # a cell may be a document
    delimiter = "\t" if suffix_of(path.name) == ".tsv" else ","
    with opened(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            columns = choose(list(reader.fieldnames or []))
            for row, values in enumerate(reader):
                yield row, f"{path}, row {row}", {column: values[column] for column in columns}
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}); mend it or use JSONL") from None


def parquet_rows(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[Row]:
    """The rows of a parquet file, 1,024 in memory at a time.

    Args:
        choose: takes the file's columns, returns those to read.

    Raises:
        DataError: not a readable parquet file.
        ImportError: pyarrow is missing.
    """
    check_parquet(str(path))
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=choose(list(file.schema_arrow.names))):
                for value in batch.to_pylist():
                    yield row, f"{path}, row {row}", value
                    row += 1
    except (arrow.ArrowException, OSError) as error:
        after = f" after {row:,} rows" if row else ""
        raise DataError(f"{path} is not a readable parquet file{after}: {error}") from None


def check_parquet(what: str) -> None:
    """Raises ImportError where pyarrow, which reads parquet files, is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ImportError(f"reading {what} needs pyarrow: {EXTRA_HINT}") from None
