"""Prompts from the user's own held-out text: against the files that it was made of."""

import json

import pytest

from moe.data import ConversationData, TokenData, prepare, prepare_conversations
from moe.data.sources import is_held_out
from moe.evaluate import PROMPTS, REQUESTS
from moe.tokenizer import Tokenizer
from moe.train import train
from moe.train.samples import prompts


@pytest.fixture
def texts(tmp_path):
    """Documents by name; each begins with its number, so that it is known by its beginning."""
    (tmp_path / "notes").mkdir()
    found = {f"{i}.txt": f"{i} is the number of this note, and é follows it. " * 3 for i in range(100, 160)}
    for name, text in found.items():
        (tmp_path / "notes" / name).write_text(text, encoding="utf-8")
    return found


def test_prompts_are_beginnings_of_held_out_documents(texts, data_dir, tmp_path):
    data = prepare([tmp_path / "notes"], tmp_path / "data", tokenizer=data_dir / "tokenizer.json")
    held_out = [text for name, text in texts.items() if is_held_out(name)]
    one, other, begin = prompts(TokenData.open(data.path), Tokenizer.load(data_dir / "tokenizer.json"))
    assert begin == ""
    assert one != other
    for prompt in (one, other):
        assert len(prompt) >= 3
        assert any(text.startswith(prompt) for text in held_out), prompt


def test_each_source_has_one(data_dir):
    data = TokenData.open(data_dir)
    *chosen, _ = prompts(data, data.tokenizer())
    assert len(chosen) == len(data.sources) == 2


def test_of_conversations_they_are_what_users_asked_first(data_dir, tmp_path):
    rows = [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"say\n{i}"},
            {"role": "assistant", "content": "the cat"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "the mat"},
        ]
        for i in range(100)
    ]
    lines = "\n".join(json.dumps({"messages": row}) for row in rows)
    (tmp_path / "mine.jsonl").write_text(lines, encoding="utf-8")
    prepare_conversations([tmp_path / "mine.jsonl"], tmp_path / "data", tokenizer=str(data_dir / "tokenizer.json"))
    data = ConversationData.open(tmp_path / "data")
    asked = prompts(data, data.tokenizer())
    assert len(asked) == len(set(asked)) == len(REQUESTS)
    assert set(asked) <= {f"say\n{i}" for i in range(100)}


def test_the_default_data_keep_theirs(data_dir, monkeypatch):
    data = TokenData.open(data_dir)
    monkeypatch.setattr(data, "sources", ("text", "code"))
    assert prompts(data, data.tokenizer()) == PROMPTS


def test_a_run_begins_its_samples_with_them(cfg, data_dir, tmp_path):
    train(cfg.with_overrides(["train.steps=1"]), data_dir, tmp_path / "run")
    data = TokenData.open(data_dir)
    written = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    assert all(f"--- step 1\n{prompt}" in written for prompt in prompts(data, data.tokenizer()))
