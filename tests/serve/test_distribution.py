"""Tokens that come out of the whole engine, in batches, with drafts and preemptions: chi-square of pairs."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moe.serve import SamplingParams
from moe.serve.sampling import DRAFT, Position, distributions, draw, uniform
from moe.serve.speculative import Proposal
from tests.serve.scripted import TABLE_NV, V, assert_empty, digest, logits_of, scripted_engine
from tests.serve.test_sampling import chi_square

PROMPT = [4, 8, 15]
SETTINGS = {
    "plain": {"temperature": 0.7},
    "cut": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {8: 3.0}},
}


class Another:
    """Draws drafts from another table, by the request's own settings."""

    def propose(self, requests: Sequence[Any], counts: Sequence[int]) -> list[Proposal]:
        return [self.one(r, n) for r, n in zip(requests, counts, strict=True)]

    def one(self, r: Any, n: int) -> Proposal:
        drafts, rows = [], []
        for _ in range(n):
            at = Position(r.params, r.tokens, r.prompt_length, r.extra.seed, (), tuple(drafts))
            logits_V = TABLE_NV[digest([*r.tokens, *drafts]) % 499]
            rows.append(distributions((logits_V + logits_V.roll(1))[None], [at]))
            drafts += draw(rows[-1], [uniform(r.extra.seed, at.index, DRAFT)]).tolist()
        return Proposal(drafts, torch.cat(rows) if rows else None)

    def behind(self, request: Any) -> int:
        return 0

    def forget(self, request: Any) -> None: ...


def exact(settings: dict) -> dict[tuple[int, int], float]:
    """Of the first two tokens: the processors are tested one by one in test_sampling.py."""
    p = SamplingParams(**settings)
    one = distributions(logits_of(PROMPT)[None], [Position(p, PROMPT, 3, 0)])[0].double()
    found = {}
    for a in range(V):
        two = distributions(logits_of([*PROMPT, a])[None], [Position(p, [*PROMPT, a], 3, 0)])[0].double()
        found |= {(a, b): float(one[a] * two[b]) for b in range(V)}
    return found


def check(settings: dict, speculative: Any, n: int) -> None:
    engine = scripted_engine(num_blocks=60, max_running=24, speculative=speculative, num_drafts=3)
    every = [SamplingParams(max_tokens=3, seed=i, **settings) for i in range(n)]
    outputs = engine.generate([PROMPT] * n, every)
    counts = Counter(tuple(o.token_ids[:2]) for o in outputs)
    assert abs(chi_square(counts, exact(settings), n)) < 5
    assert_empty(engine)
    if speculative is not None:
        assert 0 < engine.stats.accepted < engine.stats.drafted


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("speculative", [None, Another()], ids=["alone", "drafts"])
def test_pairs_are_distributed_as_the_settings_say(settings: dict, speculative: Any) -> None:
    check(settings, speculative, 500)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("speculative", [None, Another()], ids=["alone", "drafts"])
def test_a_hundred_thousand_pairs_are_distributed_as_the_settings_say(settings: dict, speculative: Any) -> None:
    check(settings, speculative, 100_000)
