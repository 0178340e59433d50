"""Passkey examples are what they claim to be, and answers are judged by what a model would write."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.studies.passkey_task import INTRODUCTION, QUESTION, REMINDER, Passkey, PasskeyError, retrieve
from moe import Transformer
from moe.data import TokenData
from moe.kernels.loss import IGNORE_INDEX

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(data_dir):
    return TokenData.open(data_dir)


@pytest.fixture
def task(data):
    return Passkey(data.tokenizer(), data.tokens("prose", "train"))


def text_of(task: Passkey, data: TokenData, tokens) -> str:
    return data.tokenizer().decode(tokens.tolist())


def test_the_key_stands_in_real_text_and_is_asked_for_at_the_end(task, data):
    seq_len = task.overhead + 60
    made = task.examples(np.random.default_rng(0), 50, seq_len)
    assert made.tokens_BS.shape == (50, seq_len + 1)
    source = data.tokenizer().decode(data.tokens("prose", "train")[:].tolist())
    keys = set()
    for row in made.tokens_BS:
        text = text_of(task, data, row)
        before, _, rest = text.partition(INTRODUCTION)
        key, between = rest[:4], rest[4:]
        assert len(set(key)) == 4
        assert key.isdecimal()
        assert between.startswith(REMINDER)
        assert text.endswith(QUESTION + key)
        filler = before + between.removeprefix(REMINDER).removesuffix(QUESTION + key)
        assert filler in source
        keys.add(key)
    assert len(keys) > 40


def test_depth_and_distance_are_where_the_key_is(task):
    seq_len = task.overhead + 100
    made = task.examples(np.random.default_rng(1), 40, seq_len, (0.25, 0.5))
    assert ((made.depth_B >= 0.25) & (made.depth_B <= 0.5)).all()
    asked_at = seq_len + 1 - 4
    for row, distance, depth in zip(made.tokens_BS, made.distance_B, made.depth_B, strict=True):
        hidden_at = asked_at - distance
        assert (row[hidden_at : hidden_at + 4] == row[-4:]).all()
        introduction = len(task._introduction)
        assert hidden_at - introduction == pytest.approx(depth * 101, abs=0.51)
    ends = [task.examples(np.random.default_rng(0), 1, seq_len, (d, d)).distance_B[0] for d in (0.0, 1.0)]
    assert ends[0] - ends[1] == 101


def test_the_same_generator_gives_the_same_examples(task):
    one, other = (task.examples(np.random.default_rng(5), 8, 120) for _ in range(2))
    assert (one.tokens_BS == other.tokens_BS).all()


def test_only_the_key_is_a_target(task):
    made = task.examples(np.random.default_rng(2), 3, 120)
    inputs_BS, targets_BS = made.batch(slice(1, 3))
    assert inputs_BS.shape == targets_BS.shape == (2, 120)
    assert (inputs_BS.numpy() == made.tokens_BS[1:, :-1]).all()
    assert (targets_BS[:, :-4] == IGNORE_INDEX).all()
    assert (targets_BS[:, -4:].numpy() == made.tokens_BS[1:, -4:]).all()


@pytest.mark.parametrize("key_tokens", [1, 4, 10])
def test_chance_counts_the_keys(data, key_tokens):
    task = Passkey(data.tokenizer(), data.tokens("prose", "train"), key_tokens)
    assert task.chance == pytest.approx(math.factorial(10 - key_tokens) / math.factorial(10))
    made = task.examples(np.random.default_rng(0), 200, task.overhead + 5)
    keys = {tuple(row[-key_tokens:]) for row in made.tokens_BS}
    assert len(keys) == 10 if key_tokens == 1 else len(keys) > 150


def test_a_model_that_cannot_know_answers_as_a_uniform_one(task, cfg):
    """A model without preferences gives every key the probability V^-Q."""
    model = Transformer(cfg.with_overrides(["max_seq_len=128"]))
    torch.nn.init.zeros_(model.head.weight)
    answer = retrieve(model, task.examples(np.random.default_rng(0), 5, 120), batch=2)
    assert answer.logprob == pytest.approx(-4 * math.log(cfg.vocab_size), rel=1e-6)
    assert answer.accuracy == 0


def test_correct_is_what_greedy_decoding_writes(task, cfg):
    """Of keys put in the place of the right one, the key that the model itself would write counts as correct."""
    model = Transformer(cfg.with_overrides(["max_seq_len=128"]), seed=1)
    made = task.examples(np.random.default_rng(0), 6, 120)
    asked = torch.from_numpy(made.tokens_BS[:, :-4])
    written = model.generate(asked, 4, temperature=0).numpy()
    made.tokens_BS[:3] = written[:3]
    made.tokens_BS[3:, -1] = (written[3:, -1] + 1) % 300
    made.tokens_BS[3:, -4:-1] = written[3:, -4:-1]
    answer = retrieve(model, made, batch=4)
    assert answer.correct_B.tolist() == [True] * 3 + [False] * 3
    with torch.no_grad():
        logp = model(torch.from_numpy(made.tokens_BS[:1, :-1])).logits_BSV[0, -4:].double().log_softmax(-1)
    expected = sum(logp[i, token].item() for i, token in enumerate(made.tokens_BS[0, -4:]))
    assert answer.logprob_B[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("seq_len", "depths", "message"),
    [(20, (0.0, 1.0), "seq_len = 20"), (10**9, (0.0, 1.0), "more text"), (120, (0.5, 1.5), "depths")],
)
def test_impossible_examples_are_refused(task, seq_len, depths, message):
    with pytest.raises(PasskeyError, match=message):
        task.examples(np.random.default_rng(0), 1, seq_len, depths)


def test_a_key_has_at_most_ten_digits(data):
    with pytest.raises(PasskeyError, match="key_tokens = 11"):
        Passkey(data.tokenizer(), data.tokens("prose", "train"), 11)


@pytest.mark.slow
def test_the_extended_replica_uses_positions_beyond_its_context(tmp_path):
    """The study, with fewer examples: as trained at 256, with RoPE scaled and fine-tuned at 1,024."""
    command = [sys.executable, "benchmarks/studies/passkey.py", "--quick", "--out", str(tmp_path)]
    command += ["--data", str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "passkey.json").read_text())
    unextended, extended = record["models"]["unextended"], record["models"]["yarn, fine-tuned"]
    assert unextended["within"]["accuracy"] > 0.6
    assert unextended["beyond"]["accuracy"] < 0.1
    assert extended["within"]["accuracy"] > 0.6
    assert extended["beyond"]["accuracy"] > 0.6
    # What it answers beyond is worse than a guess; fine-tuned it is much better.
    chance = math.log(record["chance"])
    assert unextended["beyond"]["logprob"] < chance + 1
    assert extended["beyond"]["logprob"] > chance + 4
