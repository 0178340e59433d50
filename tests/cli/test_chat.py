"""`moe chat` and `moe finetune` from the command line: what is said, what is remembered, what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe.chat import Session
from moe.data.chat import ChatTemplate
from moe.generate import stream
from moe.serve.engine import Engine
from moe.serve.output import Delta
from moe.tokenizer import train_bpe
from tests.conftest import run_cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained model: it writes noise until it happens on an end-of-text or has written enough."""
    tokenizer = train_bpe(["user assistant hello what is it é日本 " * 20], 290)
    shape = ["d_model=64", "n_layers=1", "vocab_size=290", "max_seq_len=96", "attention.n_heads=2"]
    shape += ["attention.head_dim=16", "experts.n_experts=4", "experts.d_ff=64"]
    place = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = tokenizer.with_chat_template(ChatTemplate(tokenizer).jinja)
    moe.save(moe.Transformer(moe.load_config("replica-tiny").with_overrides(shape), seed=1), place, tokenizer=tokenizer)
    return place


def expected(checkpoint, turns, n, seed, **sampling) -> str:
    """What the model writes after these turns (user, assistant, user, ...) up to the end of its turn."""
    model, tokenizer = moe.load(checkpoint), moe.load_tokenizer(checkpoint)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    ids = ChatTemplate(tokenizer).prompt(messages)
    if sampling["temperature"]:
        new = torch.cat(list(stream(model, torch.tensor([ids]), n, seed=seed, **sampling))).tolist()
    else:
        new = model.generate(torch.tensor([ids]), n, temperature=0)[0, len(ids) :].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.eot_id)] if tokenizer.eot_id in new else new)


DRAWS = {"temperature": 0.7, "top_k": 0, "top_p": 0.95}


@pytest.mark.parametrize("seed", range(3))
def test_one_message_gets_what_the_model_writes_after_the_template(checkpoint, capsys, seed) -> None:
    assert run_cli("chat", checkpoint, "--message", "hello <|endoftext|>", "--max-tokens", 20, "--seed", seed) == 0
    assert capsys.readouterr().out == expected(checkpoint, ["hello <|endoftext|>"], 20, seed, **DRAWS) + "\n"


def test_a_piped_conversation_remembers_until_reset(checkpoint, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nwhat\n/reset\nhello\n/nonsense\n/exit\nnever\n"))
    assert run_cli("chat", checkpoint, "--max-tokens", 12, "--temperature", 0) == 0
    out, err = capsys.readouterr()
    first = expected(checkpoint, ["hello"], 12, 0, temperature=0)
    second = expected(checkpoint, ["hello", first, "what"], 12, 0, temperature=0)
    assert out == f"{first}\n{second}\n{first}\n"
    assert "no such command as /nonsense" in err
    assert "\x1b" not in out


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_guessed_tokens_are_the_models_own(checkpoint, command, capsys, monkeypatch) -> None:
    """From the text itself, and by a model, which is here the same and so is right each time."""
    args = ["--message" if command == "chat" else "--prompt", "hello hello hello", "--max-tokens", 20]
    answers, engines = [], []
    init = Engine.__init__

    def watched(self: Engine, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", watched)
    for guesser in ("none", "ngram", checkpoint):
        assert run_cli(command, checkpoint, *args, "--temperature", 0, "--speculative", guesser) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0].strip()
    assert answers[1] == answers[2] == answers[0]
    none, _, model = (e.stats for e in engines)
    assert none.drafted == 0
    assert 0 < model.accepted <= model.drafted


def test_the_end_of_the_turn_stops_a_reply_and_is_not_printed(checkpoint, monkeypatch) -> None:
    tokenizer = moe.load_tokenizer(checkpoint)
    session = Session(moe.load(checkpoint), tokenizer, max_tokens=50)
    ids = [*tokenizer.encode("é日本"), tokenizer.eot_id, *tokenizer.encode("never")]
    monkeypatch.setattr(session.engine, "stream", lambda *_: (Delta("", 0, [i], "") for i in ids))
    assert "".join(session.reply("hello")) == "é日本"
    assert session.turns == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "é日本"}]


