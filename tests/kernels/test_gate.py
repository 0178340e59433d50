"""reference.topk_gate: what it chooses, how it weighs, what ties and biases do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.kernels.gate import reference
from tests.conftest import rel


def logits(T: int, E: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(T=st.integers(0, 20), E=st.integers(1, 20), data=st.data())
def test_weights_are_the_softmax_over_all_renormalised_over_the_chosen(T: int, E: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    scores = logits(T, E, data.draw(st.integers(0, 99)))
    weights, ids = reference.topk_gate(scores, K)
    assert ids.shape == weights.shape == (T, K)
    assert ids.dtype == torch.int64
    for t in range(T):
        everything = scores[t].exp() / scores[t].exp().sum()
        best = sorted(range(E), key=lambda e: -float(everything[e]))[:K]
        assert ids[t].tolist() == best
        assert rel(weights[t], everything[best] / everything[best].sum()) < 1e-13


@pytest.mark.parametrize("E", [4, 16, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lower_index(E: int, dtype: torch.dtype) -> None:
    """Logits of few distinct values: nearly all of them tie (an unstable sort gets E > 16 wrong)."""
    scores = torch.randint(3, (50, E), generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, ids = reference.topk_gate(scores, E)
    for t in range(len(scores)):
        assert ids[t].tolist() == sorted(range(E), key=lambda e: (-float(scores[t, e]), e))
    _, first = reference.topk_gate(torch.zeros(5, E, dtype=dtype), 2)
    assert first.tolist() == [[0, 1]] * 5
    assert rel(weights.sum(1), torch.ones(50)) < 1e-6


def test_bias_changes_the_choice_but_never_the_weights() -> None:
    scores, bias = logits(30, 6), torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0, -5.0], dtype=torch.float64)
    weights, ids = reference.topk_gate(scores, 2, bias)
    assert (ids[:, 0] == 2).all(), "a bias above every probability wins each time"
    assert (ids != 5).all()
    assert rel(weights, scores.gather(1, ids).softmax(-1)) < 1e-15
    same_weights, same_ids = reference.topk_gate(scores, 2, torch.full((6,), 0.25, dtype=torch.float64))
    plain_weights, plain_ids = reference.topk_gate(scores, 2)
    assert torch.equal(same_ids, plain_ids), "the same bias for all changes nothing"
    assert torch.equal(same_weights, plain_weights)


def test_bias_is_added_to_probabilities_not_to_logits() -> None:
    scores = torch.tensor([[4.0, 2.0, 0.0]], dtype=torch.float64)  # probabilities 0.867, 0.117, 0.016
    below, above = ([[0.0, b, 0.0]] for b in (0.74, 0.76))
    assert reference.topk_gate(scores, 1, torch.tensor(below[0]))[1].item() == 0
    assert reference.topk_gate(scores, 1, torch.tensor(above[0]))[1].item() == 1


def test_gradient_reaches_the_chosen_logits_only() -> None:
    scores = logits(8, 5).requires_grad_()
    weights, ids = reference.topk_gate(scores, 2, torch.tensor([0.1, 0, 0, 0, 0]))
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), scores)
    chosen = torch.zeros(8, 5, dtype=torch.bool).scatter(1, ids, True)
    assert (gradient[~chosen] == 0).all()
    assert (gradient[chosen] != 0).all()
    assert torch.autograd.gradcheck(lambda s: reference.topk_gate(s, 2)[0], scores)
