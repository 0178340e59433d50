"""The ops where torch calls them in an unusual way: without values, under torch.func, twice differentiated, autocast.

Right values come from plain autograd and from float64.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from moe.kernels import arguments as arguments_module
from moe.kernels import ops
from moe.kernels.experts import lora
from moe.kernels.loss import op as loss_op
from tests.conftest import rel
from tests.kernels.calls import (
    EXPERTS,
    MLPS,
    WITHOUT_VALUES,
    D,
    E,
    K,
    T,
    V,
    adapters,
    loss,
    mlp,
    normal,
    on_meta,
    with_adapters,
)


@pytest.mark.parametrize("how", WITHOUT_VALUES)
def test_without_values_the_shapes_come(how: Callable[..., Any]) -> None:
    given = mlp()

    def call(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return run(**dict(zip(given, tensors, strict=True)))

    for name, run in MLPS.items():
        # Two do not run on meta, and say so; the adapters' own tensors are real.
        if name != "adapters" and not (how is on_meta and name in ("grouped", "triton")):
            y = how(functools.partial(call, run), *given.values())
            assert (y.shape, y.dtype) == ((T, D), torch.float32), name
    total = how(lambda *tensors: ops.linear_cross_entropy(*tensors), *loss().values())
    assert (total.shape, total.dtype) == ((), torch.float32)
    weights, ids = how(lambda x, ids: ops.topk_gate(x, K, given_TK=ids), normal(T, E), mlp()["ids_TK"])
    assert (weights.shape, ids.shape, ids.dtype) == ((T, K), (T, K), torch.int64)
    eight_bits = ops.quantize_experts(given["w_in_EGFD"], given["w_out_EDF"])
    routed = given["x_TD"], given["weights_TK"], given["ids_TK"], *eight_bits

    def quantized(x: Tensor, weights: Tensor, ids: Tensor, *experts: Tensor) -> Tensor:
        return ops.expert_mlp_quantized(x, ops.QuantizedExperts(*experts), weights, ids, "swiglu")

    y = how(quantized, *routed)
    assert (y.shape, y.dtype) == ((T, D), torch.float32)
    tables = (torch.tensor(table, dtype=torch.int32) for table in ([[0], [1]], [0, 1, 2], [3, 4]))
    q, kept = normal(2, 4, 8), (normal(8, 2, 8), normal(8, 2, 8))
    attend = functools.partial(ops.paged_attention, block_size=4, max_query_len=1, max_seq_len=4)
    y = how(attend, q, *kept, *tables)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)


def test_every_op_is_among_those_tested_here() -> None:
    plain = {"activate", "quantize", "quantize_experts", "QuantizedExperts"}  # torch's own operations, and a tuple
    names = {name for name in ops.__all__ if callable(getattr(ops, name)) and name not in plain}
    within = {"expert_mlp", "expert_mlp_forward", "expert_mlp_inference", "linear_cross_entropy", "topk_gate"}
    within |= {"expert_mlp_quantized", "paged_attention"}
    assert names == within | {"expert_mlp_gradients"}, "which takes what expert_mlp_forward has checked"


def test_opcheck_of_the_small_ops() -> None:
    ids, targets = mlp()["ids_TK"], loss()["targets_T"]
    x, w = normal(T, D), normal(V, D)
    for op, arguments in (
        (arguments_module.checked_choice, (ids, E, "ids")),
        (arguments_module.checked_ids, (ids, E, "ids")),
        (loss_op.checked_targets, (targets, V)),
        (loss_op._linear_cross_entropy_backward, (torch.tensor(2.0), x, w)),
    ):
        torch.library.opcheck(op, arguments)


def transforms() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """By name: a transform of a scalar function of one tensor, and what it equals, by plain autograd."""

    def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    def forward_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent

    def differences(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        h = 1e-6
        return (gradient(f, x + h * x.cos()) - gradient(f, x - h * x.cos())) / (2 * h)

    def hessian_product(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1]

    return {
        "grad": (lambda f, x: torch.func.grad(f)(x), gradient),
        "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1], lambda f, x: (gradient(f, x) * x.cos()).sum()),
        "forward mode": (forward_mode, lambda f, x: (gradient(f, x) * x.cos()).sum()),
        "vmap": (lambda f, x: torch.func.vmap(f)(torch.stack([x, -x])), lambda f, x: torch.stack([f(x), f(-x)])),
        "per-sample gradients": (
            lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, -x])),
            lambda f, x: torch.stack([gradient(f, x), gradient(f, -x)]),
        ),
        "second derivatives": (hessian_product, differences),
    }


@pytest.mark.parametrize("name", transforms())
@pytest.mark.parametrize("op", ["reference", "adapters", "loss", "gate"])
def test_transforms_of_torch_func(name: str, op: str) -> None:
    """They are right: never a lost tangent, never a message about batching rules."""
    given = {k: t.double() if t.is_floating_point() else t for k, t in mlp().items()}
    wide = lora.Adapters(*(t.double() for t in adapters()))
    targets, w = loss()["targets_T"], loss()["w_VD"].double()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "reference": lambda x: ops.expert_mlp(**{**given, "x_TD": x}).square().sum(),
        "adapters": lambda x: with_adapters(**{**given, "x_TD": x}, adapters=wide).square().sum(),
        "loss": lambda x: ops.linear_cross_entropy(x, w, targets),
        "gate": lambda x: (ops.topk_gate(x, K)[0] ** 3).sum(),
    }
    transform, want = transforms()[name]
    x = normal(T, D).double()
    assert rel(transform(functions[op], x), want(functions[op], x)) < (1e-6 if name == "second derivatives" else 1e-12)


def test_ids_outside_are_named_under_transforms() -> None:
    given = mlp()
    given["ids_TK"][2, 0] = E
    with pytest.raises(ValueError, match="ids = 4 in row 2"):
        torch.func.grad(lambda x: ops.expert_mlp(**{**given, "x_TD": x}).sum())(given["x_TD"])
    with pytest.raises(ValueError, match="given_TK"):
        torch.func.grad(lambda x: ops.topk_gate(x, K, given_TK=given["ids_TK"])[0].sum())(normal(T, E))
    with pytest.raises(ValueError, match="target 12 of token 0"):
        torch.func.grad(lambda x: ops.linear_cross_entropy(x, normal(V, D), torch.full((T,), 12)))(normal(T, D))


@pytest.mark.parametrize("op", [*EXPERTS, "loss", "triton loss", "triton gate"])
def test_second_derivatives_are_never_silently_zero(op: str) -> None:
    x = normal(T, D).requires_grad_()
    if op in EXPERTS:
        y = ops.expert_mlp(**mlp(x_TD=x), impl=op).sum()
    elif op == "triton gate":
        y = ops.topk_gate(x, K, impl="triton")[0].square().sum()
    else:
        y = ops.linear_cross_entropy(**loss(x_TD=x), impl="torch" if op == "loss" else "triton")
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative by backward\(create_graph=True\): take torch.func"):
        dx.square().sum().backward()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_float64_stays_under_autocast(narrow: torch.dtype) -> None:
    """As everywhere in torch."""
    given = {k: t.double() if t.is_floating_point() else t for k, t in mlp().items()}
    outer = {k: t.double() if t.is_floating_point() else t for k, t in loss().items()}
    wide = lora.Adapters(*(t.double() for t in adapters()))
    plain = ops.expert_mlp(**given), with_adapters(**given, adapters=wide), ops.linear_cross_entropy(**outer)
    with torch.autocast("cpu", narrow):
        cast = ops.expert_mlp(**given), with_adapters(**given, adapters=wide), ops.linear_cross_entropy(**outer)
    for a, b in zip(cast, plain, strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b)
