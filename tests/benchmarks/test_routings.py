"""Routings of benchmarks load the experts as they say: counted, for shapes of ours and for odd ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import routings
from benchmarks.routings import ROUTINGS, WORKLOADS, from_loads, rank_size, traced
from moe.profile import Trace
from tests.conftest import ROOT

# tokens, experts, top-k
SHAPES = [(8192, 16, 2), (2048, 4, 2), (4096, 128, 8), (65536, 8, 2), (8, 16, 2), (101, 7, 3), (5, 3, 3), (40, 2, 1)]


def loads(ids_TK: Tensor, n_experts: int) -> list[int]:
    return torch.bincount(ids_TK.flatten(), minlength=n_experts).tolist()


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_token_has_different_experts_that_there_are(name: str, shape: tuple[int, int, int]) -> None:
    T, E, K = shape
    ids_TK = ROUTINGS[name](T, E, K, 0)
    assert ids_TK.shape == (T, K)
    assert ids_TK.dtype == torch.int64
    assert ids_TK.min() >= 0
    assert ids_TK.max() < E
    ordered = ids_TK.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()
    assert torch.equal(ids_TK, ROUTINGS[name](T, E, K, 0))


@pytest.mark.parametrize("name", WORKLOADS)
def test_another_seed_is_another_routing(name: str) -> None:
    assert not torch.equal(WORKLOADS[name](512, 16, 2, 0), WORKLOADS[name](512, 16, 2, 1))


def test_given_loads_are_met_to_the_row() -> None:
    given = [0, 5, 11, 1, 0, 7, 9]
    ids_TK = from_loads(given, 11, 3, torch.Generator().manual_seed(0))
    assert loads(ids_TK, 7) == given
    slots = [set(ids_TK[:, k].tolist()) for k in range(3)]
    assert all(len(s) > 1 for s in slots), "no slot is an expert's own"


@pytest.mark.parametrize("given", [[4, 4, 3], [12, 0, 0]])
def test_loads_that_no_tokens_can_have_are_refused(given: list[int]) -> None:
    with pytest.raises(ValueError, match="must sum to 6 x 2, and none may be above 6"):
        from_loads(given, 6, 2, torch.Generator())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balanced_loads_differ_by_a_row_at_most(shape: tuple[int, int, int]) -> None:
    T, E, K = shape
    found = loads(routings.balanced(T, E, K), E)
    assert max(found) - min(found) <= 1


@pytest.mark.parametrize(
    ("T", "E", "K", "hot", "heat"), [(8192, 16, 2, 2, 4.0), (4096, 128, 8, 16, 4.0), (8192, 8, 2, 2, 2.0)]
)
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_hot_experts_have_half_of_the_rows(T: int, E: int, K: int, hot: int, heat: float, seed: int) -> None:
    """So each of them `heat` times the mean; the others are even."""
    for routing in (routings.hot_experts, routings.hot_rank):
        found = torch.tensor(loads(routing(T, E, K, seed), E))
        order = found.argsort(descending=True, stable=True)
        warm, cold = found[order[:hot]], found[order[hot:]]
        assert warm.sum().item() == pytest.approx(T * K / 2, abs=E)
        assert warm.float().mean().item() == pytest.approx(heat * T * K / E, rel=0.01)
        assert cold.max() - cold.min() <= E
        chosen = sorted(order[:hot].tolist())
        a_rank = chosen == list(range(chosen[0], chosen[0] + hot)) and chosen[0] % hot == 0
        if routing is routings.hot_rank:
            assert a_rank
            assert chosen[0] == seed * hot % E
        elif E == 128:
            assert not a_rank, "spread over all ranks"


def test_ragged_loads_are_uneven_and_cut_tiles() -> None:
    found = loads(routings.ragged(8192, 16, 2), 16)
    assert sum(n % 16 != 0 for n in found) >= 12
    assert max(found) > 1.5 * 1024
    assert min(found) < 0.6 * 1024


@pytest.mark.parametrize(("T", "E", "K"), [(8192, 16, 2), (4096, 128, 8), (2048, 4, 2), (64, 8, 2)])
def test_every_other_rank_has_no_rows(T: int, E: int, K: int) -> None:
    found, size = loads(routings.zero_experts(T, E, K), E), rank_size(E, K)
    assert [n == 0 for n in found] == [bool(e // size % 2) for e in range(E)]
    busy = [n for n in found if n]
    assert max(busy) - min(busy) <= 1


def test_every_rank_is_hot_for_a_stretch_and_none_over_all() -> None:
    T, E, K = 8192, 16, 2
    ids_TK = routings.rotating(T, E, K)
    assert torch.tensor(loads(ids_TK, E)).float().div(T * K / E).sub(1).abs().max() < 0.02
    for rank, stretch in enumerate(ids_TK.chunk(8)):
        found = loads(stretch, E)
        assert sum(found[2 * rank : 2 * rank + 2]) == pytest.approx(len(stretch), abs=E)  # half of K = 2 rows a token


def test_a_burst_is_a_stretch_of_one_choice() -> None:
    T, E, K = 8192, 16, 2
    ids_TK = routings.burst(T, E, K).sort(1).values
    same = (ids_TK == torch.tensor([0, 1])).all(1).int()
    longest = max(len(run) for run in "".join(map(str, same.tolist())).split("0"))
    assert longest >= T // 8
    found = loads(ids_TK, E)
    assert found[0] == found[1] == T // 8 + (T - T // 8) * K // E
    assert max(found[2:]) - min(found[2:]) <= 1


def test_zipf_falls() -> None:
    found = loads(routings.zipf(8192, 16, 2), 16)
    assert found[0] > 1.4 * found[1] > 1.4 * found[4] > 1.4 * found[15]


def test_a_trace_gives_its_most_uneven_layer_and_begins_again() -> None:
    trace = Trace.open(ROOT / "benchmarks" / "traces" / "replica-nano")
    ids_TLK = trace.ids_TLK(8192)
    uneven = max(range(trace.n_layers), key=lambda layer: np.bincount(ids_TLK[:, layer].ravel()).max())
    assert np.array_equal(traced(trace, 100).numpy(), trace.ids_TLK(100)[:, uneven])
    assert np.array_equal(traced(trace, 20000).numpy(), np.concatenate([ids_TLK[:, uneven]] * 3)[:20000])
