"""The gate and the placement of rows in Triton, against the reference and a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.kernels import ops
from moe.kernels.gate import op as gate_op
from moe.kernels.gate import reference as gate_reference
from tests.conftest import rel

routing = pytest.importorskip("moe.kernels.experts.triton_routes")
triton_gate = pytest.importorskip("moe.kernels.gate.triton_gate")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 16, 2), (17, 7, 3), (300, 16, 2), (33, 64, 8), (5, 1, 1), (9, 16, 16), (0, 4, 2)]  # T, E, K


def logits(T: int, E: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check_place(ids: torch.Tensor, E: int, tile_rows: int) -> None:
    """Against torch's stable sort, and tiles written out by hand; in one launch, where it may be one, the same bits."""
    routes = routing.cut(*routing.place(ids, E), tile_rows)
    fused, both = routing.route(ids, E, tile_rows)
    assert all(torch.equal(a, b) for a, b in zip(fused, routes, strict=True))
    assert torch.equal(both, torch.stack([routes.order_R, routes.inverse_R]))
    order = ids.flatten().sort(stable=True).indices
    assert torch.equal(routes.order_R.long(), order)
    assert torch.equal(routes.inverse_R.long()[order], torch.arange(ids.numel(), device=ids.device))
    load = [int((ids == e).sum()) for e in range(E)]
    assert routes.offsets.tolist() == [sum(load[:e]) for e in range(E + 1)]
    want = [(e, sum(load[:e]) + row) for e in range(E) for row in range(0, load[e], tile_rows)]
    got = list(zip(routes.tile_expert_M.tolist(), routes.tile_row_M.tolist(), strict=True))
    assert got[: len(want)] == want
    assert all(e == -1 for e, _ in got[len(want) :])
    if ids.numel():
        assert routes.n_tiles.item() == len(want)


@pytest.mark.parametrize(("T", "E", "K"), SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_gate_equals_the_reference(T: int, E: int, K: int, biased: bool) -> None:
    x, bias = logits(T, E), 0.1 * logits(1, E, seed=1)[0] if biased else None
    weights, ids = triton_gate.gate(x, K, bias)
    want = x.double().requires_grad_()
    want_weights, want_ids = gate_reference.topk_gate(want, K, None if bias is None else bias.double())
    assert torch.equal(ids, want_ids)
    assert rel(weights, want_weights) < 1e-6
    if T:
        dweights = logits(T, K, seed=2)
        want_gradient = torch.autograd.grad(want_weights, want, dweights.double())[0]
        assert rel(triton_gate.gate_backward(dweights, weights, ids, E), want_gradient) < 1e-5 * (K + 1)
    check_place(ids, E, 16)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_choice_that_is_given_is_weighed_to_the_same_bits(impl: str, biased: bool) -> None:
    x, bias = logits(40, 16).requires_grad_(), logits(1, 16, seed=1)[0] if biased else None
    weights, ids = ops.topk_gate(x, 3, bias, impl)
    again, same = ops.topk_gate(x, 3, bias, impl, given_TK=ids)
    assert torch.equal(same, ids)
    assert torch.equal(again, weights)
    d = logits(40, 3, seed=2)
    assert torch.equal(torch.autograd.grad(again, x, d)[0], torch.autograd.grad(weights, x, d)[0])


def test_any_choice_is_weighed_by_its_logits() -> None:
    x = logits(33, 8)
    ids = torch.rand(33, 8, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :4].to(DEVICE)
    weights, same = triton_gate.gate(x, 4, None, ids)
    assert torch.equal(same, ids)
    assert rel(weights, x.double().gather(1, ids).softmax(-1)) < 1e-6
    check_place(ids, 8, 16)
    with pytest.raises(ValueError, match=r"given_TK must be int64 \[33, 2\]; got torch.int64 \[33, 4\]"):
        ops.topk_gate(x, 2, given_TK=ids)


def test_ties_go_to_the_lower_expert_and_masked_experts_come_last() -> None:
    inf = float("inf")
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 1.0], [-inf, 3.0, -inf, -inf], [-inf] * 3 + [0.0]])
    _, ids = triton_gate.gate(x.to(DEVICE), 2)
    assert ids.tolist() == [[0, 1], [1, 2], [1, 0], [3, 0]]


