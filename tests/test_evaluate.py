"""Bits per byte: exact for a model whose probabilities are known, every token once, the same each time."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe import Transformer, evaluate
from moe.data import TokenData
from moe.tokenizer import cl100k


@pytest.fixture
def data(data_dir):
    return TokenData.open(data_dir)


@pytest.fixture
def uniform(cfg):
    model = Transformer(cfg)
    torch.nn.init.zeros_(model.head.weight)
    return model


def test_byte_lengths_add_up_to_the_text(data):
    lengths = evaluate.byte_lengths(data.tokenizer())
    for source in data.sources:
        for split in ("train", "val"):
            assert lengths[data.tokens(source, split)[:]].sum() == data.n_bytes(source, split)


def test_a_uniform_model_needs_log2_v_bits_per_token(data, uniform):
    lengths = evaluate.byte_lengths(data.tokenizer())
    scores = evaluate.evaluate(uniform, evaluate.all_windows(data, 16), lengths, batch=3)
    assert list(scores) == list(data.sources)
    for source, score in scores.items():
        tokens, n_bytes = len(data.tokens(source, "val")), data.n_bytes(source, "val")
        assert (score.tokens, score.bytes) == (tokens, n_bytes)
        assert score.bits_per_byte == pytest.approx(math.log2(300) * tokens / n_bytes, rel=1e-6)
    together = evaluate.total(scores)
    assert together.tokens == evaluate.count_scored(data)
    assert together.bits == pytest.approx(sum(s.bits for s in scores.values()))


def test_some_windows_are_whole_spread_and_repeatable(data):
    windows = list(evaluate.some_windows(data, 16, 320))
    again = list(evaluate.some_windows(data, 16, 320))
    assert {w[0] for w in windows} == set(data.sources)
    assert sum(len(w[2]) for w in windows) == pytest.approx(320, abs=32)
    for (_, inputs, targets, scored, *_), other in zip(windows, again, strict=True):
        assert (inputs[1:] == targets[:-1]).all()
        assert scored.all()
        assert (targets == other[2]).all()


def test_asking_for_more_than_there_is_gives_separate_windows(data):
    windows = [w for w in evaluate.some_windows(data, 16, 10**9) if w[0] == "prose"]
    assert len(windows) == len(data.tokens("prose", "val")) // 16


def test_batches_do_not_change_the_score(data, cfg):
    model, lengths = Transformer(cfg), evaluate.byte_lengths(data.tokenizer())
    one, many = (evaluate.evaluate(model, evaluate.all_windows(data, 16), lengths, batch=b) for b in (1, 7))
    assert evaluate.total(one).bits == pytest.approx(evaluate.total(many).bits, rel=1e-5)


def test_samples_are_the_same_each_time(data, cfg):
    model = Transformer(cfg)
    first = evaluate.draw_samples(model, data.tokenizer(), n_tokens=8)
    assert [s["prompt"] for s in first] == list(evaluate.PROMPTS)
    assert first == evaluate.draw_samples(model, data.tokenizer(), n_tokens=8)


def test_what_has_no_byte_scored_has_no_score(data, cfg):
    """Windows of end-of-text alone, as of empty replies: their bits per byte would be those of nothing."""
    windows = list(evaluate.some_windows(data, 16, 64))
    ends = np.full(16, data.eot_id)
    empty = [evaluate.Window("empty", ends, ends, np.arange(16) == 15)]
    lengths = evaluate.byte_lengths(data.tokenizer())
    for given, expected in ((windows + empty, list(data.sources)), (empty, []), ([], [])):
        scores = evaluate.evaluate(Transformer(cfg), given, lengths, batch=4)
        assert list(scores) == expected


def test_ids_that_the_vocabulary_leaves_unused_may_be_drawn(cfg, monkeypatch):
    drawn = SimpleNamespace(token_ids=[15339, 100256, 100261, 1917])
    monkeypatch.setattr(evaluate.Engine, "generate", lambda _, prompts, __: [drawn for _ in prompts])
    model = Transformer(cfg.with_overrides(["vocab_size=100277", "d_model=32"]))
    texts = [s["text"] for chat in (False, True) for s in evaluate.draw_samples(model, cl100k(), chat=chat)]
    assert set(texts) == {"hello world"}
    assert evaluate.byte_lengths(cl100k())[[100256, 100261, 100257, 15339]].tolist() == [0, 0, 0, 5]
