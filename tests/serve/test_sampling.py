"""The processors one by one, and that speculation changes no probability: chi-square against exact distributions."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from moe.serve.request import SamplingParams
from moe.serve.sampling import DRAFT, Guess, Position, distributions, draw, uniform, verify

V, DRAWS = 7, 100_000
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "all cuts": {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    "logit_bias": {"logit_bias": {2: 1.5, 5: -2.0}},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "min_tokens": {"min_tokens": 9},
}


def exact(
    logits: list[float], p: SamplingParams, prompt: Sequence[int], answer: Sequence[int], ends=(0,)
) -> list[float]:
    """The distribution, in plain Python from the settings' descriptions."""
    z = [x + p.logit_bias.get(i, 0.0) for i, x in enumerate(logits)]
    if len(answer) < p.min_tokens:
        z = [-math.inf if i in ends else x for i, x in enumerate(z)]
    for i in {*prompt, *answer}:
        z[i] = z[i] / p.repetition_penalty if z[i] > 0 else z[i] * p.repetition_penalty
    for i, times in Counter(answer).items():
        z[i] -= p.presence_penalty + p.frequency_penalty * times
    if p.temperature == 0:
        return [float(i == z.index(max(z))) for i in range(len(z))]
    w = [math.exp(x / p.temperature) for x in z]
    w = [x if x >= p.min_p * max(w) else 0.0 for x in w]
    order = sorted(range(len(w)), key=lambda i: (-w[i], i))
    for place, i in enumerate(order):
        if p.top_k and place >= p.top_k:
            w[i] = 0.0
    total, before = sum(w), 0.0
    for i in order:
        share = w[i]
        if p.top_p < 1 and before >= p.top_p * total:
            w[i] = 0.0
        before += share
    return [x / sum(w) for x in w]


def logits_of(history: tuple[int, ...]) -> list[float]:
    """A model: logits from all tokens before."""
    rng = random.Random(str(history))
    return [rng.gauss(0, 1.2) for _ in range(V)]


def chi_square(counts: Counter, expected: dict, n: int) -> float:
    """In standard deviations above its mean; nothing may come that cannot."""
    assert not set(counts) - {k for k, p in expected.items() if p > 0}
    cells = {k: p for k, p in expected.items() if p * n >= 5}
    rest = 1 - sum(cells.values())
    value = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in cells.items())
    if rest * n >= 5:
        value += (n - sum(counts[k] for k in cells) - n * rest) ** 2 / (n * rest)
    else:
        rest = 0
    freedom = max(1, len(cells) - (rest == 0))
    return (value - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"temperature": 0}], ids=[*SETTINGS, "greedy"])
def test_each_setting_is_what_it_says(settings: dict) -> None:
    prompt, answer = (3, 1), (4, 4, 2)
    p = SamplingParams(**{"max_tokens": 20, **settings})
    plain = SamplingParams()
    logits = [logits_of((i,)) for i in range(3)]
    at = Position(p, [*prompt, *answer], len(prompt), 0, ends=(0,))
    others = [Position(plain, [1], 1, 0), at, Position(plain, [2, 2], 1, 0)]  # in a batch of other settings
    given = torch.tensor(logits)
    got = distributions(given, others)
    assert given.equal(torch.tensor(logits))
    want = [exact(logits[0], plain, (1,), ()), exact(logits[1], p, prompt, answer), exact(logits[2], plain, (2,), (2,))]
    assert torch.allclose(got.double(), torch.tensor(want, dtype=torch.float64), atol=1e-6)
    # The same with a part of the answer still to be verified.
    at = Position(p, [*prompt, 4], len(prompt), 0, (0,), drafts=(4, 2))
    assert torch.allclose(distributions(given[1:2], [at]), got[1:2], atol=1e-7)


def test_ties_go_to_the_lower_id_and_the_cuts_never_leave_nothing() -> None:
    p = distributions(torch.zeros(1, V), [Position(SamplingParams(top_k=2), [], 0, 0)])
    assert p.tolist() == [[0.5, 0.5, 0, 0, 0, 0, 0]]
    p = distributions(torch.zeros(1, V), [Position(SamplingParams(top_p=1e-9, min_p=1.0), [], 0, 0)])
    assert p.tolist() == [[1, 0, 0, 0, 0, 0, 0]]
    p = distributions(torch.tensor([[0.0, 200.0, 100.0]]), [Position(SamplingParams(temperature=1e-30), [], 0, 0)])
    assert p.tolist() == [[0, 1, 0]]


def test_a_number_depends_on_the_row_alone_and_never_draws_what_has_no_probability() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    for u, want in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 2**-53, 3)):
        assert draw(p, [u, u]).tolist() == [want, 0]
        assert draw(p[:1], [u]).tolist() == [want]
    values = [uniform(s, i, 0) for s in range(20) for i in range(500)]
    assert abs(sum(values) / len(values) - 0.5) < 0.01
    assert len(set(values)) == len(values)
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)


