"""From documents to token shards: split, train the tokenizer, encode, write; all of a directory or nothing.

What is held out is decided by `corpus.Corpus`, and the tokenizer sees training documents only. The directory is written
under a temporary name beside its place (`.NAME.xxxxxxxx.tmp`: all that a killed process can leave) and renamed when
complete. Preparing the same inputs again finds the directory and reuses it.

Memory does not grow with the data, and a dataset of the Hub is read as few times as can be: its commit and limits say
what it is, so that it is read once to be encoded, and before that its beginning where a tokenizer is to be trained.
"""

import gzip
import hashlib
import json
import lzma
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from moe.data.corpus import Corpus, Validation, make_corpus, nothing
from moe.data.hub import HubDataset
from moe.data.shards import (
    FORMAT,
    HELD_OUT_FILE,
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FILE,
    VERSION,
    ShardWriter,
    TokenData,
    token_dtype,
)
from moe.data.sources import Document, Source, is_drawn
from moe.errors import DataError, TokenizerError
from moe.io.files import atomic_directory, is_taken, locked
from moe.tokenizer import Tokenizer, cl100k, train_bpe

# Called with (phase, bytes of text done, bytes of text in all, 0 where nobody knows); phases are "tokenizer", "encode".
Progress = Callable[[str, int, int], None]

_BATCH_BYTES = 2**22  # of text, encoded on all cores at once
# The most held-out text that is read for other compressors: as far as `xz -9` looks back.
COMPARED_BYTES = 2**26
# Of each source, the most text that a tokenizer is trained on: its merges settle long before, and the trainer holds
# every distinct word.
TOKENIZER_BYTES = 2**30
# Scores on less held-out text than this say little: one page of a book differs from the next by more than a model does.
FEW_BYTES = 10_000


@dataclass(frozen=True)
class SplitInfo:
    """Size of one split of one source: documents, tokens (one end-of-text per document included), bytes of text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class DataInfo:
    """What `prepare` made or found.

    `splits[source][split]` with split "train" or "val"; skipped: names of documents that are not text; empty: how many
    had no text at all; seconds: per phase ("read", "tokenizer", "encode"), empty when `reused`.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    tokenizer_name: str
    splits: dict[str, dict[str, SplitInfo]]
    skipped: list[str]
    empty: int
    notices: list[str]
    reused: bool
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(
    sources: Sequence[Source | str | Path] | None,
    out_dir: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: Tokenizer | str | Path | None = None,
    validation: Validation | None = None,
    sample: float = 1.0,
    overwrite: bool = False,
    shard_tokens: int = 2**27,
    progress: Progress | None = None,
) -> DataInfo:
    """Tokenizes documents into `out_dir` for `TokenData.open`.

    Held out are the splits that a source comes with (`Source`), or one document in twenty, by its name; of a source
    with too few documents for that, the last twentieth of each, from a line break on.

    A tokenizer to be trained sees all training documents of a source up to 1 GiB of them: of a larger one those that
    the sha256 of their names chooses, of a dataset of the Hub its first.

    Args:
        sources: `Source`s, or what `parse_source` takes (`path`, `name=path`); None: `default_sources`.
        out_dir: the directory to write. One made from the same inputs is reused; another one is an error.
        vocab_size: ids of the byte-level BPE to train on the training documents; unused when `tokenizer` is given.
        tokenizer: None trains one; "cl100k" is GPT-4's; else a Tokenizer or a path for `Tokenizer.load`.
        validation: hold out another fraction; or a path (or `name=path`, or a Source): that is held out, and all that
            the sources hold besides is trained on. It belongs to the source of its name, or to the only one.
        sample: fraction of the training documents to take, drawn by their names; the held-out ones are all taken. Of
            documents that are cut, the first part.
        overwrite: write anew, replacing a directory that holds prepared data; any other directory is never touched.
        shard_tokens: the most tokens in one shard file.
        progress: called as (phase, bytes done, bytes in all).

    Raises:
        DataError: nothing readable, an empty split, `out_dir` taken, a full disk. Nothing half-written is left.
        TokenizerError: the vocabulary does not fit the text, or `tokenizer` is not readable.
    """
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}, expected 1 or more")
    if not 0 < sample <= 1:
        raise DataError(f"sample is {sample}, expected a fraction of the documents: above 0, up to 1")
    out = Path(out_dir)
    job = _Job(make_corpus(sources, validation, sample), _given(tokenizer), vocab_size, progress)
    started = time.perf_counter()
    inputs = _survey(job, shard_tokens)
    job.seconds["read"] = time.perf_counter() - started
    found = _existing(out, inputs, overwrite)
    if found is not None:
        return describe(found)
    if job.corpus.surveyed:
        job.corpus.check_splits()
    try:
        with locked(out):
            found = _existing(out, inputs, overwrite)  # another process may have made it meanwhile
            if found is not None:
                return describe(found)
            with atomic_directory(out) as temporary:
                _write(job, temporary, inputs, shard_tokens)
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error.strerror or error}; free some space or choose another out_dir "
            "(nothing half-written was left)"
        ) from error
    return describe(TokenData.open(out), reused=False, seconds=job.seconds)


