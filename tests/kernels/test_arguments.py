"""What the ops say to arguments that do not fit, and that they take all that do: every op, every implementation.

Eager, compiled, of fakes and on the meta device. Right values come from float64, or are made by hand.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.kernels import ops
from moe.kernels.experts import lora, reference
from moe.kernels.loss import chunked
from tests.conftest import rel
from tests.kernels.calls import (
    EXPERTS,
    GATES,
    LOSSES,
    MLPS,
    WITHOUT_VALUES,
    D,
    E,
    F,
    K,
    T,
    V,
    adapters,
    compiled,
    eager,
    faked,
    loss,
    mlp,
    normal,
    on_meta,
    with_adapters,
)

# -------------------------------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize("how", [eager, compiled, *WITHOUT_VALUES])
@pytest.mark.parametrize("impl", [None, *GATES])
def test_top_k_is_one_to_the_number_of_experts(how: Callable[..., Any], impl: str | None) -> None:
    if how is on_meta and impl == "triton":
        pytest.skip("triton does not run on meta, and says so")
    wrong: list[Any] = [E + 1, 0, -1, 2.0, True]
    for top_k in wrong:
        with pytest.raises(Exception, match=rf"top_k = {top_k}: must be an integer in 1 \.\. {E}"):
            how(lambda logits, k=top_k: ops.topk_gate(logits, k, impl=impl), normal(T, E))
    weights, ids = how(lambda logits: ops.topk_gate(logits, E, impl=impl), normal(T, E))
    assert (weights.shape, weights.dtype, ids.shape, ids.dtype) == ((T, E), torch.float32, (T, E), torch.int64)


@pytest.mark.parametrize("impl", GATES)
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"logits_TE": [[0.0] * E]}, "logits must be a tensor; got list"),
        (
            {"logits_TE": normal(T, E).to_sparse()},
            r"logits must be dense; got torch\.sparse_coo: give logits\.to_dense",
        ),
        ({"given_TK": [[0, 1]] * T}, "given_TK must be a tensor; got list"),
        ({"logits_TE": normal(T)}, r"wants logits \[T, E\]; got \[5\]"),
        ({"logits_TE": torch.zeros(T, E, dtype=torch.int64)}, "logits must be floating point; got torch.int64"),
        ({"bias_E": torch.zeros(E + 1)}, r"bias_E must be \[4\], one per expert; got \[5\]"),
        ({"bias_E": torch.zeros(E, dtype=torch.int32)}, "bias_E must be floating point; got torch.int32"),
        ({"bias_E": torch.zeros(E, device="meta")}, "must be on one device; got logits cpu, bias_E meta"),
        (
            {"given_TK": torch.zeros(T, 3, dtype=torch.int64)},
            r"given_TK must be int64 \[5, 2\]; got torch.int64 \[5, 3\]",
        ),
        (
            {"given_TK": torch.zeros(T, K, dtype=torch.int32)},
            r"given_TK must be int64 \[5, 2\]; got torch.int32 \[5, 2\]",
        ),
        ({"given_TK": torch.tensor([[0, 1]] * 4 + [[1, E]])}, r"given_TK = 4 in row 4: must be in \[0, 4\)"),
        ({"given_TK": torch.tensor([[0, -1]] * T)}, r"given_TK = -1 in row 0: must be in \[0, 4\)"),
        (
            {"given_TK": torch.tensor([[0, 1], [3, 3]] * 2 + [[0, 1]])},
            r"row 1 = \[3, 3\]: the ids of a row must differ",
        ),
        ({"impl": "fast"}, "impl = 'fast': must be"),
    ],
)
def test_what_a_gate_refuses(impl: str, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ops.topk_gate(**{"logits_TE": normal(T, E), "top_k": K, "impl": impl, **change})


@pytest.mark.parametrize("impl", GATES)
def test_a_compiled_gate_refuses_given_ids(impl: str) -> None:
    for given in ([[0, E]] * T, [[1, 1]] * T):
        with pytest.raises(ValueError, match="given_TK"):
            compiled(lambda x, ids: ops.topk_gate(x, K, impl=impl, given_TK=ids), normal(T, E), torch.tensor(given))


@pytest.mark.parametrize("impl", GATES)
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_gate_of_no_token_and_of_all_experts(impl: str, tokens: int) -> None:
    logits = normal(tokens, E).requires_grad_()
    for top_k in (1, E):
        given = torch.arange(E).expand(tokens, E)[:, :top_k]
        for choice in (None, given):
            weights, ids = ops.topk_gate(logits, top_k, normal(E), impl, given_TK=choice)
            (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
            assert (weights.shape, ids.shape, gradient.shape) == ((tokens, top_k), (tokens, top_k), (tokens, E))
            assert rel(weights, logits.double().gather(1, ids).softmax(1)) < 1e-6


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n_experts", [2, 5, 16])
def test_ids_are_valid_whatever_the_logits(biased: bool, n_experts: int) -> None:
    """Every pattern of NaN and infinities: different experts that exist, the same in all implementations."""
    g = torch.Generator().manual_seed(0)
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0, 2.0])
    logits = odd[torch.randint(6, (200, n_experts), generator=g)]
    logits[0], logits[1] = math.nan, -math.inf
    bias = normal(n_experts) if biased else None
    for top_k in (1, 2, n_experts):
        weights, ids = ops.topk_gate(logits, top_k, bias, "reference")
        ordered = ids.sort(1).values
        assert (ordered[:, 0] >= 0).all()
        assert (ordered[:, -1] < n_experts).all()
        assert (ordered.diff(dim=1) > 0).all()
        fast_weights, fast_ids = ops.topk_gate(logits, top_k, bias, "triton")
        assert torch.equal(fast_ids, ids)
        assert torch.equal(fast_weights.isnan(), weights.isnan())
        assert rel(fast_weights.nan_to_num(), weights.nan_to_num()) < 1e-6
        if not biased:
            assert logits.isnan().gather(1, ids)[logits.isnan().any(1), 0].all(), "NaN counts as the largest"


# ----------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("wrong", [-1, E, 2**40])
def test_ids_outside_are_named(name: str, wrong: int) -> None:
    for tokens, row in ((T, 3), (1, 0)):
        given = mlp(tokens)
        given["ids_TK"][row, 1] = wrong
        with pytest.raises(ValueError, match=rf"ids = {wrong} in row {row}: must be in \[0, 4\)"):
            MLPS[name](**given)


@pytest.mark.parametrize("impl", EXPERTS)
def test_ids_outside_are_named_by_a_compiled_op(impl: str) -> None:
    given = mlp()
    call = compiled(lambda ids: (ops.expert_mlp(**{**given, "ids_TK": ids}, impl=impl), ids)[0], given["ids_TK"])
    assert rel(call, ops.expert_mlp(**given, impl=impl)) < 1e-6
    with pytest.raises(ValueError, match=r"ids = 4 in row 0"):
        compiled(
            lambda ids: ops.expert_mlp(**{**given, "ids_TK": ids}, impl=impl), given["ids_TK"] + E - given["ids_TK"]
        )


@pytest.mark.parametrize("name", MLPS)
def test_an_expert_named_twice_serves_twice(name: str) -> None:
    for tokens in (1, T):
        twice = mlp(tokens, ids_TK=torch.full((tokens, 2), 3), weights_TK=torch.tensor([[0.5, 0.25]] * tokens))
        once = mlp(tokens, ids_TK=torch.full((tokens, 1), 3), weights_TK=torch.full((tokens, 1), 0.75))
        assert rel(MLPS[name](**twice), MLPS[name](**once)) < 1e-6


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("top_k", [1, E])
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_no_token_one_token_all_experts(name: str, tokens: int, top_k: int) -> None:
    given = mlp(tokens, top_k)
    tensors = ["x_TD", "weights_TK"] if name == "adapters" else ["x_TD", "w_in_EGFD", "w_out_EDF", "weights_TK"]
    if name in [*EXPERTS, "adapters"]:
        given |= {key: given[key].requires_grad_() for key in tensors}
    y = MLPS[name](**given)
    assert y.shape == (tokens, D)
    wide = {k: t.detach().double() if t.is_floating_point() else t for k, t in mlp(tokens, top_k).items()}
    if name == "adapters":
        a = lora.Adapters(*(t.double() for t in adapters()))
        wide["w_in_EGFD"] = lora.merge(wide["w_in_EGFD"], a.a_in_ELD, a.b_in_EGFL, 0.5)
        wide["w_out_EDF"] = lora.merge(wide["w_out_EDF"], a.a_out_ELF, a.b_out_EDL, 0.5)
    leaves = {k: t.detach().requires_grad_() if t.is_floating_point() else t for k, t in wide.items()}
    want = reference.expert_mlp(**leaves, activation="swiglu")
    assert rel(y, want) < 1e-5
    if y.requires_grad:
        got = torch.autograd.grad(y.square().sum(), [given[key] for key in tensors])
        exact = torch.autograd.grad(want.square().sum(), [leaves[key] for key in tensors])
        for key, a, b in zip(tensors, got, exact, strict=True):
            assert rel(a, b) < 1e-5, key


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns cut off": lambda t: torch.cat([t, t[..., :1]], -1)[..., :-1],  # as torch.randn(2, 8, 17)[:, :, :16]
    "the first left out": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
    "every second row": lambda t: torch.stack([t, t * 0], 1).flatten(0, 1)[::2],
    "a middle dimension cut": lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1],
    "stored back to front": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "one row expanded": lambda t: t[:1].expand_as(t),
    "one column expanded": lambda t: t[..., :1].expand_as(t),
    "one value expanded": lambda t: t.flatten()[:1].view([1] * t.ndim).expand_as(t),
}
TYPES = {"reference": [torch.float64, torch.float32, torch.float16, torch.bfloat16], "adapters": [torch.float32]}
TYPES |= {"grouped": [torch.float32, torch.bfloat16], "triton": [torch.float32]}  # bfloat16 is wrong when interpreted


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("name", "dtype"), [pytest.param(n, d, id=f"{n}-{d}") for n, every in TYPES.items() for d in every]
)
def test_any_layout_of_any_argument(name: str, dtype: torch.dtype, view: str) -> None:
    """Each argument, and the gradient that comes, as a view of other memory: values and gradients in float64's."""
    narrow = ["x_TD", "w_in_EGFD", "w_out_EDF", "dy_TD"]
    # Interpreted products take their time; test_experts.py has Triton's other arguments.
    for moved in [*narrow, "weights_TK", "ids_TK"] if name != "triton" else ["w_in_EGFD"]:
        whole = mlp(dy_TD=normal(T, D))
        whole |= {key: whole[key].to(dtype) for key in narrow}
        whole[moved] = VIEWS[view](whole[moved])
        found = []
        for wide in (False, True):
            given = {k: t.double().contiguous() if wide and k != "ids_TK" else t.detach() for k, t in whole.items()}
            run, dy = MLPS["reference" if wide and name != "adapters" else name], given.pop("dy_TD")
            wanted = [k for k in given if k != "ids_TK" and not (name == "adapters" and k.startswith("w_"))]
            given |= {k: given[k].requires_grad_() for k in wanted}
            more = {"adapters": lora.Adapters(*(t.to(dy.dtype) for t in adapters()))} if name == "adapters" else {}
            y = run(**given, **more)
            found.append((y, *torch.autograd.grad(y, [given[k] for k in wanted], dy)))
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 5e-2)  # weights are float32 in all but one
        for got, want in zip(*found, strict=True):
            assert rel(got, want) < tolerance, moved


