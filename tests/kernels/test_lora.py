"""Experts with adapters, against the definition W x + scale * B (A x) in float64, and against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.kernels import ops
from moe.kernels.experts import lora, reference
from tests.conftest import rel


class Case:
    """Random float64 operands; `adapters` want gradients, and so do x and the routing weights."""

    def __init__(
        self, activation: str = "swiglu", T: int = 20, E: int = 4, D: int = 16, width: int = 24, rank: int = 3
    ):
        g = torch.Generator().manual_seed(1)
        G = ops.ACTIVATIONS[activation]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.activation, self.scale = activation, 1.7
        self.w_in, self.w_out = normal(E, G, width, D) / D**0.5, normal(E, D, width) / width**0.5
        sizes = ((E, rank, D), (E, G, width, rank), (E, rank, width), (E, D, rank))
        self.adapters = [(normal(*size) / size[-1] ** 0.5).requires_grad_() for size in sizes]
        self.x = normal(T, D).requires_grad_()
        self.weights = normal(T, 2).softmax(-1).requires_grad_()
        self.ids = torch.rand(T, E, generator=g).argsort(1)[:, :2]
        self.dy = normal(T, D)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, *self.adapters]

    def ours(self, dtype: torch.dtype = torch.float64) -> Tensor:
        a, b, c, d = (t.to(dtype) for t in self.adapters)
        return lora.expert_mlp(
            self.x.to(dtype),
            self.w_in.to(dtype),
            self.w_out.to(dtype),
            lora.Adapters(a, b, c, d),
            self.scale,
            self.weights,
            self.ids,
            self.activation,
        )

    def definition(self) -> Tensor:
        """Each token through each of its experts, the adapters beside the weights, never merged."""
        a_in, b_in, a_out, b_out = self.adapters
        rows = []
        for x, weights, ids in zip(self.x, self.weights, self.ids, strict=True):
            y = 0.0
            for weight, e in zip(weights, ids, strict=True):
                low = b_in[e] @ (a_in[e] @ x)
                h_GF = self.w_in[e] @ x + self.scale * low
                a_F = reference.activate(h_GF.unsqueeze(0), self.activation)[0]
                y = y + weight * (self.w_out[e] @ a_F + self.scale * (b_out[e] @ (a_out[e] @ a_F)))
            rows.append(y)
        return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equal_to_adapters_beside_the_weights(activation: str, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(activation)
    got, want = case.ours(dtype), case.definition()
    assert rel(got, want) < tolerance
    got_grads = torch.autograd.grad(got, case.leaves, case.dy.to(dtype))
    for one, other in zip(got_grads, torch.autograd.grad(want, case.leaves, case.dy), strict=True):
        assert rel(one, other) < tolerance


def test_gradients_are_those_of_finite_differences() -> None:
    case = Case(T=3, E=3, D=4, width=4, rank=2)

    def function(x: Tensor, weights: Tensor, *adapters: Tensor) -> Tensor:
        small = lora.Adapters(*adapters)
        return lora.expert_mlp(x, case.w_in, case.w_out, small, case.scale, weights, case.ids, case.activation)

    assert torch.autograd.gradcheck(function, case.leaves)


def test_no_merged_weight_is_kept_for_the_backward() -> None:
    """What a layer saves is its operands and what the op without adapters saves."""
    case = Case()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.ours()
    own = {t.data_ptr() for t in (case.w_in, case.w_out)}
    weights = [t for t in saved if t.shape in (case.w_in.shape, case.w_out.shape)]
    assert len(weights) == 2
    assert {t.data_ptr() for t in weights} == own


def test_under_autocast_weights_are_merged_before_they_are_rounded() -> None:
    case = Case()
    x, w_in, w_out = (t.detach().float() for t in (case.x, case.w_in, case.w_out))
    small = lora.Adapters(*(t.detach().float() * 1e-2 for t in case.adapters))
    with torch.autocast("cpu", torch.bfloat16):
        got = lora.expert_mlp(x, w_in, w_out, small, case.scale, case.weights, case.ids, "swiglu")
    merged = (
        lora.merge(w_in, small.a_in_ELD, small.b_in_EGFL, case.scale),
        lora.merge(w_out, small.a_out_ELF, small.b_out_EDL, case.scale),
    )
    with torch.autocast("cpu", torch.bfloat16):
        want = ops.expert_mlp(x, *merged, case.weights, case.ids, "swiglu")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_gradients_survive_activation_checkpointing() -> None:
    case = Case()
    want = torch.autograd.grad(case.ours(), case.leaves, case.dy)
    got = torch.autograd.grad(checkpoint(case.ours, use_reentrant=False), case.leaves, case.dy)  # type: ignore[arg-type]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_merge_is_the_product_per_expert() -> None:
    case = Case()
    a_in, b_in, *_ = case.adapters
    got = lora.merge(case.w_in, a_in, b_in, case.scale)
    for e in range(len(got)):
        for g in range(got.shape[1]):
            assert rel(got[e, g], case.w_in[e, g] + case.scale * F.linear(b_in[e, g], a_in[e].T)) < 1e-14


def test_weights_that_want_gradients_are_refused() -> None:
    case = Case()
    case.w_in.requires_grad_()
    with pytest.raises(ValueError, match="they are frozen"):
        case.ours()
