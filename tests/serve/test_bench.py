"""Benchmarks of the engine: times of a clock that is ours, workloads, arrivals, and figures that follow from them."""

import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from moe import Transformer
from moe.errors import ConfigError
from moe.plan.hardware import load_hardware
from moe.serve import bench
from moe.serve.bench import Answer, Bench, Job, Limits, Workload, drive, percentile, poisson
from moe.serve.output import Delta
from tests.conftest import tiny_config


class Clock:
    """Time goes on when somebody sleeps, or the engine steps."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowEngine:
    """A token of every request that is there, each second."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.left = clock, {}

    @property
    def idle(self) -> bool:
        return not self.left

    def add(self, prompt: list[int], params: Any) -> str:
        name = f"r{len(prompt)}"
        self.left[name] = params.max_tokens
        return name

    def step(self) -> list[Delta]:
        self.clock.now += 1.0
        found = []
        for name in [*self.left]:
            self.left[name] -= 1
            output: Any = None
            if not self.left[name]:
                del self.left[name]
                n = {"r1": 3, "r2": 2, "r3": 5}[name]
                output = SimpleNamespace(token_ids=[0] * n, cached_tokens=0, outputs=[])
            found.append(Delta(name, 0, [0], "", output=output))
        return found


def test_a_request_s_clock_starts_when_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the engine is in the middle of a step then, and where nothing is there to do."""
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    engine: Any = SlowEngine(clock)
    jobs = [Job([1], 3), Job([1, 2], 2), Job([1, 2, 3], 5)]
    seconds, found = drive(engine, jobs, [0.5, 1.25, 10.0])
    # The first has tokens at 1.5, 2.5 and 3.5; the second waits until 1.5; the third comes to an idle engine.
    assert [(a.ttft, a.e2e) for a in found] == [(1.0, 3.0), (1.25, 2.25), (1.0, 5.0)]
    assert [a.tpot for a in found] == [1.0, 1.0, 1.0]
    assert seconds == 15.0
    assert [Limits(1100, 1000).met(a) for a in found] == [True, False, True]
    assert [Limits(tpot_ms=999).met(a) for a in found] == [False] * 3
    assert Limits().met(found[0])


def test_tpot_is_between_the_tokens_after_the_first() -> None:
    assert Answer(tokens=11, prompt=5, cached=0, ttft=2.0, e2e=7.0).tpot == 0.5


def test_percentiles_are_values_that_occur() -> None:
    values = [float(i) for i in range(1, 201)]
    assert (percentile(values, 0.99), percentile(values, 0.5), percentile([3.0], 0.99)) == (198.0, 100.0, 3.0)


def test_arrivals_are_poisson() -> None:
    n, rate = 20_000, 8.0
    times = poisson(n, rate, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    # Exponential: mean and standard deviation are 1 / rate, and of the gaps a share of e^-x is longer than x / rate.
    assert statistics.fmean(gaps) == pytest.approx(1 / rate, rel=4 / math.sqrt(n))
    assert statistics.pstdev(gaps) == pytest.approx(1 / rate, rel=0.05)
    for x in (0.5, 1, 2, 3):
        p = math.exp(-x)
        assert sum(g > x / rate for g in gaps) == pytest.approx(n * p, abs=4 * math.sqrt(n * p * (1 - p)))
    assert poisson(5, rate, seed=1) == times[:5]
    assert poisson(5, rate, seed=2) != times[:5]


def test_random_prompts_are_their_own_and_as_long_as_is_said() -> None:
    jobs = Workload(input_len=20, output_len=8, spread=0.5, seed=3).jobs(400, 61)
    lengths, outputs = {len(j.prompt) for j in jobs}, {j.output_len for j in jobs}
    assert (min(lengths), max(lengths)) == (10, 30)
    assert (min(outputs), max(outputs)) == (4, 12)
    assert {i for j in jobs for i in j.prompt} == set(range(61))
    assert len({tuple(j.prompt[:8]) for j in jobs}) == 400
    assert jobs == Workload(input_len=20, output_len=8, spread=0.5, seed=3).jobs(400, 61)
    assert all(len(j.prompt) == 20 and j.output_len == 8 for j in Workload(input_len=20, output_len=8).jobs(5, 61))


def test_prompts_that_begin_alike() -> None:
    jobs = Workload("prefix-repetition", input_len=20, output_len=8, prefixes=3, prefix_len=12).jobs(30, 61)
    begins = {tuple(j.prompt[:12]) for j in jobs}
    assert len(begins) == 3
    assert all(len(j.prompt) == 20 for j in jobs)
    assert len({tuple(j.prompt[12:]) for j in jobs}) == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_len": 0}, "input_len = 0"),
        ({"output_len": 1}, "output_len = 1: must be 2 or more"),
        ({"spread": 1.0}, "spread = 1.0"),
        ({"kind": "prefix-repetition", "prefixes": 0}, "prefixes = 0"),
        ({"kind": "prefix-repetition", "input_len": 20, "prefix_len": 20}, "prefix_len = 20"),
        ({"kind": "prefix-repetition", "input_len": 20, "spread": 0.5, "prefix_len": 10}, "prefix_len = 10"),
    ],
)
def test_workloads_that_cannot_be_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload(**settings)


# ---------------------------------------------------------------------------------------------------------- one model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(tiny_config(), seed=3)


def made(model: Transformer, **workload: Any) -> Bench:
    return Bench(model, load_hardware("cpu"), Workload(**{"input_len": 9, "output_len": 4, **workload}))


def test_rows_of_every_benchmark(model: Transformer) -> None:
    subject = made(model)
    one = [*subject.latency([1, 3], rounds=2)]
    two = [*subject.throughput([2], requests=5)]
    three = [*subject.serve([200.0], requests=5, max_running=4, limits=Limits(tpot_ms=1e9))]
    assert [row["batch"] for row in one] == [1, 3]
    assert [row["requests"] for row in (*one, *two, *three)] == [2, 6, 5, 5]
    # One pass for the prompts, and three for the other tokens of all.
    assert [row["running"] for row in one] == [1, 3]
    for row in (*one, *two, *three):
        assert row["total_throughput"] == pytest.approx(row["throughput"] * (9 + 4) / 4)
        assert row["ttft_ms"] <= row["ttft_p99_ms"]
        assert row["ttft_ms"] + 3 * row["tpot_ms"] == pytest.approx(row["e2e_ms"], rel=0.5)
        assert 0 < row["utilisation"] < 1
        assert 0 < row["experts"] <= row["experts_most"] <= 5
        assert row["plan_tpot_ms"] > 0
    assert three[0]["goodput"] == pytest.approx(three[0]["throughput"] / 4)
    assert len(subject.plan_rows) == 2 * 4 + 2 * 4 + sum(1 for r in subject.plan_rows[16:])
    assert not {row["goodput"] for row in subject.serve([200.0], 3, 4, Limits(ttft_ms=0.0))} - {0.0}


def test_beginnings_that_are_shared_are_found(model: Transformer) -> None:
    shared = made(model, kind="prefix-repetition", input_len=30, prefixes=1, prefix_len=20)
    (row,) = shared.throughput([1], requests=4)
    # A whole block of 16 of three of four prompts.
    assert row["cached"] == pytest.approx(3 * 16 / (4 * 30))
    (row,) = made(model, input_len=30).throughput([1], requests=4)
    assert row["cached"] == 0


def test_a_workload_beyond_the_context_is_named(model: Transformer) -> None:
    with pytest.raises(ConfigError, match=r"input_len = 30, output_len = 11: make up to 41 tokens, .* context of tiny"):
        made(model, input_len=30, output_len=11)
    made(model, input_len=30, output_len=10)
