"""The learning rate against its formulas."""

import math

import pytest

from moe.config import TrainConfig
from moe.train.schedule import lr_scale


def test_warm_up_is_linear_and_reaches_one():
    cfg = TrainConfig(steps=100, warmup=10)
    assert [lr_scale(s, cfg) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])


def test_cosine_is_the_half_wave_from_one_to_min_lr():
    cfg = TrainConfig(steps=101, warmup=1, min_lr=0.2)
    for step in range(1, 101):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 100)) / 2
        assert lr_scale(step, cfg) == pytest.approx(expected)
    assert lr_scale(100, cfg) == pytest.approx(0.2)


def test_wsd_holds_then_falls_linearly():
    cfg = TrainConfig(steps=100, warmup=10, schedule="wsd", decay=0.2, min_lr=0.0)
    assert {lr_scale(s, cfg) for s in range(9, 80)} == {1.0}
    assert [lr_scale(s, cfg) for s in range(80, 100)] == pytest.approx([1 - (k + 1) / 20 for k in range(20)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 5, 10, 20])
def test_stays_in_range_whatever_the_lengths(schedule, warmup):
    cfg = TrainConfig(steps=10, warmup=warmup, schedule=schedule, decay=1.0, min_lr=0.1)
    scales = [lr_scale(s, cfg) for s in range(10)]
    assert all(0 < s <= 1 for s in scales)
    if warmup < 10:
        assert scales[-1] == pytest.approx(0.1)
