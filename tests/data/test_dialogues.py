"""Conversations in the layouts that are about: what each gives, and what is said of one that is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe.data import Source
from moe.data.dialogues import SUFFIXES, read_conversations
from moe.errors import DataError


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


QUESTION, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]}, [QUESTION, ANSWER]),
        ({"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "why?"},
                            {"from": "gpt", "value": "so"}], "id": "x"}, [SYSTEM, QUESTION, ANSWER]),
        ({"conversations": [{"from": "user", "value": "why?"}, ANSWER], "system": "be kind"},
         [SYSTEM, QUESTION, ANSWER]),
        ({"instruction": "why?", "output": "so"}, [QUESTION, ANSWER]),
        ({"instruction": "why?", "input": "", "output": "so"}, [QUESTION, ANSWER]),
        ({"instruction": "why?", "input": None, "output": "so", "system": "be kind"}, [SYSTEM, QUESTION, ANSWER]),
        ({"instruction": "Add.", "input": "1 2", "output": "so"},
         [{"role": "user", "content": "Add.\n\n1 2"}, ANSWER]),
        ({"prompt": "why?", "completion": "so"}, [QUESTION, ANSWER]),
        ({"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        ({"messages": [QUESTION, ANSWER], "prompt": "other"}, [QUESTION, ANSWER]),
    ],
)  # fmt: skip
def test_layouts_of_others(tmp_path: Path, row: dict[str, Any], expected: list[dict[str, str]]) -> None:
    """From JSONL, from a list in .json, and from parquet, whose rows have every field of the others."""
    write(tmp_path / "a.jsonl", [row])
    (tmp_path / "b.json").write_text(json.dumps([row]))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if not isinstance(row.get("system"), str) or "conversations" not in row:  # turns of two kinds are no column
        parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "c.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert [c.messages for c in read_conversations(Source("x", file))] == [expected]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            r"conversations\[0\].from is 'tool', expected one of human",
        ),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, r"from is \['x'\]"),
        ({"conversations": "text"}, "conversations is a str, expected a list"),
        ({"conversations": [{"from": "gpt"}]}, r"content is missing, expected text"),
        ({"instruction": 5, "output": "x"}, "field 'instruction' is a int, expected text"),
        ({"instruction": "x", "input": 5, "output": "x"}, "field 'input' is a int"),
        ({"prompt": "x", "completion": {"a": 1}}, "field 'completion' is a dict"),
        ({"prompt": [QUESTION], "completion": [{"role": "bot", "content": "x"}]}, "role is 'bot'"),
    ],
)
def test_what_is_no_conversation_in_the_layouts_of_others(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    file = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError, match=f"x.jsonl, line 1: .*{complaint}"):
        list(read_conversations(Source("x", file)))


def test_a_directory_gives_the_conversations_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    write(tmp_path / "data" / "b.jsonl", [{"messages": [QUESTION, ANSWER]}])
    write(tmp_path / "data" / "sub" / "a.jsonl", [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER]}])
    (tmp_path / "data" / "notes.txt").write_text("no conversation")
    source = Source("x", tmp_path / "data", suffixes=SUFFIXES)
    assert [conversation.name for conversation in read_conversations(source)] == [
        "b.jsonl#0",
        "sub/a.jsonl#0",
        "sub/a.jsonl#1",
    ]
