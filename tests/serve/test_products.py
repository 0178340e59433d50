"""Products with packed and with eight-bit weights, and the experts made of them, against float64."""

from typing import Any

import pytest
import torch

from moe.config import ExpertsConfig
from moe.experts import Experts
from moe.kernels import ops
from moe.kernels.experts import reference
from moe.kernels.quantization import quantize
from moe.serve import products
from moe.serve.products import CpuExperts, int8_product, product
from tests.conftest import rel


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(61, 24), (33, 65), (128, 96)])
@pytest.mark.parametrize("tile", [0, 4])
def test_products_are_those_of_float64(dtype: torch.dtype, outputs: int, inputs: int, tile: int) -> None:
    w_OI = drawn(outputs, inputs).to(dtype)
    multiply = product(w_OI, tile)
    for rows in (1, 2, 7, 50, 1, 3, 40, 1):
        x_TI = drawn(rows, inputs, seed=rows).to(dtype)
        y_TO = multiply(x_TI)
        assert y_TO.dtype == dtype
        assert rel(y_TO, x_TI.double() @ w_OI.double().t()) < TOLERANCE[dtype]


def test_a_packed_weight_is_a_copy() -> None:
    """So that a runner's results do not change in the middle of an answer."""
    w_OI, x_TI = drawn(16, 8).float(), drawn(3, 8).float()
    multiply = product(w_OI)
    before = multiply(x_TI)
    w_OI.zero_()
    assert torch.equal(multiply(x_TI), before)
    assert before.any()


@pytest.mark.parametrize("tile", [0, 8])
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 40])
def test_eight_bit_products_lose_what_rounding_to_eight_bits_loses(rows: int, tile: int) -> None:
    w_OI, x_TI = drawn(50, 96), drawn(rows, 96, seed=1).float()
    data, scale = quantize(w_OI)
    y_TO = int8_product(data, scale, tile)(x_TI)
    assert y_TO.dtype == torch.float32
    # Of the rounded weights: bfloat16's 8 bits of x, of the scale and of y.
    assert rel(y_TO, x_TI.double() @ (data.double() * scale.double().unsqueeze(1)).t()) < 6e-3
    # Of the weights themselves: uniform errors of a step, whose size is the largest of 96 normal numbers over 127.
    assert rel(y_TO, x_TI.double() @ w_OI.t()) < 1.5e-2


def layer(activation: Any, top_k: int, dtype: torch.dtype) -> Experts:
    experts = Experts(24, ExpertsConfig(n_experts=5, top_k=top_k, d_ff=20, activation=activation)).to(dtype)
    for seed, p in enumerate(experts.parameters()):
        p.data = (drawn(*p.shape, seed=seed) / p.shape[-1] ** 0.5).to(dtype)
    return experts


def routed(rows: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK, ids_TK = ops.topk_gate(drawn(rows, 5, seed=3).float(), top_k)
    return weights_TK, ids_TK


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize(("activation", "top_k"), [("swiglu", 2), ("gelu", 1), ("gelu", 3), ("swiglu", 5)])
@pytest.mark.parametrize("tile", [0, 4])
def test_experts_are_the_reference(rows: int, activation: str, top_k: int, tile: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        experts, x_TD = layer(activation, top_k, dtype), drawn(rows, 24, seed=7).to(dtype)
        weights_TK, ids_TK = routed(rows, top_k)
        weights_TK = weights_TK.to(torch.promote_types(dtype, torch.float32))
        run = CpuExperts(experts, tile=tile)
        run.patience = 0
        got = run(x_TD, weights_TK, ids_TK)
        w_in, w_out = (p.detach().double() for p in (experts.w_in_EGFD, experts.w_out_EDF))
        want = reference.expert_mlp(x_TD.double(), w_in, w_out, weights_TK.double(), ids_TK, activation)
        assert got.dtype == dtype
        assert rel(got, want) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 4, 200])
def test_eight_bit_experts_are_the_reference_of_rounded_weights(rows: int) -> None:
    experts, x_TD = layer("swiglu", 2, torch.float32), drawn(rows, 24, seed=7).float()
    weights_TK, ids_TK = routed(rows, 2)
    rounded = ops.quantize_experts(experts.w_in_EGFD.detach(), experts.w_out_EDF.detach())
    want = ops.expert_mlp_quantized(x_TD.double(), rounded, weights_TK.double(), ids_TK, "swiglu", "reference")
    assert rel(CpuExperts(experts, "int8")(x_TD, weights_TK, ids_TK), want) < 1e-2


@pytest.mark.parametrize("rows", [1, 3])
def test_before_and_after_packing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is packed after some products of several rows; the products stay the same, and so do the experts."""
    packings: list[int] = []
    monkeypatch.setattr(products, "SMALL", 0)
    pack = products.packed
    monkeypatch.setattr(products, "packed", lambda w_OI: packings.append(1) or pack(w_OI))
    w_OI, x_TI = drawn(16, 8).float(), drawn(rows, 8).float()
    multiply = product(w_OI)
    found = [multiply(x_TI) for _ in range(products.PATIENCE + 2)]
    assert max(rel(y_TO, x_TI.double() @ w_OI.double().t()) for y_TO in found) < 1e-6
    assert len(packings) == (rows > 1)

    experts, x_TD = layer("swiglu", 2, torch.float32), drawn(12 * rows, 24, seed=7).float()
    weights_TK, ids_TK = routed(12 * rows, 2)
    run = CpuExperts(experts)
    first, *later = (run(x_TD, weights_TK, ids_TK) for _ in range(products.PATIENCE + 2))
    assert max(rel(y_TD, first) for y_TD in later) < 1e-6
    many = (ids_TK.flatten().bincount() > products.FEW_ROWS).sum().item()
    assert len(packings) == (rows > 1) + 2 * many
