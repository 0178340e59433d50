"""The engine against the model's own simple `generate`: token for token, whatever the limits."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import Transformer
from moe.serve.engine import Engine
from moe.serve.request import SamplingParams
from tests.conftest import tiny_config

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(tiny_config(), seed=3).double()


@pytest.fixture(scope="module")
def answers(model: Transformer) -> list[tuple[list[int], list[int]]]:
    """Prompts, many of which begin alike, and the tokens that follow each."""
    rng = random.Random(0)
    shared = [rng.randrange(61) for _ in range(16)]
    prompts = [
        shared[: rng.randrange(17)] + [rng.randrange(61) for _ in range(rng.randrange(1, 12))] for _ in range(24)
    ]
    # Text that repeats itself, so that drafts are right now and then.
    prompts += [[5, 6, 7] * 4, [1] * 9]
    return [(p, model.generate(torch.tensor([p]), 12, temperature=0)[0, len(p) :].tolist()) for p in prompts]


@given(
    block_size=st.integers(1, 64),
    spare=st.integers(0, 6),
    budget=st.integers(1, 64),
    max_running=st.integers(1, 8),
    speculative=st.sampled_from([None, "ngram"]),
    num_drafts=st.integers(1, 8),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=12)
def test_greedy_tokens_are_those_of_the_model_alone(
    model: Transformer,
    answers: list[tuple[list[int], list[int]]],
    block_size: int,
    spare: int,
    budget: int,
    max_running: int,
    speculative: str | None,
    num_drafts: int,
    prefix_cache: bool,
    seed: int,
) -> None:
    chosen = random.Random(seed).choices(answers, k=8)
    engine = Engine(
        model, block_size=block_size, num_blocks=-(-40 // block_size) + spare, max_batch_tokens=budget,
        max_running=max_running, speculative=speculative, num_drafts=num_drafts, prefix_cache=prefix_cache,
    )  # fmt: skip
    outputs = engine.generate([p for p, _ in chosen], GREEDY)
    for output, (prompt, want) in zip(outputs, chosen, strict=True):
        assert (output.prompt_token_ids, output.token_ids) == (prompt, want)
    assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks
    engine.scheduler.pool.check()
