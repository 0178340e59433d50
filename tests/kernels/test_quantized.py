"""Numbers of eight bits: how far they are off at most, and the expert MLP computed from them, against float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.kernels import ops
from moe.kernels.experts import inference, reference
from moe.kernels.experts.quantized import QuantizedExperts, quantize_experts
from moe.kernels.quantization import LARGEST, quantize
from tests.conftest import rel
from tests.kernels.calls import compiled, faked, mlp, normal, on_meta

IMPLS = ["reference", "triton"]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = list(LARGEST)


def bound(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a number may be off: half a step; of e4m3 half of a step of 2^-3 of its power of two, 2^-9 at least."""
    scale = scale.double().unsqueeze(-1)
    if dtype == torch.int8:
        return scale / 2
    return torch.maximum(x.double().abs() / 16, scale / 1024)


@pytest.mark.parametrize("dtype", NARROW)
@given(exponent=st.integers(-30, 30), width=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_no_number_is_further_off_than_said(dtype: torch.dtype, exponent: int, width: int, seed: int) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(seed)) ** 3 * 2.0**exponent
    data, scale = quantize(x, dtype)
    assert data.dtype == dtype
    assert scale.shape == (4,)
    error = (data.double() * scale.double().unsqueeze(-1) - x.double()).abs()
    assert (error <= bound(x, scale, dtype) * (1 + 1e-5)).all()
    # The scale is not larger than it must be.
    assert torch.allclose(data.float().abs().amax(-1), torch.tensor(LARGEST[dtype]))


def test_int8_is_symmetric_and_keeps_its_own_numbers() -> None:
    x = torch.arange(-127.0, 128.0)
    data, scale = quantize(torch.stack([x, x / 8, -x]))
    assert torch.equal(data[0].float(), x)
    assert torch.equal(data[1], data[0])
    assert torch.equal(data[2], -data[0])
    assert scale.tolist() == [1.0, 0.125, 1.0]


@pytest.mark.parametrize("dtype", NARROW)
def test_zeros_tiny_numbers_and_what_is_no_number(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [1.0, torch.nan], [torch.inf, 1.0]])
    data, scale = quantize(x, dtype)
    back = data.float() * scale.unsqueeze(-1)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert not back[:2].any()
    assert not scale[2:].isfinite().any()
    assert not back[2:].isfinite().any()


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype = torch.int16: must be one of torch.int8, torch.float8_e4m3fn"):
        quantize(torch.zeros(2, 2), torch.int16)


# ---------------------------------------------------------------------------------------------------------- the experts


def problem(T: int, E: int, K: int, D: int, width: int, activation: str, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    w_in = torch.randn(E, ops.ACTIVATIONS[activation], width, D, generator=g) / D**0.5
    w_out = torch.randn(E, D, width, generator=g) / width**0.5
    return {
        "x_TD": torch.randn(T, D, generator=g),
        "experts": quantize_experts(w_in, w_out, dtype),
        "weights_TK": torch.rand(T, K, generator=g),
        "ids_TK": torch.rand(T, E, generator=g).argsort(1)[:, :K],
        "activation": activation,
        "as_they_were": (w_in, w_out),
    }


def wanted(x_TD: Tensor, experts: QuantizedExperts, weights_TK: Tensor, ids_TK: Tensor, activation: str) -> Tensor:
    """In float64, from the weights that the eight bits stand for."""
    w_in, w_out = (
        data.double() * scale.double().unsqueeze(-1)
        for data, scale in ((experts.w_in_EGFD, experts.s_in_EGF), (experts.w_out_EDF, experts.s_out_ED))
    )
    return reference.expert_mlp(x_TD.double(), w_in, w_out, weights_TK.double(), ids_TK, activation)


def call(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **changes: Any) -> Tensor:
    given = {**inputs, **changes}
    x, weights, ids = (given.pop(n).to(DEVICE) for n in ("x_TD", "weights_TK", "ids_TK"))
    experts = QuantizedExperts(*(t.to(DEVICE) for t in given.pop("experts")))
    return ops.expert_mlp_quantized(x.to(dtype), experts, weights, ids, **given).cpu()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("activation", "kept"), [("swiglu", torch.int8), ("gelu", torch.float8_e4m3fn), ("swiglu_oai", torch.float8_e4m3fn)]
)
def test_against_float64(activation: str, kept: torch.dtype, impl: str) -> None:
    inputs = problem(5, 3, 2, 37, 51, activation, kept)
    w_in, w_out = inputs.pop("as_they_were")
    want = wanted(**inputs)
    assert rel(call(inputs, impl=impl), want) < 1e-6
    assert rel(call(inputs, torch.float16, impl=impl), want) < 2e-3
    # What eight bits cost: a step is 1/127 of the largest weight, or 1/8 of the weight's own power of two.
    x, w_in, w_out, weights = (t.double() for t in (inputs["x_TD"], w_in, w_out, inputs["weights_TK"]))
    loss = rel(want, reference.expert_mlp(x, w_in, w_out, weights, inputs["ids_TK"], activation))
    assert 1e-3 < loss < (2e-2 if kept == torch.int8 else 8e-2)