def speculate(p: SamplingParams, seed: int, kind: str, n_drafts: int) -> Guess:
    """Drafts from another model than the one that verifies, or without chance."""
    prompt, drafts, rows = (3, 1), [], []
    positions = [Position(p, prompt, 2, seed, (0,))]
    for i in range(n_drafts):
        if kind == "named":
            drafts.append((2 + i) % V)
        else:
            logits = torch.tensor([logits_of(("draft", *prompt, *drafts))])  # type: ignore[arg-type]
            rows.append(distributions(logits, positions[-1:]))
            drafts += draw(rows[-1], [uniform(seed, positions[-1].index, DRAFT)]).tolist()
        positions.append(positions[0]._replace(drafts=tuple(drafts)))
    return Guess(positions, drafts, torch.cat(rows) if rows else None)


def first_two(
    p: SamplingParams, kind: str, n: int, verifier: Callable[..., list[list[int]]]
) -> tuple[Counter, Counter]:
    """Counts of first tokens, and of pairs (the second drawn plainly where the first pass gave one token)."""
    firsts, pairs, batch = Counter(), Counter(), 2000
    memo: dict[tuple[int, ...], list[float]] = {}
    for start in range(0, n, batch):
        guesses = [speculate(p, start + i, kind, 2) for i in range(batch)]
        logits = [memo.setdefault(h, logits_of(h)) for g in guesses for h in ((3, 1, *at.drafts) for at in g.positions)]
        found = verifier(torch.tensor(logits), guesses)
        short = [i for i, tokens in enumerate(found) if len(tokens) == 1]
        rows = [Position(p, (3, 1, *found[i]), 2, start + i, (0,)) for i in short]
        if rows:
            logits = [memo.setdefault(tuple(at.tokens), logits_of(tuple(at.tokens))) for at in rows]
            plain = verify(torch.tensor(logits), [Guess([at], (), None) for at in rows])
            for i, token in zip(short, plain, strict=True):
                found[i] += token
        firsts.update(tokens[0] for tokens in found)
        pairs.update(tuple(tokens[:2]) for tokens in found)
    return firsts, pairs


def expected(p: SamplingParams) -> tuple[dict, dict]:
    one = dict(enumerate(exact(logits_of((3, 1)), p, (3, 1), ())))
    two = {(a, b): one[a] * q for a in one for b, q in enumerate(exact(logits_of((3, 1, a)), p, (3, 1), (a,)))}
    return one, two


@pytest.mark.parametrize("kind", ["drawn", "named"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_distributed_as_without_drafts(settings: dict, kind: str) -> None:
    p = SamplingParams(**{"max_tokens": 20, **settings})
    counts = first_two(p, kind, DRAWS // 25, verify)
    for found, want in zip(counts, expected(p), strict=True):
        assert abs(chi_square(found, want, DRAWS // 25)) < 5


def test_a_verifier_that_is_wrong_is_found_out() -> None:
    def without_the_residual(logits: Tensor, guesses: Sequence[Guess]) -> list[list[int]]:
        """After a refusal it draws from p, a common mistake."""
        tokens = verify(logits, guesses)
        rows = distributions(logits, [at for g in guesses for at in g.positions]).split([3] * len(guesses))
        return [
            t
            if len(t) == 3
            else [*t[:-1], *draw(p[len(t) - 1 : len(t)], [uniform(g.positions[0].seed, 99, 7)]).tolist()]
            for t, p, g in zip(tokens, rows, guesses, strict=True)
        ]

    p = SamplingParams()
    counts = first_two(p, "drawn", 10_000, without_the_residual)
    assert chi_square(counts[0], expected(p)[0], 10_000) > 20
    lenient = first_two(p, "drawn", 10_000, lambda x, g: verify(x, g, lenience=0.5))
    assert chi_square(lenient[0], expected(p)[0], 10_000) > 20


def test_a_draft_that_is_the_model_itself_is_always_accepted() -> None:
    p = SamplingParams()
    for seed in range(200):
        positions, drafts, rows = [Position(p, (3, 1), 2, seed)], [], []
        for _ in range(3):
            rows.append(distributions(torch.tensor([logits_of((3, 1, *drafts))]), positions[-1:]))
            drafts += draw(rows[-1], [uniform(seed, positions[-1].index, DRAFT)]).tolist()
            positions.append(positions[0]._replace(drafts=tuple(drafts)))
        logits = torch.tensor([logits_of((3, 1, *at.drafts)) for at in positions])
        (found,) = verify(logits, [Guess(positions, drafts, torch.cat(rows))])
        assert found[:-1] == drafts


def test_greedy_requests_get_the_greedy_tokens_whatever_the_drafts() -> None:
    p = SamplingParams(temperature=0)
    best, history = [], (3, 1)
    for _ in range(4):
        best.append(max(range(V), key=lambda i: logits_of((*history, *best))[i]))
    for right in range(4):
        drafts = [*best[:right], *((t + 1) % V for t in best[right:3])]
        positions = [Position(p, history, 2, 0, drafts=tuple(drafts[:i])) for i in range(4)]
        logits = torch.tensor([logits_of((*history, *at.drafts)) for at in positions])
        assert verify(logits, [Guess(positions, drafts, None)]) == [best[: right + 1]]
