"""The grouped products one by one: which rows they write, in which order, and for which programs."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.kernels import ops, tiles
from tests.conftest import rel

triton_mlp = pytest.importorskip("moe.kernels.experts.triton_mlp")
triton_pointer = pytest.importorskip("moe.kernels.experts.triton_pointer")
triton_routes = pytest.importorskip("moe.kernels.experts.triton_routes")
triton_tma = pytest.importorskip("moe.kernels.experts.triton_tma")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = pytest.mark.parametrize("products", [triton_pointer, triton_tma], ids=["pointer", "tma"])
D, WIDTH = 40, 56


def normal(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, torch.float16)


def sizes_of(products: ModuleType) -> tiles.Tiles:
    return tiles._INTERPRETER_TMA if products is triton_tma else tiles._INTERPRETER


def routed(counts: list[int], tile_rows: int) -> Any:
    """Routes of one slot a token; expert e has counts[e] of them, and every token is where its row is."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).view(-1, 1)
    return triton_routes.cut(*triton_routes.place(ids.to(DEVICE), len(counts)), tile_rows)


COUNTS = [[0, 17, 33, 1], [16, 0, 0, 35], [40, 3, 0], [0, 0, 50, 0, 0], [0], [1] * 11]


# Two tiles of a's columns by three of b's: six of every expert. A program may have none of them, some or all.
@pytest.mark.parametrize(("programs", "split"), [(1, 2), (5, 1), (67, 2)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_weight_gradients_of_experts_with_and_without_rows(
    counts: list[int], programs: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "programs", lambda device: programs)
    sizes = tiles._INTERPRETER_TMA
    sizes = replace(sizes, dw=replace(sizes.dw, split=split))
    a, b = normal(sum(counts), 40), normal(sum(counts), 72, seed=1)
    if not sum(counts):  # TMA takes no empty tensors: see `fits`
        a, b = normal(1, 40), normal(1, 72, seed=1)
    routes = routed(counts, sizes.rows)
    got, again = (triton_tma.weight_gradient(a, b, routes, 1, len(counts), sizes, "b") for _ in range(2))
    assert torch.equal(got, again)
    ends = torch.tensor(counts).cumsum(0).tolist()
    want = [a[end - n : end].double().T @ b[end - n : end].double() for n, end in zip(counts, ends, strict=True)]
    assert rel(got, torch.stack(want)) < 1e-3
    assert not got[torch.tensor(counts) == 0].any()


@MODULES
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_tile_writes_only_the_rows_of_its_expert(products: ModuleType, activation: str) -> None:
    """Of 16 rows of the first tile the first expert has 3. What nothing has written is NaN."""
    counts, G = [3, 20], ops.ACTIVATIONS[activation]
    sizes, R = sizes_of(products), sum(counts)
    routes = routed(counts, sizes.rows)
    # The first tile only: those that follow would hide what it writes past its expert's end.
    routes = routes._replace(
        tile_expert_M=routes.tile_expert_M[:1],
        tile_row_M=routes.tile_row_M[:1],
        n_tiles=torch.ones_like(routes.n_tiles),
    )
    experts = triton_pointer.Experts(normal(2, G, WIDTH, D), normal(2, D, WIDTH))
    x, act, h, weights = normal(R, D), normal(R, WIDTH), normal(R, G * WIDTH), torch.ones(R, 1, device=DEVICE)
    written = [
        *products.up(x, experts, routes, 1, activation, sizes, True, True),
        products.down(act, experts, routes, sizes),
        products.dx(h, experts, routes, sizes),
        *products.down_backward(x, experts, weights, h, routes, activation, sizes),
    ]
    for t in written:
        assert len(t) == R
        assert t[:3].isfinite().all()
        assert t[3:].isnan().all()


@MODULES
@pytest.mark.parametrize("layout", ["halves", "pairs"])
@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
def test_pieces_of_the_backward_epilogue_change_nothing(products: ModuleType, layout: str, activation: str) -> None:
    counts, G = [0, 19, 7], ops.ACTIVATIONS[activation]
    if layout == "pairs" and (G == 1 or products is triton_tma):
        pytest.skip("pairs have a gate, and go through pointers")
    sizes, R = sizes_of(products), sum(counts)
    routes = routed(counts, sizes.rows)
    w_in = normal(3, G, WIDTH, D)
    if layout == "pairs":
        w_in = w_in.transpose(1, 2).contiguous().transpose(1, 2)
    experts = triton_pointer.Experts(w_in, normal(3, D, WIDTH, seed=1))
    dy, h, weights = normal(R, D, seed=2), 4 * normal(R, G * WIDTH, seed=3), torch.rand(R, 1, device=DEVICE)

    def backward(split: int) -> list[Tensor]:
        pieces = replace(sizes, down_backward=replace(sizes.down_backward, split=split))
        return products.down_backward(dy, experts, weights, h, routes, activation, pieces)

    want = backward(1)
    for split in (2, 4):
        dh, act, dweights = backward(split)
        assert torch.equal(dh, want[0])
        assert torch.equal(act, want[1])
        assert rel(dweights, want[2]) < 1e-6


def test_dh_of_weights_in_pairs_is_in_pairs() -> None:
    counts, sizes = [5, 0, 18], tiles._INTERPRETER
    routes = routed(counts, sizes.rows)
    w_in, w_out = normal(3, 2, 37, D), normal(3, D, 37, seed=1)
    in_pairs = w_in.transpose(1, 2).contiguous().transpose(1, 2)
    dy, h, weights = normal(23, D, seed=2), normal(23, 74, seed=3), torch.rand(23, 1, device=DEVICE)
    found = [
        triton_pointer.down_backward(dy, triton_pointer.Experts(w, w_out), weights, h, routes, "swiglu", sizes)
        for w in (w_in, in_pairs)
    ]
    halves, pairs = found[0][0], found[1][0]
    assert torch.equal(pairs.view(23, 37, 2).transpose(1, 2).reshape(23, 74), halves)
    dx = [
        triton_pointer.dx(dh, triton_pointer.Experts(w, w_out), routes, sizes)
        for dh, w in ((halves, w_in), (pairs, in_pairs))
    ]
    assert rel(dx[1], dx[0]) < 1e-3
    dw = [
        triton_pointer.weight_gradient(dh, dy, routes, 1, 3, sizes, "b", order)
        for dh, order in ((halves, False), (pairs, True))
    ]
    assert rel(dw[1], dw[0]) < 1e-3
