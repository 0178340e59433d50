"""A request's logits have the same bits alone, in any batch, in any pieces, from a warm cache, and after preemption."""

import random
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import Transformer
from moe.config import AttentionConfig, ExpertsConfig
from moe.errors import ConfigError
from moe.kernels.cpu import library
from moe.serve.cpu import CpuModel
from moe.serve.engine import Engine
from moe.serve.pages import Pages, Segment
from moe.serve.request import SamplingParams
from moe.serve.runner import Runner
from tests.conftest import tiny_config
from tests.test_model import lively

SIZE, LENGTH = 4, 30


@pytest.fixture(scope="module", params=["odd widths", "wide"])
def model(request: pytest.FixtureRequest) -> Transformer:
    changes = {} if request.param == "odd widths" else {
        "d_model": 160,
        "attention": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16),
        "experts": ExpertsConfig(n_experts=5, top_k=2, d_ff=96),
    }  # fmt: skip
    return lively(tiny_config(**changes), torch.float32)


def text(seed: int, n: int = LENGTH) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(61) for _ in range(n)]


def logits_of(run: Runner, seed: int, *, pieces: bool, others: int, cached: int = 0) -> Tensor:
    """Of every position of one text, [LENGTH, V]: computed in pieces, between other requests, in blocks in disorder.

    `cached`: so many positions are computed by a pass of their own first, whose logits are thrown away.
    """
    rng, tokens = random.Random(seed), text(0)
    free = [*range(run.pages.n_blocks)]
    rng.shuffle(free)
    blocks = [free.pop() for _ in range(-(-LENGTH // SIZE))]
    rows, start = [], 0
    if cached:
        run([Segment(tokens[:cached], 0, blocks)], [0])
        rows.append(None)
        start = cached
    while start < LENGTH:
        n = min(rng.choice([1, 1, 2, 5, 11]) if pieces else LENGTH, LENGTH - start)
        mine = Segment(tokens[start : start + n], start, blocks)
        company = [text(rng.randrange(1, 99), rng.choice([1, 1, 3, 9])) for _ in range(rng.randint(0, others))]
        segments = [Segment(t, 0, [free.pop() for _ in range(-(-len(t) // SIZE))]) for t in company]
        at = rng.randint(0, len(segments))
        segments.insert(at, mine)
        low = sum(len(s.token_ids) for s in segments[:at])
        rows.append(run(segments, range(low, low + n)))
        for s in segments:
            free += s.blocks if s is not mine else []
        start += n
    return torch.cat([r for r in rows if r is not None])


def make(model: Transformer, invariant: bool = True, quantization: str | None = None, kept: str = "auto") -> Runner:
    pages = Pages(model.cfg, 64, SIZE, torch.float32, "cpu", kept)
    return Runner(model, pages, quantization=quantization, batch_invariant=invariant)


@pytest.mark.parametrize(("quantization", "kept"), [(None, "auto"), ("int8", "auto"), (None, "int8")])
def test_bits_do_not_depend_on_the_batch(model: Transformer, quantization: str | None, kept: str) -> None:
    run = make(model, True, quantization, kept)
    alone = logits_of(run, 0, pieces=False, others=0)

    @given(seed=st.integers(0, 10**6), others=st.integers(0, 5), cached=st.sampled_from([0, 1, 16, LENGTH - 1]))
    @settings(max_examples=12)
    def holds(seed: int, others: int, cached: int) -> None:
        got = logits_of(run, seed, pieces=True, others=others, cached=cached)
        assert torch.equal(got, alone[cached:])

    holds()


def test_variant_kernels_are_noticed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that round in another way for odd numbers of tokens, as libraries' often do."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    run = make(model)
    usual = run._cpu
    assert usual is not None
    try:
        other = library.Library(library.compiled(compiler, "native", ("-ffp-contract=off",)))
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no such choice")
    monkeypatch.setattr(library, "_loaded", lambda: other)
    unusual = CpuModel(model, run.pages)

    def by_parity(segments: Sequence[Segment], wanted: Sequence[int], record: bool) -> Any:
        odd = sum(len(s.token_ids) for s in segments) % 2
        return (unusual if odd else usual)(segments, wanted, record)

    monkeypatch.setattr(run, "_cpu", by_parity)
    alone = logits_of(run, 0, pieces=False, others=0)
    assert any(not torch.equal(logits_of(run, seed, pieces=True, others=3), alone) for seed in range(3))


def test_answers_are_the_same_alone_together_preempted_and_warm(model: Transformer) -> None:
    """Log-probabilities, to the last bit, through the engine."""
    params = SamplingParams(temperature=0, max_tokens=10, logprobs=2, prompt_logprobs=0)
    warm = SamplingParams(temperature=0, max_tokens=10, logprobs=2)
    prompts = [text(0, 17), [*text(0, 17)[:16], 3], text(2, 9), text(0, 8), text(4, 20)]

    def engine(num_blocks: int, budget: int = 2048) -> Engine:
        return Engine(model, block_size=SIZE, num_blocks=num_blocks, batch_invariant=True, max_batch_tokens=budget)

    alone = [engine(40).generate([p], params)[0] for p in prompts]
    together = engine(40).generate(prompts, params)
    tight = engine(12, budget=7)
    preempted = tight.generate(prompts, params)
    assert sum(o.preemptions for o in preempted)
    for other in (together, preempted):
        assert [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in other] == [
            (o.token_ids, o.logprobs, o.prompt_logprobs) for o in alone
        ]
    again = engine(40)
    again.generate(prompts, warm)
    cached = again.generate(prompts, warm)
    assert [o.cached_tokens for o in cached] == [(len(p) - 1) // SIZE * SIZE for p in prompts]
    assert [(o.token_ids, o.logprobs) for o in cached] == [(o.token_ids, o.logprobs) for o in alone]


def test_what_cannot_be_is_refused(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(model.cfg, 4, SIZE, torch.float32, "cpu")
    with pytest.raises(ConfigError, match="quantization = 'int3'"):
        Runner(model, pages, quantization="int3")
    with pytest.raises(ConfigError, match=r'quantization = "fp8".*int8'):
        Runner(model, pages, quantization="fp8")
    wide = lively(tiny_config(), torch.float64)
    with pytest.raises(ConfigError, match=r"batch_invariant = True.*float32.*float64"):
        Runner(wide, Pages(wide.cfg, 4, SIZE, torch.float64, "cpu"), batch_invariant=True)
    hook = model.head.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ConfigError, match=r"batch_invariant = True.*plain modules"):
            Runner(model, pages, batch_invariant=True)
    finally:
        hook.remove()
    monkeypatch.setenv(library.SWITCH, "0")
    settings: list[dict[str, Any]] = [{"batch_invariant": True}, {"quantization": "int8"}]
    for setting in settings:
        with pytest.raises(ConfigError, match=rf"{next(iter(setting))} = .*{library.SWITCH} = 0 forbids them"):
            Runner(model, pages, **setting)
