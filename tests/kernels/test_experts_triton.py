"""What only the Triton expert MLP has: weights in place in any layout, biases, recomputation, TMA, many shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.kernels import ops, tiles
from moe.kernels.experts import op, reference
from tests.conftest import rel

fused = pytest.importorskip("moe.kernels.experts.triton_mlp")
triton_pointer = pytest.importorskip("moe.kernels.experts.triton_pointer")
triton_tma = pytest.importorskip("moe.kernels.experts.triton_tma")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def problem(
    T: int, E: int, K: int, D: int, width: int, activation: str, biases: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Float64 inputs of ops.expert_mlp by name; the ids separately chosen, none twice in a token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    G = ops.ACTIVATIONS[activation]
    return {
        "x_TD": normal(T, D),
        "w_in_EGFD": normal(E, G, width, D) / D**0.5,
        "w_out_EDF": normal(E, D, width) / width**0.5,
        "weights_TK": normal(T, K).softmax(-1),
        "b_in_EGF": normal(E, G, width) if biases else None,
        "b_out_ED": normal(E, D) if biases else None,
        "ids_TK": torch.rand(T, E, generator=g).argsort(1)[:, :K],
        "activation": activation,
    }


def results(inputs: dict[str, Any], dtype: torch.dtype, device: str = DEVICE, **settings: Any) -> dict[str, Tensor]:
    """y and every gradient for a fixed upstream gradient."""
    leaves = {}
    for name, t in inputs.items():
        if isinstance(t, Tensor) and t.is_floating_point():
            wide = torch.promote_types(dtype, torch.float32) if name == "weights_TK" else dtype
            leaves[name] = t.detach().to(device, wide).requires_grad_()
    others = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in inputs.items() if n not in leaves}
    y = ops.expert_mlp(**leaves, **others, **settings)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, value in want.items():
        assert rel(got[name], value) < tolerance, f"{name}: {rel(got[name], value):.1e}"


def exact(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Float64 autograd through the reference, outside of the op."""
    leaves = {
        n: t.detach().clone().requires_grad_() for n, t in inputs.items() if n != "ids_TK" and isinstance(t, Tensor)
    }
    y = reference.expert_mlp(**{**inputs, **leaves})
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
def test_activations_and_biases(activation: str, biases: bool, impl: str) -> None:
    inputs = problem(11, 5, 2, 37, 51, activation, biases)
    inputs["x_TD"] *= 5  # beyond gpt-oss's clamps too
    dtype = torch.float64 if impl == "reference" else torch.float32
    assert_close(results(inputs, dtype, impl=impl), exact(inputs), 1e-12 if impl == "reference" else 1e-5)


LAYOUTS = {
    "halves": lambda w: w,
    "transposed halves": lambda w: w.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "pairs": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed pairs": lambda w: w.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
    "gates apart from ups": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_read_where_they_are(layout: str, dtype: torch.dtype) -> None:
    inputs = problem(9, 4, 2, 24, 40, "swiglu")
    want = exact(inputs)
    inputs["w_in_EGFD"] = LAYOUTS[layout](inputs["w_in_EGFD"])
    if "transposed" in layout:
        inputs["w_out_EDF"] = inputs["w_out_EDF"].transpose(1, 2).contiguous().transpose(1, 2)
    kept, pairs = triton_pointer._gate_layout(inputs["w_in_EGFD"])
    assert (kept is inputs["w_in_EGFD"]) == (layout != "gates apart from ups")
    assert pairs == ("pairs" in layout)
    assert_close(results(inputs, dtype, impl="triton"), want, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_recomputing_gives_the_same_bits_and_keeps_no_pre_activations(activation: str) -> None:
    inputs = problem(13, 4, 2, 24, 40, activation)
    kept, again = (results(inputs, torch.float16, impl="triton", recompute=r) for r in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    x, w_in, w_out = (inputs[n].to(DEVICE, torch.float32) for n in ("x_TD", "w_in_EGFD", "w_out_EDF"))
    weights, ids = inputs["weights_TK"].float().to(DEVICE), inputs["ids_TK"].to(DEVICE)
    assert op._expert_mlp(x, w_in, w_out, weights, ids, None, None, activation, "triton", True)[1].numel() == 0


def test_which_operands_go_through_tma() -> None:
    def fits(D: int = 24, width: int = 40, dtype: torch.dtype = torch.float16, **change: Any) -> bool:
        experts = triton_pointer.Experts(
            torch.zeros(4, 2, width, D, dtype=dtype), torch.zeros(4, D, width, dtype=dtype)
        )
        return triton_tma.fits(torch.zeros(9, D, dtype=dtype), experts._replace(**change))

    assert fits()
    assert fits(dtype=torch.bfloat16)
    assert not fits(dtype=torch.float32)
    assert not fits(D=20)
    assert not fits(width=44)
    assert not fits(w_out_EDF=torch.zeros(4, 40, 24, dtype=torch.float16).transpose(1, 2))
    assert not fits(b_out_ED=torch.zeros(4, 24, dtype=torch.float16))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("T", "E", "K", "used"), [(1, 16, 2, 16), (50, 16, 1, 1), (40, 16, 2, 2), (37, 7, 7, 7)])
def test_tma_and_pointers_agree(
    T: int, E: int, K: int, used: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(T, E, K, 40, 56, activation)
    inputs["ids_TK"] = torch.rand(T, used, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :K]
    tma = results(inputs, torch.float16, impl="triton")
    monkeypatch.setattr(triton_tma, "fits", lambda *_: False)
    pointer = results(inputs, torch.float16, impl="triton")
    want = exact(inputs)
    assert_close(tma, want, TOLERANCE[torch.float16])
    assert_close(pointer, want, TOLERANCE[torch.float16])


@given(
    T=st.integers(0, 20),
    E=st.integers(1, 6),
    D=st.integers(1, 40),
    width=st.integers(1, 40),
    activation=st.sampled_from(list(ops.ACTIVATIONS)),
    data=st.data(),
)
@settings(max_examples=12)
def test_any_shape(T: int, E: int, D: int, width: int, activation: str, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, min(E, 3)), "K")
    inputs = problem(T, E, K, D, width, activation, data.draw(st.booleans(), "biases"))
    if data.draw(st.booleans(), "an expert may be chosen twice"):
        inputs["ids_TK"] = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(T))
    # Not relative to each gradient alone: a single number may cancel to nothing.
    got, want = results(inputs, torch.float32, impl="triton"), exact(inputs)
    scale = max([v.norm().item() for v in want.values()], default=0.0)
    for name, value in want.items():
        assert (got[name].cpu().double() - value).norm().item() <= 1e-5 * max(scale, 1e-30), name


def test_one_expert_takes_all_and_the_others_get_zeros() -> None:
    inputs = problem(30, 16, 1, 24, 40, "swiglu", biases=True)
    inputs["ids_TK"] = torch.full((30, 1), 11)
    got = results(inputs, torch.float32, impl="triton")
    assert_close(got, exact(inputs), 1e-5)
    for name in ("w_in_EGFD", "w_out_EDF", "b_in_EGF", "b_out_ED"):
        assert not got[name][:11].any()
        assert got[name][11].norm() > 0


# ------------------------------------------------------------------------------------------------------------- tiles


def test_shape_classes() -> None:
    assert [tiles.shape_class(r, 16) for r in (2, 256, 257, 1024, 1025)] == ["few", "few", "some", "some", "many"]
