"""Conversations from files, in the layouts that are about, each reduced to roles and contents.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}     OpenAI, Hugging Face
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}         ShareGPT
    {"instruction": ..., "input": ..., "output": ...}                                          Alpaca
    {"prompt": ..., "response": ...} or {"prompt": ..., "completion": ...}, texts or messages  pairs, TRL

All but the first may have a field `system`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe.data.chat import Message, check_messages
from moe.data.rows import Row, check_parquet, csv_rows, json_rows, parquet_rows, suffix_of
from moe.data.sources import Report as SourceReport
from moe.data.sources import Source, chosen_splits, files_of, is_held_out
from moe.errors import DataError

SUFFIXES = (".jsonl", ".parquet")  # of the files of a tree that count
# The fields of a layout that must be there, and those that may.
_LAYOUTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("messages",), ()),
    (("conversations",), ("system",)),
    (("prompt", "response"), ("system",)),
    (("prompt", "completion"), ("system",)),
    (("instruction", "output"), ("system", "input")),
)
_FIELDS = "'messages', 'conversations', 'prompt' and 'response' or 'completion', or 'instruction' and 'output'"
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Conversation(NamedTuple):
    """One conversation; `name` is unique within `source`. `given` is its split where the files say which."""

    source: str
    name: str
    messages: list[dict[str, str]]
    given: str = ""

    @property
    def split(self) -> str:
        """ "train" or "val"."""
        if self.given:
            return self.given
        request = list(_before_response(self.messages))
        return "val" if is_held_out(json.dumps(request, ensure_ascii=True)) else "train"

    def identity(self) -> bytes:
        """All that it is, for a digest."""
        return json.dumps(self if self.given else self[:3]).encode()


def _before_response(messages: Sequence[Message]) -> Iterator[Message]:
    for message in messages:
        if message["role"] == "assistant":
            return
        yield message


@dataclass
class Report:
    """What reading left out: what is no valid text (`source/name`), how much has no response; notices."""

    skipped: list[str] = field(default_factory=list)
    empty: int = 0
    notices: list[str] = field(default_factory=list)


def read_conversations(source: Source, report: Report | None = None) -> Iterator[Conversation]:
    """The conversations of a file (.jsonl, .json, .parquet, .csv), or of all .jsonl and .parquet of a directory tree.

    Rows of which a field is null are left out, with a notice. Of files named after splits, such as train.jsonl beside
    test.jsonl, one is trained on and one held out.

    Raises:
        DataError: another kind of file, or a row that is no conversation; the message names line and field.
    """
    report = report if report is not None else Report()
    path = source.path
    if not isinstance(path, Path):
        raise DataError(f"source {source.name!r}: {path} is of the Hub: conversations are read from files; download it")
    files = {path.name: ""} if path.is_file() else _files_of_tree(source, path, report)
    without, first = 0, ""
    for name, split in files.items():
        for row, where, value in _rows(path if path.is_file() else path / name):
            messages = _messages(value, where)
            if messages is not None:
                yield Conversation(source.name, f"{name}#{row}", messages, split)
            else:
                without, first = without + 1, first or where
    if without:
        report.notices.append(
            f"source {source.name!r}: rows of which a field is null, left out: {without:,}; the first: {first}"
        )


def check_source(source: Source) -> None:
    """Raises ImportError where a library that reads it is missing: before the work, not in the midst of it."""
    if isinstance(source.path, Path) and any(suffix_of(name) == ".parquet" for name in files_of(source)):
        check_parquet(str(source.path))


def _files_of_tree(source: Source, path: Path, report: Report) -> dict[str, str]:
    names = files_of(source)
    if not names:
        raise DataError(f"{path} holds no file ending in {' or '.join(SUFFIXES)}: give conversations as one of them")
    of_source = SourceReport()
    found = chosen_splits(names, source, of_source)
    report.notices += of_source.notices
    return found


def _rows(path: Path) -> Iterable[Row]:
    suffix = suffix_of(path.name)
    if suffix in (".jsonl", ".json"):
        return json_rows(path, f"a field {_FIELDS}")
    if suffix in (".parquet", ".csv", ".tsv"):
        read = parquet_rows if suffix == ".parquet" else csv_rows
        return read(path, lambda columns: _columns(columns, str(path)))
    raise DataError(
        f"{path} ends in {path.suffix!r}: conversations are read from .jsonl, .json, .parquet or .csv files"
    )


def _columns(columns: Iterable[str], where: str) -> list[str]:
    """The fields to read, of those that there are."""
    for needed, more in _LAYOUTS:
        if all(name in columns for name in needed):
            return [name for name in (*more, *needed) if name in columns]
    raise DataError(f"{where}: no field {_FIELDS}; the fields are {sorted(columns)[:20]}: rename them")


def _messages(row: dict[str, Any], where: str) -> list[dict[str, str]] | None:
    """The messages of a row; None where a field that they need is null."""
    fields = {name: row[name] for name in _columns(row, where)}
    needed = [name for name in fields if name not in ("system", "input")]
    if any(fields[name] is None for name in needed):
        return None
    if "messages" in fields:
        return check_messages(fields["messages"], where)
    system, more = fields.get("system"), fields.get("input")
    messages = _said(system, "system", "system", where) if system else []
    if "conversations" in fields:
        return check_messages(messages + _spoken(fields["conversations"], where), where)
    (asked, answered), (request, response) = needed, (fields[name] for name in needed)
    if more and isinstance(request, str):  # Alpaca's
        request = f"{request}\n\n{_text(more, 'input', where)}"
    messages = [*messages, *_said(request, asked, "user", where), *_said(response, answered, "assistant", where)]
    return check_messages(messages, where)


def _said(value: Any, name: str, role: str, where: str) -> list[Any]:
    """A field as messages: those that it lists, or one."""
    return value if isinstance(value, list) else [{"role": role, "content": _text(value, name, where)}]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is a {type(value).__name__}, expected text")
    return value


def _spoken(turns: Any, where: str) -> list[Any]:
    """ShareGPT's turns as messages."""
    if not isinstance(turns, list):
        raise DataError(f'{where}: conversations is a {type(turns).__name__}, expected a list of {{"from", "value"}}')
    messages = []
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and "from" in turn:
            if not isinstance(turn["from"], str) or turn["from"] not in _SPEAKERS:
                expected = f"expected one of {', '.join(_SPEAKERS)}: rename it, or leave out what is not text"
                raise DataError(f"{where}: conversations[{i}].from is {turn['from']!r}, {expected}")
            turn = {**turn, "role": _SPEAKERS[turn["from"]], "content": turn.get("value")}
        messages.append(turn)
    return messages