def _existing(out: Path, inputs: str, overwrite: bool) -> TokenData | None:
    """The data in `out`, made from these inputs; None where there are none, or they are to be replaced."""
    if not is_taken(out):
        return None
    if not _is_prepared(out):
        raise DataError(f"out_dir {out} exists and is not prepared data: choose a new or an empty directory")
    if overwrite:
        return None
    found = TokenData.open(out)
    if found.index["inputs"] != inputs:
        raise DataError(
            f"out_dir {out} holds data prepared from other sources or settings: choose another directory, or "
            "overwrite it (overwrite=True)"
        )
    return found


def describe(data: TokenData, *, reused: bool = True, seconds: dict[str, float] | None = None) -> DataInfo:
    """The `DataInfo` of a prepared directory."""
    index = data.index
    splits = {
        source: {
            split: SplitInfo(entry[split]["documents"]["count"], entry[split]["tokens"], entry[split]["bytes"])
            for split in SPLITS
        }
        for source, entry in index["sources"].items()
    }
    report = {key: index[key] for key in ("tokenizer_name", "skipped", "empty", "notices")}
    return DataInfo(
        data.path, data.fingerprint, data.vocab_size, splits=splits, reused=reused, seconds=seconds or {}, **report
    )


def compression(data: DataInfo | TokenData) -> dict[str, float]:
    """Bits per byte that general compressors need for the held-out text: what a language model should beat.

    The held-out documents of all sources, concatenated in order of (source, name), through `gzip -9` and `xz -9e`; of
    more than COMPARED_BYTES, that much.
    """
    opened = data if isinstance(data, TokenData) else TokenData.open(data.path)
    return compressed(b"".join(held_out_text(opened).values()))


