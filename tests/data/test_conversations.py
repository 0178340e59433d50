"""Conversations from files to windows: nothing lost, nothing split, only responses learned; what is refused."""

import ast
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.data import ConversationData, ConversationStream, prepare_conversations
from moe.data.conversations import Prepared
from moe.data.instructions import small_talk, standard_library
from moe.data.mixture import IGNORE
from moe.data.packing import best_fit
from moe.errors import DataError, InUseError
from moe.io.files import locked
from moe.tokenizer import Tokenizer, train_bpe

MARK = "<|endoftext|>"


def talk(i: int) -> list[dict[str, str]]:
    messages = [
        {"role": "user", "content": f"question {i} " + "why " * (i % 7)},
        {"role": "assistant", "content": f"answer {i}"},
    ]
    if i % 3 == 0:
        messages.insert(0, {"role": "system", "content": "be kind"})
    if i % 5 == 0:
        messages += [{"role": "user", "content": "more"}, {"role": "assistant", "content": f"again {i}"}]
    if i % 11 == 0:
        messages.append({"role": "user", "content": "thanks"})
    return messages


def rendered(messages: list[dict[str, str]]) -> str:
    """What the template makes of a conversation with a tokenizer without markers, up to the last response."""
    while messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return "\n".join(f"{MARK}{m['role']}\n{m['content']}{MARK}" for m in messages)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["question why answer system user assistant be kind more again thanks " * 9], 300)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """120 conversations, in shards of 500 tokens, which some conversations cross."""
    place = tmp_path_factory.mktemp("conversations")
    file = write(place / "talk.jsonl", [{"messages": talk(i)} for i in range(120)])
    return prepare_conversations([file], place / "out", tokenizer=tokenizer, shard_tokens=500)


def stored(data: ConversationData, split: str) -> list[tuple[str, str]]:
    """(text, learned text with every other token as "_") of each conversation on disk."""
    tokenizer, found = data.tokenizer(), []
    for source in data.sources:
        table, stream = data.table(source, split), data.values(source, split)
        for begin, n in zip(table.offsets, table.n_tokens, strict=True):
            values = stream[int(begin) : int(begin + n)].tolist()
            shown = "".join(tokenizer.decode([v >> 1]) if v & 1 else "_" for v in values)
            found.append((tokenizer.decode([v >> 1 for v in values]), shown))
    return found


def test_every_conversation_is_stored_once_with_its_responses_learned(prepared: Prepared) -> None:
    data = prepared.data
    train, held_out = stored(data, "train"), stored(data, "val")
    assert sorted(text for text, _ in train + held_out) == sorted(rendered(talk(i)) for i in range(120))
    assert 0 < len(held_out) < 30
    for text, learned in train + held_out:
        answers = [part.split("\n", 1)[1] for part in text.split(MARK) if part.startswith("assistant\n")]
        assert [part for part in learned.split("_") if part] == [answer + MARK for answer in answers]
    table = data.table("talk", "train")
    assert len(data.index["sources"]["talk"]["train"]["shards"]) > 3
    one = table.names.index("talk.jsonl#5")
    assert table.n_bytes[one] == len("answer 5" + "again 5")


