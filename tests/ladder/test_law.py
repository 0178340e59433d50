"""The law of a ladder, against constants that are known: made up, published, and published with the losses."""

import numpy as np
import pytest

from moe.errors import ConfigError
from moe.ladder.law import PowerLaw, fit, leave_one_out

# Cerebras-GPT 111M to 13B at 20 tokens per parameter (arXiv:2304.03208): training FLOP, test loss on the Pile.
CEREBRAS_FLOP = [2.6e18, 1.3e19, 6.1e19, 2.8e20, 1.1e21, 6.3e21, 2.3e22]
CEREBRAS_LOSS = [2.608, 2.349, 2.181, 1.997, 1.834, 1.704, 1.572]


@pytest.mark.parametrize(
    ("E", "A", "alpha"), [(1.5, 200.0, 0.15), (0.0, 30.0, 0.07), (2.8, 5e5, 0.5), (0.4, 1e3, 0.2), (1.0, 6.0, 0.012)]
)
@pytest.mark.parametrize("n", [4, 7])
def test_recovers_the_constants_of_a_law(E: float, A: float, alpha: float, n: int) -> None:
    C = np.geomspace(3e12, 8e14, n)
    L = E + A * C**-alpha
    law = fit(list(C), list(L))
    assert law.exponent == pytest.approx(alpha, rel=1e-3)
    assert law.irreducible == pytest.approx(E, rel=1e-3, abs=1e-3)
    assert law.loss(1e17) == pytest.approx(E + A * 1e17**-alpha, rel=1e-4)
    assert [w.loss(1e17) for w in leave_one_out(list(C), list(L))] == pytest.approx([law.loss(1e17)] * n, rel=1e-3)


def test_the_order_of_the_rungs_does_not_matter() -> None:
    C, L = CEREBRAS_FLOP, CEREBRAS_LOSS
    order = [3, 0, 6, 1, 5, 2, 4]
    shuffled = fit([C[i] for i in order], [L[i] for i in order])
    assert shuffled.loss(1e24) == pytest.approx(fit(C, L).loss(1e24), rel=1e-6)


def test_noise_moves_the_prediction_no_further_than_it_should() -> None:
    """0.3% of noise on six rungs over two powers of ten, extrapolated fourfold: within 1.5% in 95% of 100 draws."""
    rng, C = np.random.default_rng(0), np.geomspace(1e13, 1e15, 6)
    truth = PowerLaw(1.7, 2000.0, 0.22)
    clean = np.array([truth.loss(c) for c in C])
    errors = []
    for _ in range(100):
        law = fit(list(C), list(clean * (1 + 0.003 * rng.standard_normal(6))))
        errors.append(abs(law.loss(4e15) / truth.loss(4e15) - 1))
    assert np.quantile(errors, 0.95) < 0.015
    assert np.median(errors) < 0.006


def test_extrapolates_chinchillas_frontier() -> None:
    """Hoffmann et al. 2022 (arXiv:2203.15556), approach 3: 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28.

    With D = 20 N and C = 6 N D that is a sum of two powers of C; fitted from 0.1B to 2B parameters, one power says what
    10B reach.
    """
    N = np.geomspace(1e8, 2e9, 5)
    true = lambda n: 1.69 + 406.4 / n**0.34 + 410.7 / (20 * n) ** 0.28  # noqa: E731
    law = fit(list(120 * N**2), list(true(N)))
    assert law.loss(120 * 1e10**2) == pytest.approx(true(1e10), rel=1e-3)
    assert law.irreducible == pytest.approx(1.69, rel=0.02)
    assert 0.14 < law.exponent < 0.17  # half of 0.28 and of 0.34


def test_agrees_with_the_law_that_cerebras_published() -> None:
    """(C / 5.984e22)^-0.0737 + 0.5066 (arXiv:2304.03208)."""
    published = PowerLaw(0.5066, 5.984e22**0.0737, 0.0737)
    law = fit(CEREBRAS_FLOP, CEREBRAS_LOSS)
    assert law.exponent == pytest.approx(published.exponent, rel=0.05)
    for c in (1e18, 1e20, 1e22, 1e23):
        assert law.loss(c) == pytest.approx(published.loss(c), rel=0.005)


def test_predicts_the_largest_cerebras_model_from_the_smaller_ones() -> None:
    rungs = CEREBRAS_FLOP[:-1], CEREBRAS_LOSS[:-1]
    law, target, truth = fit(*rungs), CEREBRAS_FLOP[-1], CEREBRAS_LOSS[-1]
    assert law.loss(target) == pytest.approx(truth, rel=0.02)
    predictions = [w.loss(target) for w in leave_one_out(*rungs)]
    assert min(predictions) < truth < max(predictions)


@pytest.mark.parametrize(
    ("compute", "losses", "complaint"),
    [
        ([1e12, 1e13, 1e14], [4.0, 3.0, 2.5], "3 rungs .*need 4 or more; give more `rungs`"),
        ([1e12, 1e12, 1e13, 1e14], [4.0, 4.1, 3.0, 2.5], "3 rungs of different compute"),
        ([1e13] * 5, [4.0, 3.9, 3.8, 3.7, 3.6], "1 rungs of different compute"),
        ([1e13, 1.1e13, 1.2e13, 1.3e13], [4.0, 3.9, 3.8, 3.7], "span 1.30 times the compute"),
        ([1e12, 1e13, 1e14, 1e15], [3.0, 3.1, 3.2, 3.3], "does not fall.*`tokens_per_parameter`"),
        ([1e12, 1e13, 1e14, 1e15], [3.0, 3.0, 3.0, 3.0], "does not fall"),
        ([1e12, 1e13, 1e14, 1e15], [3.0, 2.0, 2.5, 3.01], "does not fall"),
        ([1e12, 1e13, 1e14, 1e15], [3.0, 2.0, float("nan"), 1.0], "finite"),
        ([0.0, 1e13, 1e14, 1e15], [3.0, 2.0, 1.5, 1.0], "positive"),
        ([1e12, 1e13, 1e14, 1e15], [3.0, 2.0, 1.5], "4 figures of compute and 3 losses"),
    ],
)
def test_refuses_what_gives_no_law(compute: list[float], losses: list[float], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        fit(compute, losses)
