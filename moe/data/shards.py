"""Token shards on disk: the format, its writer and its reader.

A prepared directory holds, for each source and split, memory-mapped shards `SOURCE-SPLIT-00000.bin` of little-endian
uint16 (uint32 where the vocabulary is over 65,536): documents one after the other, each followed by one end-of-text id.
`index.json` describes them, `tokenizer.json` decodes them, `heldout.bin` is the held-out text itself, for the reference
compression. Tokens of a split are one stream; a window may cross documents and shards. The table of a split's documents
is a file of its own, `SOURCE-SPLIT-documents.json`, read when it is asked for: opening data takes the same time and
memory whatever their size.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe.errors import DataError
from moe.tokenizer import Tokenizer

FORMAT = "moe-tokens"
VERSION = 2
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
HELD_OUT_FILE = "heldout.bin"
SPLITS = ("train", "val")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype for ids below `vocab_size`: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


class ShardWriter:
    """Writes the token stream of one source and split as shards of at most `shard_tokens` tokens."""

    def __init__(self, directory: Path, stem: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._directory, self._stem, self._dtype, self._shard_tokens = directory, stem, dtype, shard_tokens
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()  # of the stream, hence the same however it is cut into shards
        self._shards: list[dict[str, Any]] = []
        self._table = _TableWriter(directory / f"{stem}-documents.json")
        self._open = (0, 0)  # tokens and bytes of the document that is being written

    def add(self, name: str, n_bytes: int, ids: Sequence[int], *, ends: bool = True) -> None:
        """Appends a document: its ids, end-of-text included, and the length of its UTF-8 text in bytes.

        Or, without `ends`, a part of one that the next call goes on with.
        """
        values = np.asarray(ids, dtype=self._dtype)
        self._digest.update(values.tobytes())
        self._open = (self._open[0] + len(values), self._open[1] + n_bytes)
        if ends:
            self._table.add(name, *self._open)
            self._open = (0, 0)
        while len(values):
            if self._file is None or self._shards[-1]["tokens"] == self._shard_tokens:
                self._next_shard()
            assert self._file is not None
            part = values[: self._shard_tokens - self._shards[-1]["tokens"]]
            self._file.write(part.tobytes())
            self._shards[-1]["tokens"] += len(part)
            values = values[len(part) :]

    def _next_shard(self) -> None:
        self._close_shard()
        name = f"{self._stem}-{len(self._shards):05d}.bin"
        self._file = (self._directory / name).open("wb")
        self._shards.append({"file": name, "tokens": 0})

    def close(self) -> None:
        """Closes what is being written; safe to call twice."""
        self._close_shard()
        self._table.close()

    def _close_shard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def entry(self) -> dict[str, Any]:
        """The part of index.json on this stream; call after `close`."""
        return {
            "shards": self._shards,
            "tokens": self._table.tokens,
            "bytes": self._table.bytes,
            "sha256": self._digest.hexdigest(),
            "documents": {"file": self._table.path.name, "count": self._table.count},
        }


class _TableWriter:
    """Writes {"name": [...], "tokens": [...], "bytes": [...]} while documents come, none of them kept in memory.

    Each column grows in a file of its own; `close` puts them together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = self.tokens = self.bytes = 0
        self._columns: dict[str, IO[str]] = {}
        try:
            for column in ("name", "tokens", "bytes"):
                file = tempfile.TemporaryFile("w+", dir=path.parent, encoding="ascii")  # noqa: SIM115
                self._columns[column] = file
        except OSError:
            self._drop()
            raise

    def add(self, name: str, tokens: int, n_bytes: int) -> None:
        separator = ", " if self.count else ""
        for column, text in zip(self._columns.values(), (json.dumps(name), tokens, n_bytes), strict=True):
            column.write(f"{separator}{text}")
        self.count += 1
        self.tokens += tokens
        self.bytes += n_bytes

    def close(self) -> None:
        if not self._columns:
            return
        try:
            with self.path.open("w", encoding="ascii") as file:
                for i, (column, values) in enumerate(self._columns.items()):
                    file.write(f'{", " if i else "{"}"{column}": [')
                    values.seek(0)
                    shutil.copyfileobj(values, file)
                    file.write("]")
                file.write("}")
        finally:
            self._drop()

    def _drop(self) -> None:
        columns, self._columns = self._columns, {}
        for column in columns.values():
            with contextlib.suppress(OSError):  # of a full disk: said already
                column.close()