def test_the_split_goes_by_the_request_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Other answers to a request, and other rows around it, leave it on its side."""
    one = [{"prompt": f"question {i}", "response": "yes"} for i in range(100)]
    other = [{"prompt": f"question {i}", "response": f"no {i}"} for i in reversed(range(100)) for _ in range(2)]
    sides = []
    for name, rows in (("one", one), ("other", other)):
        out = prepare_conversations([write(tmp_path / f"{name}.jsonl", rows)], tmp_path / name, tokenizer=tokenizer)
        sides.append({text.split(MARK)[1] for text, _ in stored(out.data, "val")})
    assert sides[0] == sides[1]
    assert 0 < len(sides[0]) < 20


def test_jsonl_parquet_and_both_layouts_give_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pairs = [{"system": "be kind" if i % 2 else None, "prompt": f"why {i}", "response": f"{i}"} for i in range(40)]
    roles = {"system": "system", "prompt": "user", "response": "assistant"}
    full = [
        {"messages": [{"role": roles[k], "content": v} for k, v in pair.items() if v is not None]} for pair in pairs
    ]
    files = [write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "full.jsonl", full)]
    for name, rows in (("pairs", pairs), ("full", full)):
        files.append(tmp_path / f"{name}.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), files[-1])
    made = [prepare_conversations([f"x={f}"], tmp_path / f.name[::-1], tokenizer=tokenizer).data for f in files]
    assert stored(made[0], "train")
    for other in made[1:]:
        assert stored(other, "train") == stored(made[0], "train")
        assert stored(other, "val") == stored(made[0], "val")


def test_rows_of_nulls_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"why {i}", "response": "so"} for i in range(50)]
    rows += [{"prompt": None, "response": "so"}, {"prompt": "why", "response": None}, {"messages": None}]
    data = prepare_conversations([write(tmp_path / "x.jsonl", rows)], tmp_path / "out", tokenizer=tokenizer).data
    assert len(stored(data, "train")) + len(stored(data, "val")) == 50
    assert any("rows of which a field is null, left out: 3; the first:" in notice for notice in data.index["notices"])
    assert any("x.jsonl, line 51" in notice for notice in data.index["notices"])
    with pytest.raises(DataError, match=r"no conversation to train on.*of which a field is null, left out: 1;"):
        prepare_conversations([write(tmp_path / "y.jsonl", rows[-1:])], tmp_path / "out2", tokenizer=tokenizer)


def test_splits_of_files_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No conversation of a test file is trained on, whatever its request."""
    for name, n in (("train", 30), ("test", 10)):
        (tmp_path / "set").mkdir(exist_ok=True)
        rows = [{"prompt": f"why {i}", "response": name} for i in range(n)]
        write(tmp_path / "set" / f"{name}.jsonl", rows)
    data = prepare_conversations([tmp_path / "set"], tmp_path / "out", tokenizer=tokenizer).data
    assert {text.rpartition("\n")[2] for text, _ in stored(data, "train")} == {"train" + MARK}
    assert (len(stored(data, "train")), len(stored(data, "val"))) == (30, 10)
    assert "split 'train' is trained on, 'test' is held out" in data.index["notices"][0]
    assert prepare_conversations([tmp_path / "set"], tmp_path / "out", tokenizer=tokenizer).reused