@pytest.mark.parametrize("kept", NARROW)
def test_many_tokens_go_through_the_large_products(kept: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    few = pytest.importorskip("moe.kernels.experts.triton_few")
    inputs = problem(66, 2, 1, 24, 20, "swiglu", kept)
    del inputs["as_they_were"]
    monkeypatch.setattr(few, "_forward", None)
    assert rel(call(inputs, impl="triton"), wanted(**inputs)) < 1e-6


def test_bfloat16_and_float64_in_plain_torch() -> None:
    inputs = problem(7, 5, 2, 37, 51, "swiglu", torch.int8)
    del inputs["as_they_were"]
    assert rel(call(inputs, torch.bfloat16, impl="reference"), wanted(**inputs)) < 1e-2
    assert rel(call(inputs, torch.float64, impl="reference"), wanted(**inputs)) < 1e-12


def test_no_tokens() -> None:
    inputs = problem(0, 5, 2, 37, 51, "swiglu", torch.int8)
    del inputs["as_they_were"]
    for impl in IMPLS:
        assert call(inputs, impl=impl).shape == (0, 37)


def test_weights_that_are_not_finite_are_named() -> None:
    w_in, w_out = normal(3, 2, 8, 4), normal(3, 4, 8)
    w_out[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="the weights of expert 1 are not all finite"):
        quantize_experts(w_in, w_out)


# ---------------------------------------------------------------------------------------------------------- as torch op


def arguments() -> tuple[Tensor, ...]:
    given = mlp()
    experts = quantize_experts(given["w_in_EGFD"], given["w_out_EDF"])
    return given["x_TD"], *experts, given["weights_TK"], given["ids_TK"]


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_compiled_and_without_values(impl: str) -> None:
    given = arguments()

    def quantized(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return ops.expert_mlp_quantized(x, QuantizedExperts(a, b, c, d), weights, ids, "swiglu", impl)

    torch.library.opcheck(inference.expert_mlp_inference, (*given, "swiglu", impl, False))
    assert torch.equal(compiled(quantized, *given), quantized(*given))
    assert faked(quantized, *given).shape == given[0].shape
    if impl == "reference":
        assert on_meta(quantized, *given).shape == given[0].shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "grouped"}, 'impl = \'grouped\': must be "reference" or "triton"'),
        ({"x_TD": torch.zeros(5, 7)}, "shapes do not fit together"),
        ({"w_in_EGFD": torch.zeros(4, 2, 16, 8)}, "w_in torch.float32 and w_out torch.int8: must both be one of"),
        ({"s_in_EGF": torch.ones(4, 2, 15)}, "must have one scale for each output channel"),
        ({"ids_TK": torch.full((5, 2), 4)}, r"ids = 4 in row 0: must be in \[0, 4\)"),
        ({"batch_invariant": True}, "batch_invariant = True needs the Triton kernels; this is reference"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    x, *experts, weights, ids = arguments()
    given = {"x_TD": x, "weights_TK": weights, "ids_TK": ids, "activation": "swiglu", "impl": "reference"}
    kept = QuantizedExperts(*experts)
    kept = kept._replace(**{name: t for name, t in changes.items() if name in kept._fields})
    given |= {name: value for name, value in changes.items() if name not in kept._fields}
    with pytest.raises(ValueError, match=message):
        ops.expert_mlp_quantized(experts=kept, **given)