@dataclass(frozen=True)
class DocumentTable:
    """The documents of one source and split, in stream order.

    names: list of str; n_tokens (end-of-text included), n_bytes (of the UTF-8 text), offsets (of the first token in the
    stream): int64 arrays [documents].
    """

    names: list[str]
    n_tokens: np.ndarray
    n_bytes: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


class TokenStream:
    """One split of one source as a 1-D sequence of token ids over its memory-mapped shards.

    `len(stream)` is its length in tokens; `stream[a:b]` an array of the shards' dtype, a view where one shard holds it
    all; `stream[i]` an int. Slices clip as a list's do; a step is not supported.
    """

    def __init__(self, shards: Sequence[np.ndarray], dtype: np.dtype) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(s) for s in shards)])
        self.dtype = dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise DataError(f"a token stream is sliced with step 1, not {step}")
            return self._range(start, stop)
        if not -len(self) <= key < len(self):
            raise IndexError(f"token {key} of a stream of {len(self)}")
        key = int(key) % len(self)
        return int(self._range(key, key + 1)[0])

    def __reduce__(self) -> Any:
        """Mapped shards are pickled as their places, not their tokens."""
        mapped = [s for s in self._shards if isinstance(s, np.memmap) and s.filename is not None]
        if len(mapped) < len(self._shards):
            return TokenStream, (self._shards, self.dtype)
        files = [(os.path.abspath(str(shard.filename)), len(shard)) for shard in mapped]
        return _map_files, (files, self.dtype)

    def _range(self, start: int, stop: int) -> np.ndarray:
        if start >= stop:
            return np.empty(0, self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin = int(self._starts[first])
            part = self._shards[first][start - begin : stop - begin]
            parts.append(part)
            start += len(part)
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    """A shard as an array over its file."""
    if file.stat().st_size == 0:
        return np.empty(0, dtype)
    mapped = np.memmap(file, dtype=dtype, mode="r")
    base: Any = mapped.base
    if hasattr(mmap, "MADV_RANDOM") and isinstance(base, mmap.mmap):
        # Windows lie anywhere: reading ahead would bring in what nobody asked for.
        base.madvise(mmap.MADV_RANDOM)
    return mapped


def read_index(path: Path, format_name: str, version: int, maker: str) -> dict[str, Any]:
    """The index of a prepared directory. Raises DataError where it is missing, damaged, of another kind or version."""
    file = path / INDEX_FILE
    if not file.is_file():
        raise DataError(f"no prepared data in {path} ({INDEX_FILE} is missing): prepare it with {maker}")
    try:
        index = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not complete JSON ({error}): prepare the data again") from None
    if not isinstance(index, dict) or index.get("format") != format_name:
        found = index.get("format") if isinstance(index, dict) else None
        other = f"{found!r}, not {format_name!r}" if found else f"not {format_name!r}"
        raise DataError(f"{file} is not the index of prepared data (format is {other}): prepare it with {maker}")
    if index.get("version") != version:
        raise DataError(f"{file} has format version {index.get('version')}, expected {version}: prepare it again")
    return index


@contextlib.contextmanager
def complete(path: Path) -> Iterator[None]:
    """Raises DataError where what is done in it does not find all that an index should have."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path / INDEX_FILE} is incomplete ({error!r}): prepare the data again") from None


def map_stream(directory: Path, shards: Sequence[dict[str, Any]], dtype: np.dtype) -> TokenStream:
    """The memory-mapped stream of the shards of an index. Raises DataError where one is missing or cut short."""
    return _map_files([(directory / shard["file"], shard["tokens"]) for shard in shards], dtype)


def _map_files(files: Sequence[tuple[str | Path, int]], dtype: np.dtype) -> TokenStream:
    """The stream of shards given as (file, tokens)."""
    parts = []
    for file, n_tokens in files:
        file, expected = Path(file), n_tokens * dtype.itemsize
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise DataError(f"{file} {state}, expected {expected:,} bytes: prepare the data again (overwrite)")
        parts.append(_map(file, dtype))
    return TokenStream(parts, dtype)


def reopened(kind: Any, path: str, fingerprint: str) -> Any:
    """Prepared data, opened again where they were pickled. Raises DataError where others are there now."""
    data = kind.open(path)
    if data.fingerprint != fingerprint:
        raise DataError(f"{path} holds other data than when they were pickled: open them anew")
    return data


def read_table(directory: Path, entry: dict[str, Any]) -> DocumentTable:
    """The table of documents that `ShardWriter.entry` wrote. Raises DataError for a damaged file."""
    file = directory / entry["file"]
    try:
        table = json.loads(file.read_bytes())
        n_tokens, n_bytes = (np.array(table[key], dtype=np.int64) for key in ("tokens", "bytes"))
        names = table["name"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{file} cannot be read ({error}): prepare the data again (overwrite)") from None
    if not len(names) == len(n_tokens) == len(n_bytes) == entry["count"]:
        raise DataError(f"{file} does not have {entry['count']:,} documents: prepare the data again (overwrite)")
    return DocumentTable(names, n_tokens, n_bytes, np.cumsum(n_tokens) - n_tokens)


def load_tokenizer(directory: Path, sha256: str) -> Tokenizer:
    """The tokenizer of prepared data. Raises DataError where the file is not the one that the tokens were made with."""
    file = directory / TOKENIZER_FILE
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"
    if found != sha256:
        raise DataError(
            f"{file} is not the tokenizer these tokens were made with (sha256 {found[:12]}, expected "
            f"{sha256[:12]}): prepare the data again (overwrite)"
        )
    return Tokenizer.load(file)


def check_vocabulary(of_data: int, of_model: int) -> None:
    """Raises DataError where a model of so many ids cannot take the tokens; more ids are fine."""
    if of_data > of_model:
        raise DataError(
            f"the data's tokenizer has {of_data:,} ids, the model's vocab_size is {of_model:,}: set the "
            f"model's vocab_size to {of_data} or more, or prepare the data with vocab_size={of_model}"
        )


class TokenData:
    """A prepared directory, opened: streams of tokens, tables of documents, the tokenizer.

    Use `TokenData.open(path)`. `fingerprint` (sha256, hex) covers the tokenizer and every token of every stream.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self.index = index
        self.vocab_size: int = index["vocab_size"]
        self.eot_id: int = index["eot_id"]
        self.fingerprint: str = index["fingerprint"]
        self.sources: tuple[str, ...] = tuple(index["sources"])
        self.dtype = np.dtype(index["dtype"])
        self._streams = {
            (source, split): map_stream(path, index["sources"][source][split]["shards"], self.dtype)
            for source in self.sources
            for split in SPLITS
        }

    @staticmethod
    def open(path: str | Path) -> "TokenData":
        """Opens a prepared directory and checks format, version and the size of every file.

        Raises:
            DataError: not a prepared directory, another version, or a file that is missing or cut short.
        """
        path = Path(path)
        index = read_index(path, FORMAT, VERSION, "moe data prepare")
        with complete(path):
            return TokenData(path, index)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{source} {self.n_tokens(source, 'train'):,}" for source in self.sources)
        return f"TokenData({self.path}, {self.vocab_size:,} ids, training tokens: {sizes})"

    def __reduce__(self) -> Any:
        return reopened, (TokenData, os.path.abspath(self.path), self.fingerprint)  # not the tokens

    def tokens(self, source: str, split: str) -> TokenStream:
        """The token stream of a source's "train" or "val" split. Raises DataError for an unknown source or split."""
        self._check(source, split)
        return self._streams[source, split]

    def documents(self, source: str, split: str) -> DocumentTable:
        """The documents of a source's "train" or "val" split, in stream order. Raises DataError for a damaged file."""
        self._check(source, split)
        return read_table(self.path, self.index["sources"][source][split]["documents"])

    def n_tokens(self, source: str, split: str) -> int:
        """Tokens of a stream."""
        return len(self.tokens(source, split))

    def n_bytes(self, source: str, split: str) -> int:
        """Bytes of UTF-8 text behind a stream: what bits per byte divides by."""
        self._check(source, split)
        return self.index["sources"][source][split]["bytes"]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with. Raises DataError where the file beside them is another one."""
        return load_tokenizer(self.path, self.index["tokenizer_sha256"])

    def check_compatible(self, vocab_size: int) -> None:
        """Raises DataError where a model of `vocab_size` ids cannot take these tokens; more ids are fine."""
        check_vocabulary(self.vocab_size, vocab_size)

    def _check(self, source: str, split: str) -> None:
        if source not in self.sources:
            raise DataError(f"source {source!r} is not in {self.path}: it has {', '.join(self.sources)}")
        if split not in SPLITS:
            raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
