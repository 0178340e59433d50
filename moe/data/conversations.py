"""Conversations on disk: read from JSONL or parquet, split, tokenised once with the chat template, and opened again.

A prepared directory holds, for each source and split, memory-mapped shards as in shards.py. A value is 2 * id, plus 1
where the token is learned (a response and its end marker); a conversation ends with the last token that is learned, as
nothing after it teaches anything. One in twenty is held out, by the sha256 of what stands before its first response,
so that no held-out request, answered alike or differently, is trained on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.data import instructions
from moe.data.chat import ChatTemplate
from moe.data.dialogues import SUFFIXES, Conversation, Report, check_source, read_conversations
from moe.data.rows import clean
from moe.data.shards import (
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FILE,
    DocumentTable,
    ShardWriter,
    TokenData,
    TokenStream,
    check_vocabulary,
    complete,
    load_tokenizer,
    map_stream,
    read_index,
    read_table,
    reopened,
    token_dtype,
)
from moe.data.sources import parse_source
from moe.errors import DataError
from moe.io.files import atomic_directory, is_taken, locked
from moe.tokenizer import Tokenizer, cl100k

FORMAT = "moe-conversations"
VERSION = 1
MAKER = "moe data instructions"
# inputs, targets int64; scored, text bool; each [S]
_Window = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_BATCH = 512  # conversations encoded on all cores at once


# Reads the conversations of one source from the start.
Reader = Callable[[Report | None], Iterable[Conversation]]


# ---------------------------------------------------------------------------------------------------------- reading


def _readers(sources: Sequence[str | Path] | None) -> tuple[dict[str, Reader], list[str]]:
    """The readers of the sources by name, sorted, and notices. Raises ImportError for libraries that are missing."""
    if sources is None:
        readers = {"code": _reader("code", instructions.standard_library)}
        if instructions.small_talk() is None:
            return readers, ['no small talk: chatterbot-corpus is not installed (pip install "gpt4-moe[data]")']
        return readers | {"talk": _reader("talk", lambda: instructions.small_talk() or ())}, []
    parsed = [replace(parse_source(source), suffixes=SUFFIXES) for source in sources]
    names = [source.name for source in parsed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"several sources are called {twice[0]!r}: name them with name=path")
    if not parsed:
        raise DataError("sources is empty: give at least one path, or None for pairs from the standard library")
    for source in parsed:
        check_source(source)
    return {source.name: partial(read_conversations, source) for source in sorted(parsed, key=lambda s: s.name)}, []


def _reader(source: str, read: Callable[[], Iterable[instructions.Named]]) -> Reader:
    return lambda report: (Conversation(source, name, messages) for name, messages in read())


def _conversations(readers: dict[str, Reader], report: Report | None = None) -> Iterator[Conversation]:
    """All conversations that can be learned from."""
    report = report if report is not None else Report()
    for reader in readers.values():
        for one in reader(report):
            if any(clean(m["content"]) is None for m in one.messages):
                report.skipped.append(f"{one.source}/{one.name}")
            elif not any(m["role"] == "assistant" and m["content"].strip() for m in one.messages):
                report.empty += 1
            else:
                yield one


# -------------------------------------------------------------------------------------------------------- preparing


class Prepared(NamedTuple):
    """What `prepare_conversations` made, or found (`reused`)."""

    data: "ConversationData"
    reused: bool


def prepare_conversations(
    sources: Sequence[str | Path] | None,
    out_dir: str | Path,
    *,
    tokenizer: Tokenizer | str | Path,
    overwrite: bool = False,
    shard_tokens: int = 2**27,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Prepared:
    """Tokenises conversations into `out_dir` for `ConversationData.open`; all of the directory or nothing.

    Args:
        sources: paths, or name=path, of what `dialogues.read_conversations` reads; None: functions of the standard
            library and, where it is installed, chatterbot-corpus.
        out_dir: the directory to write. One made from the same inputs is reused; another one is an error.
        tokenizer: that of the model to be fine-tuned: itself, "cl100k", a tokenizer.json or a directory with one.
        overwrite: write anew, replacing a directory that holds prepared conversations; no other is ever touched.
        shard_tokens: the most tokens in one shard file.
        progress: called as (phase, conversations done, conversations in all).

    Raises:
        DataError: a row that is no conversation, nothing to train on, `out_dir` taken, a full disk.
    """
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}, expected 1 or more")
    out = Path(out_dir)
    template = ChatTemplate(_given(tokenizer))
    readers, notices = _readers(sources)
    report = Report()
    inputs, counts = _survey(readers, template, shard_tokens, report)
    found = _existing(out, inputs, overwrite)
    if found is not None:
        return Prepared(found, True)
    notices += report.notices
    if not counts["train"]:
        raise DataError(
            f"no conversation to train on ({counts['val']} held out, {report.empty} without a response, "
            f"{len(report.skipped)} not valid text): one in twenty is held out, by its request; give more"
            + "".join(f" ({notice})" for notice in report.notices)
        )
    if not counts["val"]:
        notices.append("no conversation is held out, so there is nothing to evaluate on: give more of them")
    total = sum(counts.values())
    index = {"inputs": inputs, "notices": notices, "skipped": report.skipped, "empty": report.empty}
    try:
        with locked(out):
            found = _existing(out, inputs, overwrite)  # another process may have made it meanwhile
            if found is not None:
                return Prepared(found, True)
            with atomic_directory(out) as temporary:
                _write(readers, template, temporary, index, shard_tokens, lambda n: progress("encode", n, total))
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error.strerror or error}; free some space or choose another out_dir "
            "(nothing half-written was left)"
        ) from error
    return Prepared(ConversationData.open(out), False)


def _given(tokenizer: Tokenizer | str | Path) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    return cl100k() if str(tokenizer) in ("cl100k", "cl100k_base") else Tokenizer.load(tokenizer)


def _existing(out: Path, inputs: str, overwrite: bool) -> "ConversationData | None":
    """The conversations in `out`, made from these inputs; None where there are none, or they are to be replaced."""
    if not is_taken(out):
        return None
    try:
        index = json.loads((out / INDEX_FILE).read_bytes())
        ours = isinstance(index, dict) and index.get("format") == FORMAT
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise DataError(f"out_dir {out} exists and is not prepared conversations: choose a new or an empty directory")
    if overwrite:
        return None
    found = ConversationData.open(out)
    if found.index["inputs"] != inputs:
        raise DataError(
            f"out_dir {out} holds conversations prepared from other sources or settings: choose another "
            "directory, or overwrite it (overwrite=True)"
        )
    return found


def _survey(
    readers: dict[str, Reader], template: ChatTemplate, shard_tokens: int, report: Report
) -> tuple[str, dict[str, int]]:
    """Reads everything once: a sha256 of all that decides the result, and the conversations of each split."""
    state = f"{FORMAT} {VERSION} {template.name} {template.tokenizer.fingerprint} {shard_tokens}\n"
    digest = hashlib.sha256(state.encode())
    counts: dict[str, int] = {split: 0 for split in SPLITS}
    for conversation in _conversations(readers, report):
        digest.update(hashlib.sha256(conversation.identity()).digest())
        counts[conversation.split] += 1
    return digest.hexdigest(), counts


def _write(
    readers: dict[str, Reader],
    template: ChatTemplate,
    directory: Path,
    index: dict[str, Any],
    shard_tokens: int,
    progress: Callable[[int], None],
) -> None:
    tokenizer = template.tokenizer
    tokenizer.save(directory / TOKENIZER_FILE)
    dtype = token_dtype(2 * tokenizer.vocab_size)
    keys = [(source, split) for source in readers for split in SPLITS]
    writers = {key: ShardWriter(directory, "-".join(key), dtype, shard_tokens) for key in keys}
    learned = dict.fromkeys(keys, 0)
    try:
        done, conversations = 0, _conversations(readers)
        while batch := list(islice(conversations, _BATCH)):
            for one, encoded in zip(batch, template.encode_many([c.messages for c in batch]), strict=True):
                values = 2 * np.array(encoded.ids, dtype=np.int64) + np.array(encoded.learned)
                last = int(np.flatnonzero(encoded.learned)[-1])
                n_bytes = sum(len(m["content"].encode()) for m in one.messages if m["role"] == "assistant")
                learned[one.source, one.split] += sum(encoded.learned)
                writers[one.source, one.split].add(one.name, n_bytes, values[: last + 1].tolist())
            done += len(batch)
            progress(done)
    finally:
        for writer in writers.values():
            writer.close()
    entries: dict[str, dict[str, Any]] = {
        source: {split: writers[source, split].entry() | {"learned": learned[source, split]} for split in SPLITS}
        for source in readers
    }
    sha256 = hashlib.sha256((directory / TOKENIZER_FILE).read_bytes()).hexdigest()
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {template.name} {sha256} {tokenizer.vocab_size}\n".encode())
    for name, entry in entries.items():
        # With the tables: they say where one conversation ends and the next begins.
        tables = [hashlib.sha256((directory / entry[s]["documents"]["file"]).read_bytes()).hexdigest() for s in SPLITS]
        digest.update("".join(f"{name} {split} {entry[split]['sha256']}\n" for split in SPLITS).encode())
        digest.update(" ".join(tables).encode())
    index = {
        "format": FORMAT,
        "version": VERSION,
        "template": template.name,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "end_id": template.end_id,
        "tokenizer_name": tokenizer.name,
        "tokenizer_sha256": sha256,
        "fingerprint": digest.hexdigest(),
        **index,
        "sources": entries,
    }
    (directory / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- opening


class ConversationData:
    """Prepared conversations, opened: `values` (2 * id + learned) and their table, by source and split.

    Use `ConversationData.open(path)`. `fingerprint` (sha256, hex) covers the tokenizer, the template and every token.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self.index = index
        self.vocab_size: int = index["vocab_size"]
        self.end_id: int = index["end_id"]
        self.fingerprint: str = index["fingerprint"]
        self.sources: tuple[str, ...] = tuple(index["sources"])
        self.dtype = np.dtype(index["dtype"])
        self._streams = {
            (source, split): map_stream(path, index["sources"][source][split]["shards"], self.dtype)
            for source in self.sources
            for split in SPLITS
        }

    @staticmethod
    def open(path: str | Path) -> "ConversationData":
        """Opens a prepared directory. Raises DataError where it is none, of another version, or damaged."""
        path = Path(path)
        index = read_index(path, FORMAT, VERSION, MAKER)
        with complete(path):
            return ConversationData(path, index)

    def __repr__(self) -> str:
        return f"ConversationData({self.path}, {self.vocab_size:,} ids, sources: {', '.join(self.sources)})"

    def __reduce__(self) -> Any:
        return reopened, (ConversationData, os.path.abspath(self.path), self.fingerprint)  # not the tokens

    def values(self, source: str, split: str) -> TokenStream:
        """All conversations of a source's "train" or "val" split, one after the other: 2 * id + learned."""
        return self._streams[source, split]

    def n_tokens(self, source: str, split: str) -> int:
        """Tokens that are learned: the responses and their end markers."""
        return self.index["sources"][source][split]["learned"]

    def n_bytes(self, source: str, split: str) -> int:
        """Bytes of UTF-8 text of the responses: what bits per byte divides by."""
        return self.index["sources"][source][split]["bytes"]

    def check_compatible(self, vocab_size: int) -> None:
        """Raises DataError where a model of `vocab_size` ids cannot take these tokens; more ids are fine."""
        check_vocabulary(self.vocab_size, vocab_size)

    def table(self, source: str, split: str) -> DocumentTable:
        """Where each conversation lies in `values`; n_bytes counts the text of its responses alone."""
        return read_table(self.path, self.index["sources"][source][split]["documents"])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with, and their chat template.

        Raises DataError where the file beside them is another one.
        """
        tokenizer = load_tokenizer(self.path, self.index["tokenizer_sha256"])
        return tokenizer.with_chat_template(ChatTemplate(tokenizer).jinja)

    def held_out_windows(
        self, seq_len: int, n_tokens: int | None = None
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Held-out conversations, each a window of its own, for `moe.evaluate.evaluate`: responses are scored.

        Windows come by source and, so that equal ones make a batch, by length, which is rounded up to a multiple of
        32; what is beyond seq_len tokens is cut off.

        Args:
            n_tokens: about so many tokens of windows in all, from every n-th conversation; None for all.

        Yields:
            (source, inputs int64 [S], targets int64 [S], scored bool [S], text bool [S], False at padding).
        """
        tables = {source: self.table(source, "val") for source in self.sources}
        padded = {s: np.minimum(-(-(t.n_tokens - 1) // 32) * 32, seq_len) for s, t in tables.items()}
        total = sum(int(p.sum()) for p in padded.values())
        every = 1 if n_tokens is None else max(1, -(-total // max(1, n_tokens)))
        for source, table in tables.items():
            for i in np.argsort(padded[source], kind="stable")[::every].tolist():
                window = self._val(source, table, i, int(padded[source][i]))
                if self._has_text(*window[1:3]):
                    yield source, *window

    def not_scored(self, seq_len: int) -> list[str]:
        """A notice for each source that has no text of a held-out response within `seq_len` tokens."""
        return [
            f"source {source!r}: none of its {len(table):,} held-out conversations has text of a response within "
            f"{seq_len:,} tokens, so it is not scored"
            for source in self.sources
            if len(table := self.table(source, "val"))
            and not any(self._has_text(*self._val(source, table, i, seq_len)[1:3]) for i in range(len(table)))
        ]

    def _has_text(self, targets: np.ndarray, scored: np.ndarray) -> bool:
        """Whether more is scored than the ends of empty responses, which stand for no byte."""
        return bool((scored & (targets != self.end_id)).any())

    def _val(self, source: str, table: DocumentTable, i: int, length: int) -> _Window:
        return self._window(source, int(table.offsets[i]), int(table.n_tokens[i]), length)

    def _window(self, source: str, begin: int, n_tokens: int, length: int) -> _Window:
        size = min(n_tokens - 1, length)
        values = np.asarray(self.values(source, "val")[begin : begin + size + 1], dtype=np.int64)
        inputs, targets = (np.full(length, self.end_id, dtype=np.int64) for _ in range(2))
        scored = np.zeros(length, dtype=bool)
        inputs[:size], targets[:size], scored[:size] = values[:-1] >> 1, values[1:] >> 1, values[1:] & 1
        return inputs, targets, scored, np.arange(length) < size


def open_data(path: str | Path) -> TokenData | ConversationData:
    """Opens what `moe data prepare` or `moe data instructions` wrote. Raises DataError where it is neither."""
    index = Path(path) / INDEX_FILE
    ours = index.is_file() and f'"format": "{FORMAT}"'.encode() in index.read_bytes()[:4096]
    return ConversationData.open(path) if ours else TokenData.open(path)