BAD_MLPS = [
    ({"weights_TK": normal(T, 3)}, r"weights and ids \[T, K\].*\[5, 3\], \[5, 2\]"),
    ({"weights_TK": torch.zeros(T, K, dtype=torch.int64)}, "weights must be floating point; got torch.int64"),
    ({"ids_TK": torch.zeros(T, K, dtype=torch.int32)}, "ids must be int64; got torch.int32"),
    ({"ids_TK": torch.zeros(T, K)}, "ids must be int64; got torch.float32"),
    (
        {"ids_TK": torch.zeros(T, 0, dtype=torch.int64), "weights_TK": torch.zeros(T, 0)},
        "only the number of tokens may",
    ),
    ({"x_TD": torch.zeros(T, D, dtype=torch.int64)}, "x must be floating point; got torch.int64"),
    ({"x_TD": normal(T, D).bfloat16()}, "must have one dtype; got torch.bfloat16, torch.float32, torch.float32"),
    ({"x_TD": normal(T, D + 1)}, r"do not fit together: x \[5, 9\]"),
    ({"w_out_EDF": normal(E, D, F + 1)}, r"do not fit together: .*w_out \[4, 8, 17\]"),
    ({"w_out_EDF": normal(E, D, F).to("meta")}, "must be on one device; got x cpu, w_in cpu, w_out meta"),
    ({"w_in_EGFD": normal(E, 1, F, D)}, "w_in has G = 1, but swiglu needs G = 2"),
]