def test_a_conversation_computes_only_what_is_new(checkpoint) -> None:
    session = Session(moe.load(checkpoint), moe.load_tokenizer(checkpoint), max_tokens=8, temperature=0)
    list(session.reply("hello " * 12))
    before, first = session.engine.stats.tokens, session.template.prompt(session.turns[:1])
    list(session.reply("what"))
    prompt = session.template.prompt(session.turns[:-1])
    # Whole blocks of the first message stay; the last token of an answer is not computed.
    assert session.engine.stats.tokens - before <= len(prompt) - len(first) // 16 * 16 + 8 - 1


def test_a_full_context_forgets_the_oldest_turns_and_keeps_the_system_message(checkpoint, capsys, monkeypatch) -> None:
    session = Session(moe.load(checkpoint), moe.load_tokenizer(checkpoint), system="is", max_tokens=8, temperature=0)
    for _ in range(6):
        list(session.reply("what is it"))
    assert session.forgotten > 0
    prompt = session.template.prompt([*session.system, *session.turns[:-1]])
    assert len(prompt) <= 96 - 8
    assert session.tokenizer.decode(prompt).startswith("<|endoftext|>system\nis<|endoftext|>")
    assert session.turns[0]["role"] == "user"
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it\n" * 6))
    assert run_cli("chat", checkpoint, "--max-tokens", 8) == 0
    assert "the context is full: 2 messages are forgotten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--message", "what " * 200], 2, "shorten it"),
        (["--message", "a", "--temperature", -1], 2, "temperature = -1"),
        (["--message", "a", "--max-tokens", 0], 2, "--max-tokens = 0"),
        (["--message", "a", "--adapter", "nowhere"], 1, "nowhere: no such file"),
        (["--message", "a", "--speculative", "n-gram"], 2, "--speculative n-gram: must be none, ngram, or"),
    ],
)
def test_what_cannot_be_is_one_line_on_stderr(checkpoint, capsys, args, status, message) -> None:
    assert run_cli("chat", checkpoint, *args) == status
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_conversations_fine_tune_and_chat_in_order(checkpoint, tmp_path, capsys) -> None:
    """The three commands, with LoRA; and the adapter on its base says what the merged model says."""
    rows = [{"prompt": f"hello {i}", "response": "what is it"} for i in range(60)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ["data", "instructions", tmp_path / "talk.jsonl", "--tokenizer", checkpoint, "--out", tmp_path / "data"]
    assert run_cli(*made) == 0
    assert run_cli(*made) == 0
    assert "already prepared" in capsys.readouterr().out
    tune = ["finetune", checkpoint, "--data", tmp_path / "data", "--out", tmp_path / "run", "--lora", "--rank", 4]
    assert run_cli(*tune, "--epochs", 4, "--set", "train.batch_size=4", "train.lr=2e-2") == 0
    out = capsys.readouterr().out
    assert "LoRA of rank 4 on attention and experts" in out
    assert f"try: moe chat {tmp_path / 'run' / 'final'}" in out
    said = []
    for args in ([tmp_path / "run" / "final"], [checkpoint, "--adapter", tmp_path / "run"]):
        assert run_cli("chat", *args, "--message", "hello 7", "--temperature", 0, "--max-tokens", 12) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == "what is it\n"


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["finetune", "nowhere", "--data", "x", "--out", "y"], 1, "no prepared data in x"),
        (["finetune", "CHECKPOINT", "--data", "x", "--out", "y", "--lora", "--rank", 0], 2, "lora.rank = 0"),
        (["finetune", "CHECKPOINT", "--data", "x", "--out", "y", "--lora", "--on", "head"], 2, "lora.targets"),
        (["data", "instructions", "nowhere", "--tokenizer", "CHECKPOINT", "--out", "y"], 1, "nowhere does not exist"),
        (["data", "instructions", "--tokenizer", "nowhere", "--out", "y"], 1, "no tokenizer at nowhere"),
    ],
)
def test_fine_tuning_refuses_what_cannot_be(checkpoint, tmp_path, monkeypatch, capsys, args, status, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(*(checkpoint if a == "CHECKPOINT" else a for a in args)) == status
    assert message in capsys.readouterr().err
