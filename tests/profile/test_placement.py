"""Placement against brute force and its own promises; the serving view against the binomial it is compared with."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.profile import decode_steps, place, placement, round_robin


def busiest(load_E: np.ndarray, gpus: tuple[tuple[int, ...], ...]) -> float:
    copies = [sum(e in held for held in gpus) for e in range(len(load_E))]
    return max(sum(load_E[e] / copies[e] for e in held) for held in gpus)


@given(
    E=st.integers(2, 12),
    n_gpus=st.integers(1, 6),
    more=st.integers(0, 12),
    seed=st.integers(0, 50),
    power=st.integers(0, 4),
)
def test_every_expert_has_a_place_and_every_gpu_its_slots(
    E: int, n_gpus: int, more: int, seed: int, power: int
) -> None:
    redundant = min(more + (-(E + more)) % n_gpus, E * (n_gpus - 1))
    check(np.random.default_rng(seed).random((2, E)) ** power, n_gpus, redundant)


def check(load_LE: np.ndarray, n_gpus: int, redundant: int) -> None:
    """Places, and checks what is promised of any placement."""
    placed, E = place(load_LE, n_gpus, redundant), load_LE.shape[1]
    for layer, gpus in enumerate(placed.gpus):
        assert [len(held) for held in gpus] == [(E + redundant) // n_gpus] * n_gpus
        assert all(len(set(held)) == len(held) for held in gpus), "no GPU holds an expert twice"
        assert set().union(*gpus) == set(range(E))
        loads = placed.gpu_loads(load_LE[None])[0, layer]
        assert loads.sum() == pytest.approx(load_LE[layer].sum())
        assert loads.max() == pytest.approx(busiest(load_LE[layer], gpus))


def test_room_is_made_for_a_copy_that_no_free_slot_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rare case (once in a million of random loads): the last copy finds its expert wherever there is a slot."""
    rooms, make_room = [], placement._make_room

    def spy(e: int, *arguments: Any) -> None:
        rooms.append(e)
        make_room(e, *arguments)

    monkeypatch.setattr(placement, "_make_room", spy)
    check(np.array([[2.0, 3, 3, 4, 1, 2, 1, 1, 1, 1]]), n_gpus=3, redundant=14)
    assert len(rooms) == 1


def test_copies_go_to_the_most_load_per_copy() -> None:
    """By hand: 12 -> 6 and 6, 10 -> 5 and 5; the third copy goes to the 7, not to the 12 again."""
    gpus = place(np.array([[12.0, 10.0, 7.0, 1.0, 1.0]]), 4, redundant=3).gpus[0]
    assert [sum(e in held for held in gpus) for e in range(5)] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("seed", range(10))
def test_within_a_tenth_of_the_best_of_all_placements(seed: int) -> None:
    """8 experts on 4 GPUs: all 2,520 placements tried."""
    load_E = np.random.default_rng(seed).random(8) ** 2

    def pairs(experts: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
        if not experts:
            return [()]
        first, rest = experts[0], experts[1:]
        return [((first, other), *more) for other in rest for more in pairs(tuple(e for e in rest if e != other))]

    best = min(busiest(load_E, gpus) for gpus in pairs(tuple(range(8))))
    assert busiest(load_E, place(load_E[None], 4).gpus[0]) <= 1.1 * best


def test_a_copy_goes_to_the_busiest_expert() -> None:
    """One expert has half of the load: copied to both GPUs, it halves the imbalance that no order could mend."""
    load_LE = np.array([[6.0, 2.0, 2.0, 2.0]])
    alone = place(load_LE, 2)
    assert alone.max_over_mean(load_LE[None])[0] == pytest.approx(8 / 6)
    copied = place(load_LE, 2, redundant=2)
    assert sum(0 in held for held in copied.gpus[0]) == 2
    assert copied.max_over_mean(load_LE[None])[0] == pytest.approx(1.0)


def test_round_robin_and_per_pass_figures() -> None:
    in_turns = round_robin(1, 5, 2)
    assert in_turns.gpus == (((0, 2, 4), (1, 3)),)
    counts_PLE = np.array([[[1, 0, 1, 0, 1]], [[0, 3, 0, 3, 0]], [[0, 0, 0, 0, 0]]])
    assert in_turns.gpu_loads(counts_PLE)[:2, 0].tolist() == [[3, 0], [0, 6]]
    # Each pass waits for its own busiest GPU, though the sum of the passes is less uneven; an empty one waits for none.
    assert in_turns.max_over_mean(counts_PLE)[0] == pytest.approx((2 + 2 + 1) / 3)
    # A single token, half a one per GPU, waits for the one that has it.
    assert in_turns.max_over_mean(np.array([[[0, 0, 1, 0, 0]]]))[0] == pytest.approx(2)


@pytest.mark.parametrize(
    ("gpus", "redundant", "message"),
    [
        (0, 0, "gpus = 0: must be at least 1"),
        (3, 0, r"redundant = 0: 8 experts \+ 0 copies do not divide over 3 GPUs; 1 would"),
        (2, 9, r"redundant = 9: must be 0 to 8 \(everything everywhere\)"),
    ],
)
def test_what_cannot_be_placed(gpus: int, redundant: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(np.ones((1, 8)), gpus, redundant)


def test_uniform_routing_looks_uniform() -> None:
    """On a trace of uniform independent choices the drawn and the exact figures agree within the sampling error."""
    rng = np.random.default_rng(0)
    ids = rng.random((20000, 3, 16)).argsort(2)[:, :, :2]
    for s in decode_steps(ids, 16, batches=(1, 8, 64), steps=400):
        assert s.distinct == pytest.approx(s.distinct_uniform, rel=0.02)
        assert s.idle == pytest.approx(s.idle_uniform, abs=0.01)
        assert s.mean == pytest.approx(s.batch / 8)
        assert (s.tokens_p5, s.tokens_p95) == (s.tokens_p5_uniform, s.tokens_p95_uniform)
    one, eight, _ = decode_steps(ids, 16, batches=(1, 8, 64), steps=10)
    assert one.distinct == 2
    # By hand: the article's batch of 8 leaves an expert without a token with probability (7/8)^8.
    assert eight.idle_uniform == pytest.approx(0.875**8)
    mass = [math.comb(8, k) * 0.125**k * 0.875 ** (8 - k) for k in range(9)]
    assert eight.tokens_p95_uniform == next(k for k, c in enumerate(itertools.accumulate(mass)) if c >= 0.95)


def test_skew_shows() -> None:
    """All tokens to two experts: a batch of 8 touches 2 of 16, and 14 of 16 idle."""
    (s,) = decode_steps(np.broadcast_to(np.array([4, 9]), (50, 2, 2)), 16, batches=(8,), steps=5)
    assert (s.distinct, s.idle, s.busiest) == (2, 14 / 16, 8)
    with pytest.raises(ValueError, match="the trace has no tokens"):
        decode_steps(np.zeros((0, 2, 2), dtype=np.int64), 16)
