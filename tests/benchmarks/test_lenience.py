"""The study's formula for what lenient acceptance gives, against draws by the verifier."""

from collections import Counter

import pytest
import torch

from benchmarks.studies.lenience import outcome
from moe.serve.request import SamplingParams
from moe.serve.sampling import DRAFT, Guess, Position, draw, uniform, verify
from tests.serve.test_sampling import chi_square


@pytest.mark.parametrize("lenience", [1.0, 0.5, 0.1])
def test_the_formula_is_what_the_verifier_does(lenience: float) -> None:
    generator, n = torch.Generator().manual_seed(0), 10_000
    logits_2V = torch.randn(2, 7, generator=generator, dtype=torch.float64) * 1.5
    p_1V, q_1V = logits_2V.softmax(-1).split(1)
    want_1V = outcome(p_1V, q_1V, lenience)
    assert torch.allclose(want_1V.sum(-1), torch.ones(1, dtype=torch.float64))
    assert torch.allclose(want_1V, p_1V) == (lenience == 1)
    counts, settings = Counter(), SamplingParams()
    for start in range(0, n, 1000):
        guesses = []
        for seed in range(start, start + 1000):
            at = Position(settings, [1], 1, seed)
            drafts = draw(q_1V, [uniform(seed, at.index, DRAFT)]).tolist()
            guesses.append(Guess([at, at._replace(drafts=tuple(drafts))], drafts, q_1V))
        counts.update(tokens[0] for tokens in verify(logits_2V[:1].float().repeat(2000, 1), guesses, lenience))
    assert chi_square(counts, dict(enumerate(want_1V[0].tolist())), n) < 4.5
    if lenience < 1:
        assert chi_square(counts, dict(enumerate(p_1V[0].tolist())), n) > 10