def test_libraries_are_missed_before_the_work(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", [{"broken": 1}])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"gpt4-moe\[data\]"):
        prepare_conversations([tmp_path], tmp_path / "out", tokenizer=tokenizer)
    if small_talk() is not None:
        monkeypatch.setitem(sys.modules, "yaml", None)
        with pytest.raises(ImportError, match=r"PyYAML.*gpt4-moe\[data\]"):
            prepare_conversations(None, tmp_path / "out", tokenizer=tokenizer)


def test_prepared_data_are_found_again_and_never_overwritten_unasked(
    prepared: Prepared, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out, file = prepared.data.path, prepared.data.path.parent / "talk.jsonl"
    again = prepare_conversations([file], out, tokenizer=tokenizer, shard_tokens=500)
    assert again.reused
    assert not prepared.reused
    assert again.data.fingerprint == prepared.data.fingerprint
    other = write(tmp_path / "talk.jsonl", [{"messages": talk(i)} for i in range(121)])
    with pytest.raises(DataError, match="prepared from other sources or settings"):
        prepare_conversations([other], out, tokenizer=tokenizer, shard_tokens=500)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not prepared conversations"):
        prepare_conversations([other], tmp_path / "mine", tokenizer=tokenizer, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    whole = prepare_conversations([other], tmp_path / "whole", tokenizer=tokenizer, shard_tokens=10**6)
    cut = prepare_conversations([other], tmp_path / "cut", tokenizer=tokenizer, shard_tokens=64)
    assert whole.data.fingerprint == cut.data.fingerprint != prepared.data.fingerprint


def test_two_preparations_of_one_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{"messages": talk(i)} for i in range(60)])
    with locked(tmp_path / "out"), pytest.raises(InUseError, match=r"out is in use by process"):
        prepare_conversations([file], tmp_path / "out", tokenizer=tokenizer)
    prepare_conversations([file], tmp_path / "out", tokenizer=tokenizer)
    with locked(tmp_path / "out"):
        assert prepare_conversations([file], tmp_path / "out", tokenizer=tokenizer).reused


def test_rows_without_a_response_or_not_unicode_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"why {i}", "response": "so"} for i in range(50)]
    rows += [{"prompt": "why", "response": " \n"}, {"prompt": "lone \ud800", "response": "x"}]
    data = prepare_conversations([write(tmp_path / "x.jsonl", rows)], tmp_path / "out", tokenizer=tokenizer).data
    assert data.index["empty"] == 1
    assert data.index["skipped"] == ["x/x.jsonl#51"]
    assert len(stored(data, "train")) + len(stored(data, "val")) == 50


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a"}, r"line 2: no field 'messages', 'conversations', .*'output'; the fields are \['text'\]"),
        ({"prompt": "a", "response": 3}, "line 2: field 'response' is a int, expected text"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"line 2: messages\[0\].role is 'bot'"),
        ([1], "line 2: a list, expected an object with a field 'messages'"),
    ],
)
def test_a_bad_row_stops_with_file_line_and_field(
    tokenizer: Tokenizer, tmp_path: Path, row: Any, complaint: str
) -> None:
    file = write(tmp_path / "x.jsonl", [{"prompt": "a", "response": "b"}, row])
    with pytest.raises(DataError, match=complaint):
        prepare_conversations([file], tmp_path / "out", tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_is_no_source_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match=r"x.json: an empty list, expected a list of objects"):
        prepare_conversations([tmp_path / "x.json"], tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(DataError, match=r"ends in '.txt': conversations are read from .jsonl, .json, .parquet or .csv"):
        prepare_conversations([tmp_path / "x.txt"], tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file ending in .jsonl or .parquet"):
        prepare_conversations([tmp_path / "empty"], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(DataError, match="no prepared data in"):
        ConversationData.open(tmp_path / "empty")


def test_token_data_and_conversations_are_not_taken_for_each_other(data: Any, prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"'moe-tokens', not 'moe-conversations'.*moe data instructions"):
        ConversationData.open(data.path)
    with pytest.raises(DataError, match="'moe-conversations', not 'moe-tokens'"):
        type(data).open(prepared.data.path)


# ---------------------------------------------------------------------------------------------------------- packing


@given(sizes=st.lists(st.integers(1, 50), max_size=80), slack=st.integers(0, 30))
def test_packing_overfills_no_bin_and_takes_few(sizes: list[int], slack: int) -> None:
    capacity = max(sizes, default=1) + slack
    order = np.array(sorted(sizes, reverse=True), dtype=np.int64)
    bins = best_fit(order, capacity)
    loads = np.bincount(bins, weights=order)
    assert (loads <= capacity).all()
    assert (loads > 0).all()
    # A multiple of what no packing can beat; Johnson's 11/9 is of the optimum, which would have to be searched for.
    fewest = max(math.ceil(sum(sizes) / capacity), sum(size > capacity / 2 for size in sizes))
    assert len(loads) <= 1.5 * fewest + 1
    # Of the bins with room when an item came, it went into the fullest.
    room = [capacity] * len(loads)
    for size, chosen in zip(order, bins, strict=True):
        fitting = [r for r in room if size <= r < capacity]
        assert room[chosen] == (min(fitting) if fitting else capacity)
        room[chosen] -= size


def test_packing_refuses_what_fits_nowhere() -> None:
    with pytest.raises(ValueError, match=r"sizes\[1\] = 9"):
        best_fit(np.array([3, 9]), 8)


def pieces(stream: ConversationStream, start: int, count: int) -> list[tuple[str, str]]:
    """(inputs, learned targets) as text of each document in the windows, padding left out."""
    tokenizer, found = stream.data.tokenizer(), []
    batch = stream.batch(start, count)
    assert batch.documents is not None
    for inputs, targets, documents in zip(batch.inputs, batch.targets, batch.documents, strict=True):
        assert (np.diff(documents) >= 0).all()
        for number in range(documents.max() + 1):
            here = documents == number
            learned = targets[here][targets[here] != IGNORE]
            if len(learned):
                found.append((tokenizer.decode(inputs[here].tolist()), tokenizer.decode(learned.tolist())))
            else:
                assert number == documents.max()
                assert (inputs[here] == stream.data.end_id).all()
    return found


def test_a_pass_visits_every_conversation_once_and_learns_its_responses(prepared: Prepared) -> None:
    stream = ConversationStream(prepared.data, 96, seed=3)
    assert stream.notices == []
    expected = []
    for text, _ in stored(prepared.data, "train"):
        answers = [part.split("\n", 1)[1] for part in text.split(MARK) if part.startswith("assistant\n")]
        expected.append((text.removesuffix(MARK), "".join(answer + MARK for answer in answers)))
    n = stream.windows_per_epoch
    for one_pass in range(2):
        assert sorted(pieces(stream, one_pass * n, n)) == sorted(expected)
    tokens = sum(int(prepared.data.table(source, "train").n_tokens.sum()) for source in prepared.data.sources)
    assert tokens / (n * 96) > 0.8, "windows are mostly conversation, not padding"


def test_targets_are_the_next_tokens(prepared: Prepared) -> None:
    batch = ConversationStream(prepared.data, 96, seed=3).batch(0, 5)
    assert batch.documents is not None
    row, place = np.nonzero((batch.targets[:, :-1] != IGNORE) & (batch.documents[:, :-1] == batch.documents[:, 1:]))
    inner = batch.inputs[row, place + 1] == batch.targets[row, place]
    # Except the last target of a conversation, the end marker, which is no input.
    assert inner.all()
    assert len(inner) > 50


def test_a_sample_is_a_function_of_seed_and_number(prepared: Prepared) -> None:
    stream, same = (ConversationStream(prepared.data, 64, seed=1) for _ in range(2))
    n = stream.windows_per_epoch
    whole = stream.batch(0, 2 * n)
    for start, count in ((0, 1), (7, 5), (n - 2, 4)):
        part = same.batch(start, count)
        for got, want in zip(part, whole, strict=True):
            assert got is not None
            assert want is not None
            assert np.array_equal(got, want[start : start + count])
    other = ConversationStream(prepared.data, 64, seed=2)
    assert not np.array_equal(other.batch(0, n).inputs, whole.inputs[:n])
    assert not np.array_equal(stream.batch(0, n).inputs, stream.batch(n, n).inputs)


def test_epochs_of_a_source_are_exact(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [{"messages": talk(i)} for i in range(40)]) for name in ("a", "b", "c")]
    data = prepare_conversations(files, tmp_path / "out", tokenizer=tokenizer).data
    stream = ConversationStream(data, 96, 0, {"b": 3, "c": 0})
    once = ConversationStream(data, 96, 0, {"b": 0, "c": 0})
    single = pieces(once, 0, once.windows_per_epoch)
    assert sorted(pieces(stream, 0, stream.windows_per_epoch)) == sorted(single * 4)
    assert stream.fingerprint != once.fingerprint
    assert once.batch(0, 1).documents is not None
    assert ConversationStream(data, 96, 0, documents=False).batch(0, 1).documents is None
    with pytest.raises(DataError, match="'d'"):
        ConversationStream(data, 96, 0, {"d": 1})
    with pytest.raises(DataError, match="leaves no conversation"):
        ConversationStream(data, 96, 0, {"a": 0, "b": 0, "c": 0})


def test_resuming_on_another_stream_is_refused(prepared: Prepared) -> None:
    stream = ConversationStream(prepared.data, 64, seed=1)
    ConversationStream(prepared.data, 64, seed=1).check_resume(stream.fingerprint)
    for other in (ConversationStream(prepared.data, 64, seed=2), ConversationStream(prepared.data, 65, seed=1)):
        with pytest.raises(DataError, match="read another stream"):
            other.check_resume(stream.fingerprint)


def test_what_is_too_long_is_cut_or_left_out_with_a_notice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": f"short {i}"} for i in range(40)]
    rows += [{"prompt": "a", "response": f"answer {'kind ' * 100}end"}, {"prompt": "b " * 100, "response": "late"}]
    data = prepare_conversations([write(tmp_path / "x.jsonl", rows)], tmp_path / "out", tokenizer=tokenizer).data
    texts = [text for text, _ in stored(data, "train")]
    long = sum("end<" in text for text in texts)
    late = sum("late" in text for text in texts)
    stream = ConversationStream(data, 40, seed=0)
    assert (stream.cut, stream.left_out) == (long, late) == (1, 1)
    assert [notice.split(":")[0] for notice in stream.notices] == [
        f"1 of {len(texts)} conversations are longer than 40 tokens and are cut",
        f"1 of {len(texts)} conversations are left out",
    ]
    found = pieces(stream, 0, stream.windows_per_epoch)
    assert len(found) == len(texts) - 1
    (cut,) = [learned for _, learned in found if learned.startswith("answer")]
    assert "kind" in cut
    assert not cut.endswith(MARK)
    with pytest.raises(DataError, match="seq_len is 3, too short for a response of any"):
        ConversationStream(data, 3, seed=0)


def test_held_out_windows_score_the_held_out_responses(prepared: Prepared) -> None:
    data = prepared.data
    tokenizer, found = data.tokenizer(), []
    for source, inputs, targets, scored, is_text in data.held_out_windows(64):
        assert source == "talk"
        assert len(inputs) in (32, 64)
        assert (inputs[~is_text] == data.end_id).all()
        assert is_text.tolist() == sorted(is_text.tolist(), reverse=True), "padding is behind the text"
        last = int(np.flatnonzero(scored)[-1])
        found.append(tokenizer.decode([*inputs[: last + 1].tolist(), int(targets[last])]))
        assert tokenizer.decode(targets[scored].tolist()).startswith(("answer", "again"))
    assert sorted(found) == sorted(text for text, _ in stored(data, "val"))


def test_replies_of_which_no_text_fits_are_not_scored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The first reply is empty, the second lies beyond the window: its end marker alone is no byte of text."""

    def conversation(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": ""},
                {"role": "user", "content": "why " * 200}, {"role": "assistant", "content": "late"}]  # fmt: skip

    rows = [{"messages": conversation(i)} for i in range(200)]
    file = write(tmp_path / "late.jsonl", rows)
    data = prepare_conversations([file], tmp_path / "out", tokenizer=tokenizer).data
    held_out = len(stored(data, "val"))
    assert held_out > 0
    assert list(data.held_out_windows(64)) == []
    assert len(list(data.held_out_windows(1024))) == held_out
    (notice,) = data.not_scored(64)
    assert notice.startswith(
        f"source 'late': none of its {held_out} held-out conversations has text of a response within 64"
    )
    assert notice in ConversationStream(data, 64, seed=0).notices
    assert data.not_scored(1024) == []


# ---------------------------------------------------------------------------------------------------------- pickling


def test_pickles_hold_no_tokens(prepared: Prepared) -> None:
    stream = ConversationStream(prepared.data, 96, seed=3, epochs={"talk": 2}, documents=False)
    for one in (prepared.data, stream, prepared.data.values("talk", "train")):
        assert len(pickle.dumps(one)) < 3000
    again = pickle.loads(pickle.dumps(stream))
    assert np.array_equal(again.batch(5, 9).targets, stream.batch(5, 9).targets)
    assert again.batch(5, 9).documents is None
    assert again.fingerprint == stream.fingerprint
    assert pickle.loads(pickle.dumps(prepared.data)).fingerprint == prepared.data.fingerprint


# ------------------------------------------------------------------------------------------------------- real pairs


def test_functions_of_the_standard_library() -> None:
    pairs = dict(standard_library())
    assert 2500 < len(pairs) < 4500  # 2,923 to 3,470 in two releases of Python 3.11
    name = next(n for n in pairs if n.startswith("textwrap.py:shorten#"))
    request, response = pairs[name]
    assert request["content"].startswith("Write the Python function shorten.\n\nCollapse and truncate the given text")
    assert response["content"] == (
        "def shorten(text, width, **kwargs):\n"
        "    w = TextWrapper(width=width, max_lines=1, **kwargs)\n"
        "    return w.fill(' '.join(text.strip().split()))"
    )
    for messages in pairs.values():
        ast.parse(messages[1]["content"])


def test_small_talk_of_chatterbot_corpus() -> None:
    if small_talk() is None:
        pytest.skip("chatterbot-corpus is not installed")
    conversations = dict(small_talk() or ())
    assert len(conversations) > 1500
    assert conversations["ai.yml#0"][0] == {"role": "user", "content": "What is AI?"}
    assert all(m["content"].strip() for messages in conversations.values() for m in messages)
