"""moe.experts: router, balance and z losses against loops over their formulas, bias updates, the whole layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.config import ExpertsConfig, RouterConfig
from moe.experts import MoE, Router, balance_loss, expert_counts, z_loss
from tests.conftest import rel

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def router(n_experts: int, top_k: int, d_model: int = 8, bias_update_rate: float = 0.0) -> Router:
    module = Router(d_model, n_experts, top_k, RouterConfig(bias_update_rate=bias_update_rate)).double()
    module.weight.data = normal(n_experts, d_model, seed=1)
    return module


def softmax_by_hand(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(v - top) for v in logits]
    return [v / sum(exps) for v in exps]


# -------------------------------------------------------------------------------------------------------------- losses


def balance_by_hand(logits: Tensor, ids: Tensor) -> float:
    """Per sequence: E * sum_e (share of the S*K choices that fell on e) * (mean probability of e); mean over them."""
    B, S, E = logits.shape
    K = ids.shape[-1]
    total = 0.0
    for b in range(B):
        for e in range(E):
            share = sum(int(ids[b, s, k]) == e for s in range(S) for k in range(K)) / (S * K)
            probability = sum(softmax_by_hand(logits[b, s].tolist())[e] for s in range(S)) / S
            total += E * share * probability / B
    return total


def z_by_hand(logits: Tensor) -> float:
    rows = logits.flatten(0, 1).tolist()
    return sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in rows) / len(rows)


@pytest.mark.parametrize(("E", "K"), [(1, 1), (5, 1), (5, 2), (5, 5), (16, 2)])
def test_routing_and_losses_against_the_formulas(E: int, K: int) -> None:
    module, x = router(E, K), normal(3, 7, 8)
    routing, logits = module(x), (x @ module.weight.T).detach()
    ids = routing.ids_TK.view(3, 7, K)
    assert routing.balance_B.mean().item() == pytest.approx(balance_by_hand(logits, ids), rel=1e-12)
    assert routing.z_T.mean().item() == pytest.approx(z_by_hand(logits), rel=1e-12)
    assert routing.counts_E.tolist() == [int((ids == e).sum()) for e in range(E)]
    for row, chosen, weights in zip(logits.flatten(0, 1), routing.ids_TK, routing.weights_TK, strict=True):
        best = sorted(range(E), key=lambda e: -float(row[e]))[:K]
        assert chosen.tolist() == best
        assert weights.tolist() == pytest.approx(softmax_by_hand(row[best].tolist()), rel=1e-12)


@given(E=st.integers(1, 20), B=st.integers(1, 4), S=st.integers(1, 9), data=st.data())
def test_counts_sum_to_all_choices(E: int, B: int, S: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    routing = router(E, K)(normal(B, S, 8, seed=S))
    assert routing.counts_E.sum() == B * S * K
    assert routing.counts_E.dtype == torch.int64
    assert rel(routing.weights_TK.sum(1), torch.ones(B * S, dtype=F64)) < 1e-14


def test_balance_is_one_when_even_and_n_experts_when_all_choose_one() -> None:
    E = 4
    even = torch.zeros(2, 8, E, dtype=F64)
    assert balance_loss(even, torch.full((2, E), 2)).mean().item() == pytest.approx(1.0, rel=1e-14)
    certain = F.one_hot(torch.arange(8) % E, E).double().expand(2, 8, E) * 200  # each expert twice, without doubt
    assert balance_loss(certain, torch.full((2, E), 2)).mean().item() == pytest.approx(1.0, rel=1e-12)
    collapsed = F.one_hot(torch.zeros(2, 8, dtype=torch.int64), E).double() * 200
    assert balance_loss(collapsed, torch.tensor([[8, 0, 0, 0]] * 2)).mean().item() == pytest.approx(E, rel=1e-12)


def test_balance_is_of_each_sequence_not_of_the_batch() -> None:
    """Two sequences, each all on one expert of its own: even over the batch, as uneven as can be over each."""
    logits = F.one_hot(torch.tensor([[0] * 8, [1] * 8]), 2).double() * 200
    assert balance_loss(logits, torch.tensor([[8, 0], [0, 8]])).mean().item() == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_losses_are_unchanged_when_the_batch_is_split(parts: int) -> None:
    module, x = router(5, 2), normal(6, 7, 8)
    whole, pieces = module(x), [module(piece) for piece in x.chunk(parts)]
    assert rel(torch.stack([p.balance_B.mean() for p in pieces]).mean(), whole.balance_B.mean()) < 1e-14
    assert rel(torch.stack([p.z_T.mean() for p in pieces]).mean(), whole.z_T.mean()) < 1e-14
    assert torch.equal(torch.stack([p.counts_E for p in pieces]).sum(0), whole.counts_E)


def test_balance_loss_pushes_the_overloaded_expert_down() -> None:
    logits = (normal(1, 50, 4) + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
    counts = expert_counts(logits.detach().argmax(-1), 4)
    (gradient,) = torch.autograd.grad(balance_loss(logits, counts).mean(), logits)
    assert counts[0].argmax() == 0
    assert gradient[0, :, 0].sum() > 0


def test_losses_gradcheck() -> None:
    counts = torch.tensor([[3, 1, 4], [2, 6, 0]])
    logits = normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: balance_loss(t, counts).mean(), logits)
    assert torch.autograd.gradcheck(z_loss, logits)


@given(E=st.integers(1, 12), B=st.integers(1, 4), n=st.integers(0, 20))
def test_expert_counts(E: int, B: int, n: int) -> None:
    ids = torch.randint(E, (B, n), generator=torch.Generator().manual_seed(n))
    counts = expert_counts(ids, E)
    assert counts.tolist() == [[row.count(e) for e in range(E)] for row in ids.tolist()]


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("autocast", [False, True])
def test_router_computes_in_float32_for_narrow_inputs(autocast: bool) -> None:
    """The input is what bfloat16 made of it, but from there on nothing more is lost: a choice must not depend on it."""
    module = router(16, 2, d_model=256).float()
    x = normal(2, 50, 256).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = module(x)
    exact = module.double()(x.double())
    assert routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.ids_TK, exact.ids_TK)
    assert rel(routing.weights_TK, exact.weights_TK) < 1e-5
    assert rel(routing.z_T.mean(), exact.z_T.mean()) < 1e-6


# ------------------------------------------------------------------------------------------------ bias-based balancing


def test_bias_update_by_hand() -> None:
    module = router(4, 2, bias_update_rate=0.25)
    module.update_bias(torch.tensor([10, 4, 1, 5]))  # mean 5
    assert module.bias_E is not None
    assert module.bias_E.tolist() == [-0.25, 0.25, 0.25, 0.0]


def test_bias_updates_even_out_a_skewed_router() -> None:
    """The data favour expert 0; the biases bring the loads within 30% of even, and the weights stay a softmax."""
    module, x = router(8, 2, bias_update_rate=0.003), normal(4, 64, 8) + 0.5
    module.weight.data *= 0.2
    module.weight.data[0] += 0.3  # nearly every token likes expert 0

    def spread(counts: Tensor) -> float:
        return float(counts.max() / counts.double().mean())

    before = spread(module(x).counts_E)
    for _ in range(300):
        module.update_bias(module(x).counts_E)
    routing = module(x)
    assert before > 2
    assert spread(routing.counts_E) < 1.3
    logits = (x @ module.weight.T).flatten(0, 1)
    assert rel(routing.weights_TK, logits.gather(1, routing.ids_TK).softmax(-1)) < 1e-14


def test_bias_exists_only_where_the_setting_asks_for_it() -> None:
    off, on = router(4, 2), router(4, 2, bias_update_rate=0.1)
    off.update_bias(torch.tensor([9, 0, 0, 0]))
    assert off.bias_E is None
    assert "bias_E" not in off.state_dict()
    assert "bias_E" in on.state_dict(), "it must be saved with the weights"
    assert "bias_E" not in dict(on.named_parameters()), "no optimizer may touch it"


# ----------------------------------------------------------------------------------------------------------- the layer


def layer(activation: str = "swiglu", top_k: int = 2) -> MoE:
    cfg = ExpertsConfig(n_experts=4, top_k=top_k, d_ff=5, activation=activation)  # type: ignore[arg-type]
    module = MoE(6, cfg, RouterConfig()).double()
    for i, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=20 + i) / parameter.shape[-1] ** 0.5
    return module


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_layer_is_the_weighted_sum_of_its_experts(activation: str) -> None:
    module, x = layer(activation), normal(2, 5, 6)
    y, routing = module(x)
    for t, token in enumerate(x.flatten(0, 1)):
        want = torch.zeros(6, dtype=F64)
        for e, weight in zip(routing.ids_TK[t].tolist(), routing.weights_TK[t], strict=True):
            h = [w @ token for w in module.experts.w_in_EGFD[e]]
            if activation == "swiglu":
                a = h[0] * torch.sigmoid(h[0]) * h[1]
            else:
                a = 0.5 * h[0] * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h[0] + 0.044715 * h[0] ** 3)))
            want += weight * (module.experts.w_out_EDF[e] @ a)
        assert rel(y.flatten(0, 1)[t], want) < 1e-13


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradcheck_through_router_and_experts(activation: str, top_k: int) -> None:
    module, x = layer(activation, top_k), normal(1, 4, 6, seed=5)
    scores = (x @ module.router.weight.T).flatten(0, 1).sort(-1, descending=True).values
    assert (scores[:, :-1] - scores[:, 1:]).min() > 1e-3, "a tie within gradcheck's step would change the choice"
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = dict(zip(names, parameters, strict=True))
        y, routing = torch.func.functional_call(module, values, (x,))
        return y, routing.balance_B.mean(), routing.z_T.mean()

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *module.parameters()), fast_mode=True)


def test_router_learns_from_the_experts_outputs() -> None:
    module = layer()
    y, _ = module(normal(2, 5, 6))
    y.square().sum().backward()
    assert module.router.weight.grad is not None
    assert module.router.weight.grad.norm() > 0