@pytest.mark.parametrize("how", [eager, faked])
@pytest.mark.parametrize("impl", EXPERTS)
@pytest.mark.parametrize(("change", "complaint"), BAD_MLPS, ids=[str(i) for i in range(len(BAD_MLPS))])
def test_what_experts_refuse(how: Callable[..., Any], impl: str, change: dict[str, Any], complaint: str) -> None:
    given = mlp(**change)
    if how is faked and "device" in complaint:
        complaint = "one device|found two different devices"
    with pytest.raises((ValueError, RuntimeError), match=complaint):
        how(lambda x, w_in, w_out, w, ids: ops.expert_mlp(x, w_in, w_out, w, ids, impl=impl), *given.values())


def test_an_activation_is_one_that_there_is() -> None:
    for name, gates, complaint in (
        ("relu", 2, "activation = 'relu': must be one of swiglu, gelu"),
        ("gelu", 2, "G = 1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ops.activate(normal(T, gates, F), name)
        for call in (ops.expert_mlp, ops.expert_mlp_forward, ops.expert_mlp_inference):
            for tokens in (1, T):
                with pytest.raises(ValueError, match=complaint):
                    call(**mlp(tokens), activation=name)


def test_adapters_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"w_in \[4, 2, 16, 8\] wants adapters .* got \[3, 3, 8\], \[3, 2, 16, 3\]"):
        with_adapters(**mlp(), adapters=adapters(E=3))
    with pytest.raises(ValueError, match="ids must be int64"):
        with_adapters(**mlp(ids_TK=torch.zeros(T, K)))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_biases_in_any_layout(impl: str) -> None:
    """A bias that is a view: transposed, a slice, expanded; values and gradients."""
    given = mlp()
    for make in (
        lambda b: b.mT.contiguous().mT,
        lambda b: torch.cat([b, b], -1)[..., : b.shape[-1]],
        lambda b: b[:1].expand_as(b),
    ):
        biases = {"b_in_EGF": make(normal(E, 2, F)), "b_out_ED": make(normal(E, D, seed=1))}
        leaves: dict[str, Any] = {key: t.detach().requires_grad_() for key, t in biases.items()}
        y = ops.expert_mlp(**given, **leaves, impl=impl)
        wide = {k: t.double() if t.is_floating_point() else t for k, t in given.items()}
        exact = {key: t.detach().double().contiguous().requires_grad_() for key, t in biases.items()}
        want = reference.expert_mlp(**wide, activation="swiglu", **exact)
        assert rel(y, want) < 1e-5
        got = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), list(exact.values())), strict=True):
            assert rel(a, b) < 1e-5


