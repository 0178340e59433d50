"""The expert kernels for few tokens: against float64, on bits, and how a product is cut."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.kernels import ops, tiles
from moe.kernels.experts import inference, reference
from tests.conftest import rel
from tests.kernels.calls import mlp

triton_few = pytest.importorskip("moe.kernels.experts.triton_few")
triton_routes = pytest.importorskip("moe.kernels.experts.triton_routes")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


class Case:
    """Tokens, and experts that serve them."""

    def __init__(self, T: int, E: int, K: int, D: int, width: int, activation: str = "swiglu", seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x_TD, self.activation = torch.randn(T, D, generator=g), activation
        self.w_in = torch.randn(E, ops.ACTIVATIONS[activation], width, D, generator=g) / D**0.5
        self.w_out = torch.randn(E, D, width, generator=g) / width**0.5
        self.weights_TK = torch.rand(T, K, generator=g)
        self.ids_TK = torch.rand(T, E, generator=g).argsort(1)[:, :K]

    def call(
        self, rows: Any = slice(None), dtype: torch.dtype = torch.float32, batch_invariant: bool = False
    ) -> Tensor:
        """The kernels, on these rows."""
        x, w_in, w_out = (t.to(DEVICE, dtype) for t in (self.x_TD[rows], self.w_in, self.w_out))
        weights, ids = self.weights_TK[rows].to(DEVICE), self.ids_TK[rows].to(DEVICE)
        given = (x, w_in, None, w_out, None, weights, ids, self.activation, "triton", batch_invariant)
        return inference.forward(*given).cpu()

    def wanted(self) -> Tensor:
        x, w_in, w_out, weights = (t.double() for t in (self.x_TD, self.w_in, self.w_out, self.weights_TK))
        return reference.expert_mlp(x, w_in, w_out, weights, self.ids_TK, self.activation)


@pytest.mark.parametrize(("T", "activation"), [(1, "swiglu"), (17, "swiglu"), (3, "gelu"), (3, "swiglu_oai")])
def test_against_float64(T: int, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(T, 4, 2, 133, 20, activation)  # in two splits
    monkeypatch.setattr("moe.kernels.experts.triton_mlp.forward", None)
    for batch_invariant in (False, True):
        assert rel(case.call(batch_invariant=batch_invariant), case.wanted()) < 1e-6
    if T == 1:
        assert rel(case.call(dtype=torch.float16), case.wanted()) < 2e-3


@given(
    T=st.integers(0, 12),
    E=st.integers(1, 6),
    D=st.integers(1, 150),
    width=st.integers(1, 70),
    activation=st.sampled_from(list(ops.ACTIVATIONS)),
    batch_invariant=st.booleans(),
    data=st.data(),
)
@settings(max_examples=6)
def test_any_shape(
    T: int, E: int, D: int, width: int, activation: str, batch_invariant: bool, data: st.DataObject
) -> None:
    case = Case(T, E, data.draw(st.integers(1, min(E, 3)), "K"), D, width, activation)
    if data.draw(st.booleans(), "an expert may be chosen twice"):
        case.ids_TK = torch.randint(E, case.ids_TK.shape, generator=torch.Generator().manual_seed(T))
    # Not relative to the result alone: a single number may cancel to nothing.
    scale = case.weights_TK.norm() * max(1.0, case.wanted().norm())
    assert (case.call(batch_invariant=batch_invariant).double() - case.wanted()).norm() <= 1e-5 * scale


def test_an_expert_takes_all() -> None:
    case = Case(20, 16, 2, 64, 40)
    case.ids_TK = torch.tensor([3, 11]).expand(20, 2)
    assert rel(case.call(), case.wanted()) < 1e-6


@pytest.mark.parametrize("rows", [16, 32])
def test_weights_are_read_once_for_each_expert_touched(rows: int) -> None:
    """A program reads its part of an expert's weights for a tile of rows, and as long as these fit one there is one."""
    ids = torch.tensor([[3, 11], [11, 3]]).repeat(rows // 2, 1).to(DEVICE)
    routes, _ = triton_routes.route(ids, 16, rows)
    assert routes.n_tiles.item() == 2
    assert routes.tile_expert_M[:3].tolist() == [3, 11, -1]


# ------------------------------------------------------------------------------------------------------------- on bits


def differences(case: Case, dtype: torch.dtype = torch.float32) -> list[str]:
    """Where a token's bits depend on what is computed with it."""
    whole, found = case.call(dtype=dtype, batch_invariant=True), []
    for rows in ([3], [4, 0, 2]):
        if not torch.equal(case.call(rows, dtype, batch_invariant=True), whole[rows]):
            found.append(f"rows {rows}")
    return found


@pytest.mark.usefixtures("_even_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    assert differences(Case(5, 3, 2, 133, 12), dtype) == []


@pytest.mark.usefixtures("_even_products")
def test_a_token_has_the_same_bits_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(5, 3, 2, 133, 12)
    whole = case.call(batch_invariant=True)
    monkeypatch.setattr(triton_few, "_CHUNK", 2)
    assert torch.equal(case.call(batch_invariant=True), whole)


@pytest.mark.usefixtures("_even_products")
def test_splits_by_the_number_of_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills the device best for each batch: the test above must see it."""
    case, real, tokens = Case(5, 3, 2, 133, 12), triton_few.split, [0]

    def variant(*given: int) -> int:
        return real(*given) if tokens[0] > 1 else 16

    forward = triton_few._forward

    def counted(x_TD: Tensor, *given: Any) -> Tensor:
        tokens[0] = len(x_TD)
        return forward(x_TD, *given)

    monkeypatch.setattr(triton_few, "split", variant)
    monkeypatch.setattr(triton_few, "_forward", counted)
    assert differences(case)


def test_twice_the_same_bits() -> None:
    case = Case(5, 3, 2, 133, 12)
    assert torch.equal(case.call(), case.call())


def test_invariance_where_it_cannot_be_is_refused() -> None:
    if GPU:
        pytest.skip("the Triton kernels run here")
    with pytest.raises(ValueError, match="batch_invariant = True needs contiguous weights and the Triton kernels"):
        ops.expert_mlp_inference(**mlp(), activation="swiglu", batch_invariant=True)


# ------------------------------------------------------------------------------------------------- how a product is cut


@pytest.mark.parametrize(
    ("depth", "num_n", "step", "multiprocessors", "splits"),
    [
        (10752, 896, 128, 132, 1),  # full width, up: 896 programs for one expert
        (28672, 168, 128, 132, 2),  # down: 168 programs, twice
        (2048, 12, 128, 132, 4),  # replica-1b: four steps each are the least
        (100, 1, 128, 132, 1),
    ],
)
def test_how_deep_a_program_sums(depth: int, num_n: int, step: int, multiprocessors: int, splits: int) -> None:
    extent = triton_few.split(depth, num_n, step, multiprocessors)
    assert extent % step == 0
    assert -(-depth // extent) == splits


def test_the_rows_of_a_tile() -> None:
    half, wide = torch.bfloat16, torch.float32
    assert [tiles.few_rows(half, T, False) for T in (1, 2, 16, 17, 64)] == [1, 16, 16, 32, 32]
    assert {tiles.few_rows(half, T, True) for T in (1, 2, 17, 4096)} == {64}
    assert {tiles.few_rows(wide, T, True) for T in (1, 2, 17, 4096)} == {16}
