"""Length, batch sizes and learning rate of a run against their definitions."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config import TrainConfig
from moe.errors import ConfigError
from moe.train.schedule import Schedule


def schedule(seq_len: int = 16, windows_per_pass: int = 1000, **settings: Any) -> Schedule:
    return Schedule(TrainConfig(**settings), seq_len, windows_per_pass)


def scales(s: Schedule) -> list[float]:
    """The factor of each step, batch after batch."""
    found, done = [], 0
    while done < s.windows:
        done += s.batch(done)
        found.append(s.lr_scale(done))
    return found


def test_warm_up_is_linear_and_reaches_one() -> None:
    assert scales(schedule(steps=100, warmup=10))[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])


def test_cosine_is_the_half_wave_from_one_to_min_lr() -> None:
    found = scales(schedule(steps=101, warmup=1, min_lr=0.2))
    for step in range(1, 101):
        assert found[step] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * step / 100)) / 2)
    assert found[100] == pytest.approx(0.2)


def test_wsd_holds_then_falls_linearly() -> None:
    found = scales(schedule(steps=100, warmup=10, schedule="wsd", decay=0.2, min_lr=0.0))
    assert set(found[9:80]) == {1.0}
    assert found[80:] == pytest.approx([1 - (k + 1) / 20 for k in range(20)])


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 5, 10, 20])
def test_stays_in_range_whatever_the_lengths(kind: Any, warmup: int) -> None:
    found = scales(schedule(steps=10, warmup=warmup, schedule=kind, decay=1.0, min_lr=0.1))
    assert all(0 < s <= 1 for s in found)
    if warmup < 10:
        assert found[-1] == pytest.approx(0.1)


def test_a_ramp_changes_the_batch_where_it_says() -> None:
    s = schedule(seq_len=256, tokens="12M", batch_ramp="0:64k 2M:128k 8M:256k")
    assert [s.batch(0), s.batch(8000), s.batch(31500)] == [250, 500, 1000]
    done, sizes = 0, []
    while done < s.windows:
        if done:
            # The size follows from the tokens that are done.
            tokens = done * 256
            assert s.batch(done) in (s.windows - done, 250 if tokens < 2e6 else 500 if tokens < 8e6 else 1000)
        sizes.append(s.batch(done))
        done += sizes[-1]
    assert done == s.windows == 46875
    assert len(sizes) == s.steps
    assert sorted(set(sizes[:-1])) == [250, 500, 1000]


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 90)), max_size=4),
    st.integers(1, 90),
    st.integers(1, 3000),
)
def test_steps_are_counted_as_they_are_taken(later: list[tuple[int, int]], first: int, total: int) -> None:
    begin, stages = 0, [f"0:{first * 4}"]
    for gap, size in later:
        begin += gap * 4
        stages.append(f"{begin}:{size * 4}")
    s = schedule(seq_len=4, tokens=str(total * 4), batch_ramp=" ".join(stages))
    done = n = 0
    while done < s.windows:
        done += s.batch(done)
        n += 1
    assert (done, n) == (total, s.steps)
    again = schedule(seq_len=4, steps=n, batch_ramp=" ".join(stages))
    assert again.steps == n
    assert again.windows >= total


def test_lengths() -> None:
    assert schedule(steps=7, batch_size=3).windows == 21
    assert schedule(tokens="epochs", windows_per_pass=101, batch_size=10).windows == 101
    last = schedule(tokens="epochs", windows_per_pass=101, batch_size=10)
    assert (last.steps, last.batch(100)) == (11, 1)
    assert schedule(tokens="3.2k").windows == 200
    with pytest.raises(ConfigError, match="less than one window of 16 tokens"):
        schedule(tokens="7")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "3 M"}, "train.tokens = '3 M': must be a number of tokens"),
        ({"tokens": "k"}, "must be a number of tokens"),
        ({"tokens": "1.5"}, "must be a number of tokens"),
        ({"tokens": "nan"}, "must be a number of tokens"),
        ({"tokens": "1e999T"}, "must be a number of tokens"),
        ({"tokens": "0"}, "must be more than 0"),
        ({"batch_ramp": "64k"}, "must be like"),
        ({"batch_ramp": "1M:64k"}, "must begin at 0"),
        ({"batch_ramp": "0:64k 0:128k"}, "must begin at 0"),
        ({"batch_ramp": "0:0"}, "batches above 0"),
        ({"batch_ramp": "0:64k 2M:lots"}, "train.batch_ramp = 'lots'"),
        ({"epochs": {"text": -1}}, "train.epochs.text = -1"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