# -------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("wrong", [-1, V, -99, 2**40])
def test_a_target_outside_the_vocabulary_is_named(wrong: int) -> None:
    given = loss()
    given["targets_T"][3] = wrong
    message = rf"target {wrong} of token 3 is outside the vocabulary of 11 ids"
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**given)
    with pytest.raises(ValueError, match=message):
        compiled(lambda x: ops.linear_cross_entropy(x, given["w_VD"], given["targets_T"]), given["x_TD"])


def test_where_looking_would_wait_it_makes_the_loss_nan() -> None:
    """What happens on a GPU: Triton's op, and the other's body, which on a CPU the op does not let it reach."""
    for wrong in (-1, V):
        given = loss()
        given["targets_T"][3] = wrong
        assert ops.linear_cross_entropy(**given, impl="triton").isnan()
        assert chunked.linear_cross_entropy(**given, want_grad=True)[0].isnan()


@pytest.mark.parametrize("impl", LOSSES)
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x_TD": torch.zeros(T, D, dtype=torch.int64)}, "x must be floating point; got torch.int64"),
        ({"w_VD": torch.zeros(V, D, dtype=torch.int8)}, "w must be floating point; got torch.int8"),
        ({"w_VD": torch.zeros(0, D)}, "only the number of tokens may be 0"),
        ({"targets_T": torch.zeros(T)}, "targets must be int64; got torch.float32"),
        ({"targets_T": torch.zeros(T, 1, dtype=torch.int64)}, r"targets \[T\]; got \[5, 8\], \[11, 8\], \[5, 1\]"),
        ({"w_VD": torch.zeros(V, D, device="meta")}, "must be on one device; got x cpu, w meta"),
    ],
)
def test_what_a_loss_refuses(impl: str, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ops.linear_cross_entropy(**loss(**change), impl=impl)


@pytest.mark.parametrize("impl", LOSSES)
def test_a_loss_of_no_token_is_zero(impl: str) -> None:
    given = loss(0)
    x, w = given["x_TD"].requires_grad_(), given["w_VD"].requires_grad_()
    total = ops.linear_cross_entropy(x, w, given["targets_T"], impl)
    dx, dw = torch.autograd.grad(total, (x, w))
    assert total == 0
    assert dx.shape == (0, D)
    assert torch.equal(dw, torch.zeros(V, D))


@pytest.mark.parametrize("impl", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts_of_a_loss(impl: str, dtype: torch.dtype) -> None:
    views = (
        lambda t: torch.cat([t, t[..., :1]], -1)[..., :-1] if t.ndim > 1 else torch.stack([t, t * 0], 1)[:, 0],
        lambda t: t.mT.contiguous().mT if t.ndim > 1 else torch.cat([t[:1], t])[1:],
        lambda t: t[..., :1].expand_as(t),
    )
    for view in views:
        for moved in loss():
            given = {k: t.to(dtype) if t.is_floating_point() else t for k, t in loss().items()}
            given[moved] = view(given[moved])
            x, w = given["x_TD"].detach().requires_grad_(), given["w_VD"].detach().requires_grad_()
            total = ops.linear_cross_entropy(x, w, given["targets_T"], impl)
            dx, dw = torch.autograd.grad(total, (x, w))
            x64, w64 = (t.detach().double().contiguous().requires_grad_() for t in (x, w))
            logits = x64 @ w64.T
            want = torch.nn.functional.cross_entropy(logits, given["targets_T"], reduction="sum")
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            for a, b in zip((total, dx, dw), (want, *torch.autograd.grad(want, (x64, w64))), strict=True):
                assert rel(a, b) < tolerance
