"""Greedy answers of the engine against those of transformers, one request after the other: token for token."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import Transformer, hf
from moe.serve import Engine, SamplingParams
from tests.hf_models import build
from tests.serve.scripted import assert_empty, check_blocks

NEW, LONGEST = 12, 30


@dataclass
class Subject:
    """A model of one key/value head, others to draft for it, and requests with their answers."""

    model: Transformer
    drafts: dict[str, Any]
    requests: list[tuple[list[int], list[int]]]


def subject(n: int, directory: Any) -> Subject:
    peer = build("Mixtral", num_key_value_heads=1).eval()
    peer.save_pretrained(directory)
    model = hf.load(directory)
    rng = random.Random(0)
    shared = [rng.randrange(97) for _ in range(16)]
    prompts = [
        shared[: rng.randrange(17)] + [rng.randrange(97) for _ in range(rng.randrange(1, LONGEST - 15))]
        for _ in range(n)
    ]
    prompts[::8] = [[5, 6, 7] * 4, [1] * 9, *prompts[::8]][: len(prompts[::8])]  # guesses of these are right at times
    requests = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None
            )
        requests.append((prompt, out[0, len(prompt) :].tolist()))
    nearly = hf.load(directory)
    with torch.no_grad():
        for p in nearly.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return Subject(model, {"none": None, "ngram": "ngram", "near": nearly, "itself": model}, requests)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(24, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(200, tmp_path_factory.mktemp("mixtral"))


LIMITS = st.fixed_dictionaries({
    "block_size": st.integers(1, 64),
    "spare": st.integers(0, 12),
    "max_batch_tokens": st.integers(1, 100),
    "max_running": st.integers(1, 16),
    "speculative": st.sampled_from(["none", "ngram", "near", "itself"]),
    "num_drafts": st.integers(1, 8),
    "adaptive": st.booleans(),
    "prefix_cache": st.booleans(),
    "warm": st.booleans(),
})  # fmt: skip


def check(subject: Subject, limits: dict[str, Any], requests: list[tuple[list[int], list[int]]]) -> Engine:
    limits = dict(limits)
    warm, spare = limits.pop("warm"), limits.pop("spare")
    limits["speculative"] = subject.drafts[limits["speculative"]]
    engine = Engine(subject.model, num_blocks=-(-(LONGEST + NEW) // limits["block_size"]) + spare, **limits)
    engine.listeners.append(lambda step: check_blocks(engine, step))
    params = SamplingParams(temperature=0, max_tokens=NEW)
    for _ in range(2 if warm else 1):
        outputs = engine.generate([prompt for prompt, _ in requests], params)
        for output, (prompt, answer) in zip(outputs, requests, strict=True):
            assert (output.prompt_token_ids, output.token_ids) == (prompt, answer)
        assert_empty(engine)
    return engine


@given(limits=LIMITS, seed=st.integers(0, 999))
@settings(max_examples=10)
def test_answers_are_those_of_transformers_whatever_the_limits(few: Subject, limits: dict[str, Any], seed: int) -> None:
    check(few, limits, random.Random(seed).sample(few.requests, 10))


@pytest.mark.parametrize("speculative", ["none", "itself"])
def test_answers_are_those_of_transformers_through_dozens_of_preemptions(few: Subject, speculative: str) -> None:
    limits = {
        "block_size": 3, "spare": 1, "max_batch_tokens": 40, "max_running": 12, "speculative": speculative,
        "num_drafts": 3, "adaptive": False, "prefix_cache": True, "warm": False,
    }  # fmt: skip
    engine = check(few, limits, few.requests * 3)
    assert engine.stats.preemptions >= 24
    if speculative == "itself":
        assert engine.stats.accepted > 0.9 * engine.stats.drafted


@pytest.mark.slow
@given(limits=LIMITS)
@settings(max_examples=20)
def test_two_hundred_answers_are_those_of_transformers(many: Subject, limits: dict[str, Any]) -> None:
    check(many, limits, many.requests)