def test_gate_of_rows_apart_in_memory() -> None:
    x = logits(20, 40)[:, :16]
    assert torch.equal(triton_gate.gate(x, 2)[1], triton_gate.gate(x.contiguous(), 2)[1])
    x = logits(16, 20).t()
    assert torch.equal(triton_gate.gate(x, 2)[1], triton_gate.gate(x.contiguous(), 2)[1])


@pytest.mark.parametrize("T", [128, 129, 512, 513])
def test_blocks_of_one_program_and_of_many(T: int) -> None:
    """16 experts: 128 tokens a block, and up to four blocks are one program's."""
    ids = torch.randint(16, (T, 2), generator=torch.Generator().manual_seed(T)).to(DEVICE)
    check_place(ids, 16, 32)
    check_place(torch.full_like(ids, 15), 16, 32)


def test_ids_of_32_bits_and_apart_in_memory() -> None:
    ids = torch.randint(7, (40, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_place(ids.int(), 7, 16)
    check_place(ids.t().contiguous().t(), 7, 16)
    check_place(ids[1:, :2], 7, 16)


def test_more_rows_than_a_tensor_map_counts() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2)
    with pytest.raises(ValueError, match=r"ids \[1073741824, 2\]: 2,147,483,648 routed rows, at most 1,073,741,824"):
        routing.route(ids, 4, 16)


@given(
    T=st.integers(1, 70), E=st.integers(1, 20), K=st.integers(1, 5), tile_rows=st.sampled_from([16, 32]), data=st.data()
)
@settings(max_examples=15)
def test_any_ids(T: int, E: int, K: int, tile_rows: int, data: st.DataObject) -> None:
    """Ids that are given, an expert named twice by one token among them."""
    used = data.draw(st.integers(1, E), "experts in use")
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    check_place(torch.randint(used, (T, K), generator=g).to(DEVICE), E, tile_rows)


@pytest.mark.parametrize("biased", [False, True])
def test_the_op(biased: bool) -> None:
    bias = 0.1 * logits(1, 7, seed=1)[0] if biased else None
    x = logits(20, 7).requires_grad_()
    torch.library.opcheck(gate_op._topk_gate, (x, bias, None, 3))
    compiled = torch.compile(lambda x: ops.topk_gate(x, 3, bias, "triton"), fullgraph=True, backend="aot_eager")
    weights, ids = compiled(x)
    want_weights, want_ids = ops.topk_gate(x, 3, bias, "reference")
    assert torch.equal(ids, want_ids)
    assert rel(weights, want_weights) < 1e-6
    d = logits(20, 3, seed=2)
    assert rel(torch.autograd.grad(weights, x, d)[0], torch.autograd.grad(want_weights, x, d)[0]) < 1e-5
    with pytest.raises(ValueError, match=r'impl = "triton": it needs bfloat16, float16 or float32, not torch.float64'):
        ops.topk_gate(x.double(), 3, bias, "triton")


def test_balanced_ids() -> None:
    for T, E, K in SIZES:
        ids = routing.balanced_ids(T, E, K, DEVICE)
        load = [int((ids == e).sum()) for e in range(E)]
        assert max(load) - min(load) <= 1
        assert all(len(set(row)) == K for row in ids.tolist())


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "E", "K"), [(8192, 16, 2), (8192, 128, 8), (8191, 64, 4)])
def test_thousands_of_tokens(T: int, E: int, K: int) -> None:
    weights, ids = triton_gate.gate(logits(T, E), K)
    want_weights, want_ids = gate_reference.topk_gate(logits(T, E), K)
    assert torch.equal(ids, want_ids)
    assert rel(weights, want_weights) < 1e-6
    check_place(ids, E, 128)
