"""Traces of an engine: every position of every request once, with what the model itself chooses for it."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import Transformer, profile
from moe.profile import Trace
from moe.profile.observe import Pass, observe
from moe.profile.trace import RecordedPass
from moe.serve.engine import Engine
from moe.serve.request import SamplingParams
from moe.serve.trace import record
from tests.conftest import rel, tiny_config

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(tiny_config(), seed=3).double()


def prompts(seed: int, n: int = 8) -> list[list[int]]:
    """Some begin alike, some repeat themselves, so that drafts are right now and then."""
    rng = random.Random(seed)
    shared = [rng.randrange(61) for _ in range(12)]
    found = [shared[: rng.randrange(13)] + [rng.randrange(61) for _ in range(rng.randrange(1, 9))] for _ in range(n)]
    return [*found, [5, 6, 7] * 4, shared]


def routed(model: Transformer, tokens: list[int]) -> Pass:
    """What the model's own modules choose for a text."""
    seen: list[Pass] = []
    with torch.no_grad(), observe(model, seen.append):
        model(torch.tensor([tokens]))
    return seen[0]


def check(model: Transformer, p: RecordedPass, tokens: list[int]) -> None:
    want = routed(model, tokens)
    assert p.tokens_T is not None
    assert p.weights_TLK is not None
    assert p.tokens_T.tolist() == tokens
    assert p.shape == (1, len(tokens))
    assert torch.equal(p.ids_TLK, want.ids_LTK.transpose(0, 1))
    assert rel(p.weights_TLK, want.weights_LTK.transpose(0, 1)) < 1e-10


@given(
    block_size=st.integers(1, 16),
    spare=st.integers(0, 4),
    budget=st.integers(2, 40),
    speculative=st.sampled_from([None, "ngram"]),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_a_trace_is_what_the_model_chooses_for_prompt_and_answer(
    model: Transformer,
    tmp_path_factory: pytest.TempPathFactory,
    block_size: int,
    spare: int,
    budget: int,
    speculative: str | None,
    prefix_cache: bool,
    seed: int,
) -> None:
    """With small pools, where requests are preempted, drafts that are refused, and prefixes from the cache."""
    engine = Engine(
        model, block_size=block_size, num_blocks=-(-40 // block_size) + spare, max_batch_tokens=budget,
        speculative=speculative, adaptive=False, prefix_cache=prefix_cache, max_running=6,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("trace") / "trace"
    with record(engine, place) as recorder:
        outputs = engine.generate(prompts(seed), GREEDY)
    assert recorder.missing == 0
    assert engine.listeners == []
    assert not engine.runner.record
    trace = Trace.open(place)
    # The last token of an answer is not computed.
    texts = sorted([*o.prompt_token_ids, *o.token_ids[:-1]] for o in outputs)
    passes = sorted(trace, key=lambda p: [] if p.tokens_T is None else p.tokens_T.tolist())
    assert len(passes) == len(texts)
    for p, text in zip(passes, texts, strict=True):
        check(model, p, text)


def test_preemptions_refused_drafts_and_cached_prefixes_are_among_them(model: Transformer, tmp_path: Path) -> None:
    """What the test above means to draw does occur."""
    engine = Engine(
        model, block_size=4, num_blocks=12, max_batch_tokens=30, speculative="ngram", adaptive=False, max_running=6
    )
    with record(engine, tmp_path / "trace"):
        outputs = engine.generate(prompts(1), GREEDY)
    assert engine.stats.preemptions > 0
    assert 0 < engine.stats.accepted < engine.stats.drafted
    assert any(o.cached_tokens for o in outputs)


def test_what_was_cached_before_is_missing_and_counted(model: Transformer, tmp_path: Path) -> None:
    engine, prompt = Engine(model, block_size=4), list(range(1, 15))
    engine.generate(prompt, GREEDY)
    with record(engine, tmp_path / "trace") as recorder:
        (output,) = engine.generate(prompt, GREEDY)
    assert recorder.missing == output.cached_tokens == 12
    trace = Trace.open(tmp_path / "trace")
    (p,) = trace
    assert trace.missing == 12
    assert p.tokens_T is not None
    text = [*prompt, *output.token_ids[:-1]]
    assert p.tokens_T.tolist() == text[12:]
    assert torch.equal(p.ids_TLK, routed(model, text).ids_LTK.transpose(0, 1)[12:])


def test_an_answer_that_was_cut_short_is_recorded_as_far_as_it_came(model: Transformer, tmp_path: Path) -> None:
    engine = Engine(model)
    with record(engine, tmp_path / "trace"):
        name = engine.add([1, 2, 3], GREEDY)
        new = [token for _ in range(4) for delta in engine.step() for token in delta.token_ids]
        engine.abort(name)
    (p,) = Trace.open(tmp_path / "trace")
    check(model, p, [1, 2, 3, *new[:-1]])


def test_a_recorded_answer_can_be_replayed(model: Transformer, tmp_path: Path) -> None:
    """In a forward pass of the whole text, as training makes one."""
    engine = Engine(model)
    with record(engine, tmp_path / "trace"):
        (output,) = engine.generate([3, 1, 4, 1, 5], GREEDY)
    text, seen = [*output.prompt_token_ids, *output.token_ids[:-1]], []
    trace = Trace.open(tmp_path / "trace")
    with torch.no_grad(), profile.replay(model, trace), observe(model, seen.append):
        model(torch.tensor([text]))
    assert torch.equal(seen[0].ids_LTK, next(iter(trace)).ids_TLK.transpose(0, 1))