def compressed(text: bytes) -> dict[str, float]:
    """Bits per byte of `text` under `gzip -9` and `xz -9e`. Raises DataError where it is empty."""
    if not text:
        raise DataError("the text is empty, so it has no bits per byte: give one of at least a byte")
    return {
        "gzip": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


def held_out_text(data: TokenData) -> dict[str, bytes]:
    """The held-out documents of each source that has any, concatenated.

    Where all together have more than COMPARED_BYTES, each source gives its first part, in proportion.
    """
    sizes = {source: data.n_bytes(source, "val") for source in sorted(data.sources)}  # the order of the file
    share = min(1.0, COMPARED_BYTES / max(1, sum(sizes.values())))
    parts, begin = {}, 0
    with (data.path / HELD_OUT_FILE).open("rb") as file:
        for source, size in sizes.items():
            if size:
                file.seek(begin)
                parts[source] = file.read(size if share == 1 else max(1, int(size * share)))
            begin += size
    return parts


@dataclass
class _Job:
    """What one call of `prepare` carries from phase to phase."""

    corpus: Corpus
    tokenizer: Tokenizer | None
    vocab_size: int
    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    def tell(self, phase: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(phase, done, total)


def _given(tokenizer: Tokenizer | str | Path | None) -> Tokenizer | None:
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    return cl100k() if str(tokenizer) in ("cl100k", "cl100k_base") else Tokenizer.load(tokenizer)


def _survey(job: _Job, shard_tokens: int) -> str:
    """A sha256 of all that decides the result, for which the corpus is looked through."""
    vocabulary = job.tokenizer.fingerprint if job.tokenizer is not None else f"train {job.vocab_size}"
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {vocabulary} {shard_tokens}\n".encode())
    job.corpus.survey(digest)
    return digest.hexdigest()


def _write(job: _Job, directory: Path, inputs: str, shard_tokens: int) -> None:
    started = time.perf_counter()
    if job.tokenizer is None:
        job.tokenizer = train_bpe(_training_texts(job), job.vocab_size)
    job.tokenizer.save(directory / TOKENIZER_FILE)
    job.seconds["tokenizer"] = time.perf_counter() - started
    started = time.perf_counter()
    dtype = token_dtype(job.tokenizer.vocab_size)
    keys = [(name, split) for name in job.corpus.names for split in SPLITS]
    writers = {key: ShardWriter(directory, "-".join(key), dtype, shard_tokens) for key in keys}
    try:
        with (directory / HELD_OUT_FILE).open("wb") as held_out:
            _encode(job, job.tokenizer, writers, held_out)
        if not job.corpus.surveyed:
            job.corpus.check_splits()
    finally:
        for writer in writers.values():
            writer.close()
    index = _index(job, job.tokenizer, directory, inputs, writers)
    (directory / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    job.seconds["encode"] = time.perf_counter() - started


def _training_texts(job: _Job) -> Iterator[str]:
    """The training documents of each source, or a part of them of about TOKENIZER_BYTES."""
    corpus = job.corpus
    sources = [source for source in corpus.sources if not source.held_out]
    sizes = {source.name: corpus.bytes_of.get((source.name, "train"), 0) for source in sources}
    total = sum(min(size, TOKENIZER_BYTES) for size in sizes.values()) if corpus.surveyed else 0
    done = 0
    for source in sources:
        share = TOKENIZER_BYTES / max(sizes[source.name], 1)
        taken = 0
        for piece in corpus.documents(source):
            name = f"{piece.name}@{piece.begin}" if piece.begin else piece.name
            if piece.split == "val" or (share < 1 and not is_drawn(name, "tokenizer", share)):
                continue
            yield piece.text
            taken += len(piece.text.encode())
            job.tell("tokenizer", min(done + taken, total or done + taken), total)
            if isinstance(source.path, HubDataset) and taken >= TOKENIZER_BYTES:
                break
        done += taken


def _encode(job: _Job, tokenizer: Tokenizer, writers: dict[tuple[str, str], ShardWriter], held_out: IO[bytes]) -> None:
    """Streams all documents through the tokenizer into their shards, in batches for the sake of all cores."""
    corpus = job.corpus
    done, total = 0, sum(corpus.bytes_of.values()) if corpus.surveyed else 0
    documents = chain.from_iterable(corpus.documents(source, count=True) for source in corpus.sources)
    for batch, ids_of in _encoded(tokenizer, _batches(documents)):
        for piece, ids in zip(batch, ids_of, strict=True):
            text = piece.text.encode()
            end = [tokenizer.eot_id] if piece.ends else []
            writers[piece.source, piece.split].add(piece.name, len(text), [*ids, *end], ends=piece.ends)
            if piece.split == "val":
                held_out.write(text)
            done += len(text)
        job.tell("encode", min(done, total or done), total)


def _encoded(
    tokenizer: Tokenizer, batches: Iterator[list[Document]]
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """Each batch with its ids; while one is checked and written, the next one is read and encoded."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in batches:
            coming = batch, pool.submit(_encode_batch, tokenizer, batch)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _encode_batch(tokenizer: Tokenizer, batch: list[Document]) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([document.text for document in batch])
    except TokenizerError:
        for document in batch:  # of which it is
            try:
                tokenizer.encode(document.text)
            except TokenizerError as error:
                raise DataError(f"{document.source}/{document.name}: {error}") from None
        raise


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _index(
    job: _Job, tokenizer: Tokenizer, directory: Path, inputs: str, writers: dict[tuple[str, str], ShardWriter]
) -> dict[str, Any]:
    entries = {name: {split: writers[name, split].entry() for split in SPLITS} for name in job.corpus.names}
    for split in SPLITS:  # a character of several bytes cannot be cut, so that this shows only now
        if not any(entry[split]["tokens"] for entry in entries.values()):
            raise nothing(split)
    report = job.corpus.report
    few = [f"{name} {e['val']['bytes']:,} bytes" for name, e in entries.items() if 0 < e["val"]["bytes"] < FEW_BYTES]
    small = f"little text is held out ({', '.join(few)}): scores on less than {FEW_BYTES:,} bytes mean little"
    tokenizer_sha256 = hashlib.sha256((directory / TOKENIZER_FILE).read_bytes()).hexdigest()
    digest = hashlib.sha256(f"{VERSION} {tokenizer_sha256} {tokenizer.vocab_size}\n".encode())
    for name, entry in entries.items():
        digest.update("".join(f"{name} {split} {entry[split]['sha256']}\n" for split in SPLITS).encode())
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer_name": tokenizer.name,
        "tokenizer_sha256": tokenizer_sha256,
        "inputs": inputs,
        "fingerprint": digest.hexdigest(),
        "skipped": report.skipped,
        "empty": report.empty,
        "notices": [*job.corpus.notices, *report.notices, *([small] if few else [])],
        "sources": entries,
    }


def _is_prepared(out: Path) -> bool:
    """Whether `out` is a directory of ours, whole or damaged: the only kind that may be replaced."""
    try:
        index = json.loads((out / INDEX_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(index, dict) and index.get("format") == FORMAT
