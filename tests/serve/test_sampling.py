"""The processors one by one, and that speculation changes no probability: chi-square against exact distributions."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.serve import sampling
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
    "logit_bias": {"logit_bias": {2: 1.5, 4: -2.0}},
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
    assert torch.allclose(got.double(), torch.tensor(want, dtype=torch.float64), atol=1e-7)
    # The same with a part of the answer still to be verified.
    at = Position(p, [*prompt, 4], len(prompt), 0, (0,), drafts=(4, 2))
    assert torch.equal(distributions(given[1:2], [at]), got[1:2])


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


PROMPT = (3, 1)
Verifier = Callable[[Tensor, Sequence[Guess]], list[list[int]]]


class Drafter:
    """Two drafts a request: drawn from another model by the same processors, or named without chance."""

    def __init__(self, p: SamplingParams, kind: str) -> None:
        self.p, self.kind = p, kind
        histories = [(), *((i,) for i in range(V))]
        logits = torch.tensor([logits_of(("draft", *PROMPT, *h)) for h in histories])  # type: ignore[arg-type]
        self.q = dict(zip(histories, distributions(logits, [self.position(0, h) for h in histories]), strict=True))

    def position(self, seed: int, drafts: Sequence[int] = ()) -> Position:
        return Position(self.p, PROMPT, 2, seed, (0,), tuple(drafts))

    def guesses(self, seeds: Sequence[int]) -> list[Guess]:
        drafts: list[tuple[int, ...]] = [()] * len(seeds)
        for i in range(2):
            if self.kind == "named":
                drafts = [(*d, (2 + i) % V) for d in drafts]
            else:
                q = torch.stack([self.q[d] for d in drafts])
                tokens = draw(q, [uniform(seed, 2 + i, DRAFT) for seed in seeds]).tolist()
                drafts = [(*d, t) for d, t in zip(drafts, tokens, strict=True)]
        return [
            Guess(
                [self.position(seed, d[:i]) for i in range(3)],
                d,
                None if self.kind == "named" else torch.stack([self.q[()], self.q[d[:1]]]),
            )
            for seed, d in zip(seeds, drafts, strict=True)
        ]


def rows_of(positions: Sequence[Position], memo: dict[tuple[int, ...], list[float]]) -> Tensor:
    histories = [(*at.tokens, *at.drafts) for at in positions]
    for h in histories:
        if h not in memo:
            memo[h] = logits_of(h)
    return torch.tensor([memo[h] for h in histories])


def first_two(p: SamplingParams, kind: str, n: int, verifier: Verifier = verify) -> tuple[Counter, Counter]:
    """Counts of first tokens, and of pairs (the second drawn plainly where the first pass gave one token)."""
    firsts, pairs, batch = Counter(), Counter(), 4000
    memo: dict[tuple[int, ...], list[float]] = {}
    drafter = Drafter(p, kind)
    for start in range(0, n, batch):
        seeds = range(start, min(start + batch, n))
        guesses = [Guess([drafter.position(s)], (), None) for s in seeds] if kind == "none" else drafter.guesses(seeds)
        found = verifier(rows_of([at for g in guesses for at in g.positions], memo), guesses)
        short = [i for i, tokens in enumerate(found) if len(tokens) == 1]
        rows = [Position(p, (*PROMPT, *found[i]), 2, seeds[i], (0,)) for i in short]
        plain = verify(rows_of(rows, memo), [Guess([at], (), None) for at in rows]) if rows else []
        for i, token in zip(short, plain, strict=True):
            found[i] += token
        firsts.update(tokens[0] for tokens in found)
        pairs.update(tuple(tokens[:2]) for tokens in found)
    return firsts, pairs


def expected(p: SamplingParams) -> tuple[dict, dict]:
    one = dict(enumerate(exact(logits_of(PROMPT), p, PROMPT, ())))
    two = {(a, b): one[a] * q for a in one for b, q in enumerate(exact(logits_of((*PROMPT, a)), p, PROMPT, (a,)))}
    return one, two


def check_distribution(settings: dict, kind: str, n: int) -> None:
    p = SamplingParams(**{"max_tokens": 20, **settings})
    for found, want in zip(first_two(p, kind, n), expected(p), strict=True):
        assert abs(chi_square(found, want, n)) < 5


@pytest.mark.parametrize("kind", ["none", "drawn", "named"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_distributed_as_the_settings_say(settings: dict, kind: str) -> None:
    check_distribution(settings, kind, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "drawn", "named"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_hundred_thousand_tokens_are_distributed_as_the_settings_say(settings: dict, kind: str) -> None:
    check_distribution(settings, kind, DRAWS)


def without_the_residual(logits: Tensor, guesses: Sequence[Guess]) -> list[list[int]]:
    """After a refusal it draws from p."""
    tokens = verify(logits, guesses)
    rows = distributions(logits, [at for g in guesses for at in g.positions]).split([3] * len(guesses))
    p = torch.stack([row[len(t) - 1] for row, t in zip(rows, tokens, strict=True)])
    other = draw(p, [uniform(g.positions[0].seed, 99, 7) for g in guesses]).tolist()
    return [t if len(t) == 3 else [*t[:-1], o] for t, o in zip(tokens, other, strict=True)]


def with_another_q(logits: Tensor, guesses: Sequence[Guess]) -> list[list[int]]:
    """It takes the drafts to be drawn from q as it was before the processors."""
    flat = [g._replace(q_KV=None if g.q_KV is None else g.q_KV.sqrt() / g.q_KV.sqrt().sum(-1, True)) for g in guesses]
    return verify(logits, flat)


def one_number_for_all(logits: Tensor, guesses: Sequence[Guess]) -> list[list[int]]:
    """Every position of a request has the random number of the first."""
    return verify(logits, [g._replace(positions=[Same(*at) for at in g.positions]) for g in guesses])


class Same(Position):
    index = 2  # type: ignore[assignment]


def lenient(logits: Tensor, guesses: Sequence[Guess]) -> list[list[int]]:
    return verify(logits, guesses, lenience=0.5)


@pytest.mark.parametrize("verifier", [without_the_residual, with_another_q, one_number_for_all, lenient])
def test_a_verifier_that_is_wrong_is_found_out(verifier: Verifier) -> None:
    p = SamplingParams()
    counts = first_two(p, "drawn", 6000, verifier)
    assert max(chi_square(found, want, 6000) for found, want in zip(counts, expected(p), strict=True)) > 20


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_drafts_that_are_named_change_no_token_of_a_seed(settings: dict) -> None:
    p = SamplingParams(**{"max_tokens": 20, **settings})
    drafter, memo = Drafter(p, "named"), {}
    guesses = drafter.guesses(range(300))
    found = verify(rows_of([at for g in guesses for at in g.positions], memo), guesses)
    possible = expected(p)[0][guesses[0].drafts[0]] > 0.02
    assert {len(tokens) for tokens in found} >= ({1, 2} if possible else {1})
    for place in range(3):
        same = [i for i, tokens in enumerate(found) if len(tokens) > place]
        rows = [Position(p, (*PROMPT, *found[i][:place]), 2, i, (0,)) for i in same]
        plain = verify(rows_of(rows, memo), [Guess([at], (), None) for at in rows]) if rows else []
        assert plain == [[found[i][place]] for i in same]


def test_requests_of_every_kind_share_a_pass() -> None:
    greedy, drawn = SamplingParams(temperature=0, max_tokens=20), SamplingParams(max_tokens=20, top_p=0.9)
    guesses = [
        (Drafter(p, kind).guesses([seed])[0] if kind != "none" else Guess([Drafter(p, kind).position(seed)], (), None))
        for seed, (p, kind) in enumerate([(greedy, "named"), (drawn, "drawn"), (drawn, "none"), (greedy, "drawn")] * 3)
    ]
    rows = [rows_of(g.positions, {}) for g in guesses]
    alone = [verify(row, [g])[0] for row, g in zip(rows, guesses, strict=True)]
    assert verify(torch.cat(rows), guesses) == alone


def test_what_is_no_distribution_is_said_to_be_none() -> None:
    drawn, greedy = (
        Position(SamplingParams(top_p=0.9, top_k=3), [1], 1, 0),
        Position(SamplingParams(temperature=0), [1], 1, 0),
    )
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(4, 300)
        logits[1:3, 7] = bad
        guesses = [Guess([at], (), None) for at in (drawn, drawn, greedy, greedy)]
        found = [t for (t,) in verify(logits, guesses)]
        assert [t == -1 for t in found] == [False, True, True, False]
    guess = Guess([drawn._replace(drafts=(5,) * i) for i in range(2)], [5], torch.eye(300)[5:6])
    assert verify(torch.full((2, 300), torch.nan), [guess]) == [[-1]]


@given(st.integers(0, 10**6), st.integers(1, 1500), st.integers(1, 5))
def test_a_large_vocabulary_is_cut_as_sorting_all_of_it_would(seed: int, size: int, rows: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=g).mul(3).round(decimals=seed % 3)  # ties, in part
    rng = random.Random(seed)
    params = [
        SamplingParams(top_k=rng.choice([0, 1, 7, 2000]), top_p=rng.choice([1, 0.999, 0.5, 1e-9])) for _ in range(rows)
    ]
    got = distributions(logits, [Position(p, [], 0, 0) for p in params])
    for row_V, z_V, p in zip(got, logits, params, strict=True):
        probabilities, order = z_V.double().softmax(-1).sort(descending=True, stable=True)
        k = min(p.top_k or size, size)
        probabilities = probabilities[:k] / probabilities[:k].sum()
        before = probabilities.cumsum(-1) - probabilities
        n = int((before < p.top_p - 1e-7).sum()) if p.top_p < 1 else k
        most = int((before < p.top_p + 1e-6).sum()) if p.top_p < 1 else k  # rounding at the edge
        kept = int((row_V > 0).sum())
        assert max(n, 1) <= kept <= max(most, 1)
        assert sorted(row_V.nonzero().flatten().tolist()) == sorted(order[:kept].tolist())
        assert torch.allclose(
            row_V[order[:kept]].double(), probabilities[:kept] / probabilities[:kept].sum(), rtol=1e-4
        )


@given(st.integers(0, 10**6), st.sampled_from([1, 255, 256, 257, 700]))
def test_a_draw_is_the_first_token_whose_sum_exceeds_the_number(seed: int, size: int) -> None:
    rng = random.Random(seed)
    p = torch.rand(3, size, generator=torch.Generator().manual_seed(seed)).double()
    p *= torch.rand(3, size, generator=torch.Generator().manual_seed(seed + 1)) < 0.3
    p[:, rng.randrange(size)] = 1.0
    u = [0.0, rng.random(), 1 - 2**-53]
    for row_V, number, token in zip(p, u, draw(p, u).tolist(), strict=True):
        sums = row_V.cumsum(-1)
        assert row_V[token] > 0
        assert sums[token] >= number * sums[-1] * (1 - 1e-12)
        assert sums[token] - row_V[token] <= number * sums[-1] * (1 + 1e-12)


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


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_at_the_edges_of_chance_no_impossible_token_comes(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *_: number)
    p = SamplingParams(top_k=2)
    logits = torch.tensor([[3.0, 2.9, 1.0, 0.0], [3.0, 2.9, 1.0, 0.0]])
    p_V = distributions(logits[:1], [Position(p, [1], 1, 0)])[0]
    # Drafts that the target never gives; and q that are the target's but for rounding: nothing is left of p - q.
    for draft, q_V in (
        (2, torch.full((4,), 0.25)),
        (2, None),
        (0, p_V * (1 + 1e-6)),
        (1, p_V.nextafter(torch.ones(4))),
    ):
        guess = Guess(
            [Position(p, [1], 1, 0, drafts=(draft,) * i) for i in range(2)], [draft], None if q_V is None else q_V[None]
        )
        for lenience in (1.0, 0.5):
            (tokens,) = verify(logits, [guess], lenience)
            assert set(tokens) <= {0, 1}
