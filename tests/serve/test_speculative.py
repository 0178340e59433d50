"""Guesses by the request's own text and by a draft model: they change no token, and are as good as they can be."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import Transformer
from moe.errors import ConfigError
from moe.serve.draft import DraftModel
from moe.serve.engine import Engine
from moe.serve.pages import Segment
from moe.serve.request import Request, SamplingParams
from moe.serve.speculative import NGram, Proposal
from tests.conftest import tiny_config
from tests.serve.test_sampling import SETTINGS, chi_square, exact

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(tiny_config(), seed=3).double()


@pytest.fixture(scope="module")
def drafts(model: Transformer) -> dict[str, Transformer]:
    """Bad, better, perfect."""
    near = Transformer(tiny_config(), seed=3).double()
    with torch.no_grad():
        for name, p in near.named_parameters():
            p += 0.03 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return {"far": Transformer(tiny_config(n_layers=1), seed=9).double(), "near": near, "same": model}


@pytest.fixture(scope="module")
def answers(model: Transformer) -> list[tuple[list[int], list[int]]]:
    """Prompts, many of which begin alike, and the tokens that follow each."""
    rng = random.Random(0)
    shared = [rng.randrange(61) for _ in range(16)]
    prompts = [
        shared[: rng.randrange(17)] + [rng.randrange(61) for _ in range(rng.randrange(1, 12))] for _ in range(24)
    ]
    return [(p, model.generate(torch.tensor([p]), 12, temperature=0)[0, len(p) :].tolist()) for p in prompts]


# ------------------------------------------------------------------------------------------------------ prompt lookup


def looked_up(text: list[int], n: int) -> list[int]:
    """By the description: the longest end of up to three tokens, where it stood last; repeated to its end and on."""
    for size in (3, 2, 1):
        places = [i for i in range(size, len(text)) if text[i - size : i] == text[len(text) - size :]]
        if places and size < len(text):
            found = list(text)
            for _ in range(n):
                found.append(found[len(found) - len(text) + places[-1]])
            return found[len(text) :]
    return []


def request(tokens: Sequence[int]) -> Request:
    return Request("r", len(tokens), [*tokens], SamplingParams(), 1000)


@given(text=st.lists(st.integers(0, 5), min_size=1, max_size=30), more=st.lists(st.integers(0, 5), max_size=10))
def test_prompt_lookup_finds_where_the_end_stood_last(text: list[int], more: list[int]) -> None:
    proposer, r = NGram(), request(text)
    for token in [*more, None]:
        assert proposer.propose([r], [4]) == [Proposal(looked_up(r.tokens, 4))]
        if token is not None:
            r.tokens.append(token)
    assert proposer.propose([r], [0]) == [Proposal([])]
    proposer.forget(r)


# ------------------------------------------------------------------------------------------------------- draft models


@given(
    kind=st.sampled_from(["far", "near", "same"]),
    num_drafts=st.integers(1, 8),
    block_size=st.integers(1, 24),
    spare=st.integers(0, 8),
    budget=st.integers(1, 64),
    max_running=st.integers(1, 8),
    prefix_cache=st.booleans(),
    adaptive=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=8)
def test_greedy_tokens_are_those_of_the_model_alone(
    model: Transformer,
    drafts: dict[str, Transformer],
    answers: list[tuple[list[int], list[int]]],
    kind: str,
    num_drafts: int,
    block_size: int,
    spare: int,
    budget: int,
    max_running: int,
    prefix_cache: bool,
    adaptive: bool,
    seed: int,
) -> None:
    chosen = random.Random(seed).choices(answers, k=8)
    engine = Engine(
        model, block_size=block_size, num_blocks=-(-40 // block_size) + spare, max_batch_tokens=budget,
        max_running=max_running, prefix_cache=prefix_cache, speculative=drafts[kind], num_drafts=num_drafts,
        adaptive=adaptive,
    )  # fmt: skip
    for _ in range(2):  # the second time from a warm cache
        outputs = engine.generate([p for p, _ in chosen], GREEDY)
        assert [o.token_ids for o in outputs] == [want for _, want in chosen]
        if kind == "same":
            assert engine.stats.accepted == engine.stats.drafted
    assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks
    engine.scheduler.pool.check()


def test_a_draft_model_that_is_the_model_is_never_refused(model: Transformer) -> None:
    """So its keys and values are those of the right tokens, and q is what was drawn from: after preemptions, aborted
    neighbours, from shared blocks that it computed or did not, with all kinds of settings in one batch."""
    kinds: list[dict] = [{"temperature": 0}, *SETTINGS.values()]
    drafted = preemptions = 0
    for seed in range(6):
        rng = random.Random(seed)
        block_size = rng.randrange(1, 10)
        engine = Engine(
            model, block_size=block_size, num_blocks=-(-40 // block_size) + rng.randrange(20), speculative=model,
            max_batch_tokens=rng.randrange(1, 40), prefix_cache=seed % 3 > 0, num_drafts=rng.randrange(1, 9),
            adaptive=False,
        )  # fmt: skip
        proposer, shared = engine.proposer, [rng.randrange(61) for _ in range(20)]
        assert proposer is not None
        propose = proposer.propose
        for _ in range(16):
            prompt = shared[: rng.randrange(21)] + [rng.randrange(61) for _ in range(rng.randrange(1, 8))]
            engine.add(prompt, SamplingParams(**{"max_tokens": rng.randrange(10, 13), **rng.choice(kinds)}, seed=seed))
        while not engine.idle:
            # As where a controller sees no use in it.
            proposer.propose = no_drafts if rng.random() < 0.3 else propose  # type: ignore[method-assign]
            if rng.random() < 0.1:
                engine.abort(f"request-{rng.randrange(16)}")
            engine.step()
            engine.scheduler.pool.check()
        assert engine.stats.accepted == engine.stats.drafted
        assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks
        drafted, preemptions = drafted + engine.stats.drafted, preemptions + engine.stats.preemptions
    assert drafted > 200
    assert preemptions > 10


def no_drafts(requests: Sequence[Request], _: Sequence[int]) -> list[Proposal]:
    return [Proposal([]) for _ in requests]


def test_a_prefix_that_the_draft_model_has_computed_is_not_computed_again(model: Transformer) -> None:
    engine = Engine(model, block_size=4, speculative=model, adaptive=False)
    proposer = engine.proposer
    assert isinstance(proposer, DraftModel)
    passes: list[list[Segment]] = []
    runner = proposer.runner
    proposer.runner = lambda segments, wanted: passes.append([*segments]) or runner(segments, wanted)  # type: ignore[assignment]
    prompt = [*range(20)]
    engine.generate(prompt, replace(GREEDY, max_tokens=6))
    assert (passes[0][0].start, passes[0][0].end) == (0, 21)
    passes.clear()
    engine.generate([*prompt, 30], replace(GREEDY, max_tokens=6))
    assert (passes[0][0].start, passes[0][0].end) == (20, 22)


@pytest.mark.parametrize("kind", ["near", "ngram"])
def test_logprobs_are_those_of_an_uncached_pass(model: Transformer, drafts: dict[str, Transformer], kind: str) -> None:
    engine = Engine(model, speculative=drafts.get(kind, "ngram"), adaptive=False)
    p = SamplingParams(max_tokens=12, seed=5, temperature=0.7 if kind == "near" else 0, logprobs=2)
    for output in engine.generate([[5, 6, 7] * 4, [1] * 9], p):
        text = torch.tensor([output.prompt_token_ids + output.token_ids])
        want = model(text).logits_BSV[0].log_softmax(-1)
        assert output.logprobs is not None
        for i, (token, row_given) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            row = want[len(output.prompt_token_ids) + i - 1]
            assert {*row_given} == {token, *row.topk(2).indices.tolist()}
            assert all(row_given[t].logprob == pytest.approx(row[t].item(), abs=1e-5) for t in row_given)
    assert engine.stats.accepted > 0


def test_a_draft_model_has_to_fit() -> None:
    model = Transformer(tiny_config())
    for changes, words in (({"vocab_size": 60}, "vocab_size = 60"), ({"max_seq_len": 39}, "max_seq_len = 39")):
        with pytest.raises(ConfigError, match=words):
            Engine(model, speculative=Transformer(tiny_config(**changes)))
    Engine(model, speculative=Transformer(tiny_config(max_seq_len=41)))
    with torch.device("meta"):
        elsewhere = Transformer(tiny_config())
    with pytest.raises(ConfigError, match="is on meta"):
        Engine(model, speculative=elsewhere)
    wrong: list[dict[str, Any]] = [{"speculative": "eagle"}, {"num_drafts": 0}, {"lenience": 0.0}, {"lenience": 1.1}]
    for bad in wrong:
        with pytest.raises(ConfigError, match=f"{next(iter(bad))} = "):
            Engine(model, **bad)


def test_a_draft_model_that_is_broken_or_short_of_memory_changes_nothing(
    model: Transformer, answers: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Transformer(tiny_config(n_layers=1)).double()
    with torch.no_grad():
        broken.head.weight.fill_(torch.nan)
    prompts, want = [p for p, _ in answers[:4]], [w for _, w in answers[:4]]
    engine = Engine(model, speculative=broken, adaptive=False)
    assert [o.token_ids for o in engine.generate(prompts, GREEDY)] == want
    assert all(len(o.token_ids) == 5 for o in engine.generate(prompts, SamplingParams(max_tokens=5)))
    engine = Engine(model, speculative=model, adaptive=False)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(engine.proposer, "_run", out_of_memory)
    assert [o.token_ids for o in engine.generate(prompts, GREEDY)] == want
    assert engine.stats.drafted == 0
    assert engine.stats.out_of_memory > 0


# ------------------------------------------------------------------------------------------------------ distribution

V, PROMPT = 5, [3, 1, 4]
SMALL = tiny_config(vocab_size=V, max_seq_len=12)


@pytest.fixture(scope="module")
def pair() -> tuple[Transformer, Transformer]:
    """A target and a draft model with their own opinions, sharp enough to see a difference."""
    models = Transformer(SMALL, seed=1).double(), Transformer(replace(SMALL, n_layers=1), seed=2).double()
    with torch.no_grad():
        for one in models:
            one.head.weight *= 4
    return models


def triples(model: Transformer, p: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probabilities of the first three tokens, from uncached passes and the settings' descriptions."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for answer, probability in found.items():
            logits = model(torch.tensor([[*PROMPT, *answer]])).logits_BSV[0, -1].tolist()
            for token, share in enumerate(exact(logits, p, PROMPT, answer)):
                grown[*answer, token] = probability * share
        found = grown
    return found


def drawn(engine: Engine, p: SamplingParams, n: int) -> Counter:
    counts: Counter = Counter()
    for start in range(0, n, 1000):
        settings = [
            replace(p, max_tokens=4, min_tokens=min(p.min_tokens, 4), seed=start + i)
            for i in range(min(1000, n - start))
        ]
        outputs = engine.generate([PROMPT] * len(settings), settings)
        counts.update(tuple(o.token_ids[:3]) for o in outputs)
    assert engine.proposer is None or 0 < engine.stats.accepted < engine.stats.drafted
    return counts


def off(counts: Counter, want: dict[tuple[int, ...], float], n: int) -> float:
    """The largest of the chi-squares of the first token, of the pairs in it, and of all three."""
    worst = 0.0
    for places in ((0,), (0, 1), (1, 2), (0, 1, 2)):
        seen, expected = Counter(), Counter()
        for found, table in ((seen, counts), (expected, want)):
            for key, value in table.items():
                found[tuple(key[i] for i in places if i < len(key))] += value  # type: ignore[assignment]
        worst = max(worst, chi_square(seen, dict(expected), n))
    return worst


MIXED = {
    "temperature": 1.2,
    "top_k": 4,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.3,
    "logit_bias": {2: 0.7},
}


@pytest.mark.parametrize("speculative", ["draft", "ngram"])
def test_two_models_give_the_tokens_of_the_first_with_their_probabilities(
    pair: tuple[Transformer, Transformer], speculative: str
) -> None:
    target, draft = pair
    p, n = SamplingParams(**MIXED), 3000
    engine = Engine(target, max_running=256, speculative=draft if speculative == "draft" else "ngram", adaptive=False)
    assert off(drawn(engine, p, n), triples(target, p), n) < 4.5


def test_a_draft_that_was_not_drawn_from_its_q_is_noticed(pair: tuple[Transformer, Transformer]) -> None:
    target, draft = pair
    engine = Engine(target, max_running=256, speculative=draft, adaptive=False)
    proposer, n = engine.proposer, 3000
    assert proposer is not None
    propose = proposer.propose

    def sharper(requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        """As where q is taken before the temperature."""
        found = propose(requests, counts)
        return [Proposal(d, q if q is None else (q**4 / (q**4).sum(-1, keepdim=True))) for d, q in found]

    proposer.propose = sharper  # type: ignore[method-assign]
    p = SamplingParams(temperature=1.2)
    assert off(drawn(engine, p, n), triples(target, p), n) > 10


@pytest.mark.slow
@pytest.mark.parametrize("speculative", ["draft", "ngram", None])
@pytest.mark.parametrize("changes", [*SETTINGS.values(), MIXED], ids=[*SETTINGS, "mixed"])
def test_every_setting_keeps_its_probabilities(
    pair: tuple[Transformer, Transformer], changes: dict, speculative: str | None
) -> None:
    target, draft = pair
    p, n = SamplingParams(**{"max_tokens": 9, **changes, "stop_token_ids": [0]}), 100_000
    engine = Engine(
        target, max_running=256, speculative=draft if speculative == "draft" else speculative, adaptive=False
    )
    want = triples(target, p)
    for key in [key for key in want if 0 in key[:-1]]:  # the text has ended there
        ended = key[: key.index(0) + 1]
        want[ended] = want.get(ended, 0.0) + want.pop(key)
    assert off(drawn(engine, p, n), want, n) < 4.5
