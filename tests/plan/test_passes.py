"""What a pass computes and moves, against parameters that are counted and batches that are even; requests at a rate."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import plan
from moe.config import DenseConfig, load_config
from moe.errors import ConfigError
from moe.plan.flops import flops_per_token
from moe.plan.hardware import load_hardware
from moe.plan.layout import Layout
from moe.plan.load import under_load
from moe.plan.memory import kv_bytes_per_token
from moe.plan.models import load_shape
from moe.plan.passes import Bytes, expected_experts, most_experts, pass_load
from moe.plan.serving import decode, prefill, stage_loads

NANO, CPU = load_shape("replica-nano"), load_hardware("cpu")
FP32 = Layout(weights="fp32", kv_cache="fp32")
ALONE: dict[str, Any] = {"collectives": False}


def test_a_prompt_with_every_expert_reads_every_matrix_and_costs_what_its_tokens_do() -> None:
    counts = plan.params("replica-nano")
    S, L = 24, NANO.n_layers
    load = pass_load(NANO, [(0, S)], S, [16.0] * L, Bytes(1, 1, 1))
    assert load.weights + load.experts == counts.total - counts.embedding - counts.norms
    assert load.experts == counts.experts
    # Causal: a token sees itself and all before it, S + 1 halves on average.
    assert load.flop == S * flops_per_token(NANO, S + 1)
    assert load.kv == S * kv_bytes_per_token(NANO, "int8").value


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (3, 40), (64, 500)])
def test_an_even_batch_is_that_of_the_planner(batch: int, context: int) -> None:
    (want,) = stage_loads(NANO, FP32, batch, context)
    load = pass_load(NANO, [(context - 1, 1)] * batch, batch, expected_experts(NANO, batch), Bytes())
    assert load.weights + load.experts == pytest.approx(want.weights)
    assert load.kv == pytest.approx(want.kv)
    assert load.flop == pytest.approx(want.flops)
    seconds = decode(NANO, FP32, CPU, batch=batch, context=context, **ALONE)["decode.latency"].to("s")
    assert load.floor(CPU.peak("fp32").to("FLOP/s"), CPU.bandwidth.to("B/s")) == pytest.approx(seconds)


@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=6), start=st.integers(0, 50))
def test_a_prompt_in_pieces_costs_the_same_flop(cuts: list[int], start: int) -> None:
    whole = pass_load(NANO, [(start, sum(cuts))], 0, [0.0] * 4, Bytes())
    begins = [start + n for n in itertools.accumulate(cuts, initial=0)]
    parts = [pass_load(NANO, [(b, n)], 0, [0.0] * 4, Bytes()) for b, n in zip(begins, cuts, strict=False)]
    assert sum(p.flop for p in parts) == whole.flop


def test_experts_expected_and_assumed() -> None:
    assert expected_experts(NANO, 1) == pytest.approx([2.0] * 4)
    assert expected_experts(NANO, 5) == pytest.approx([16 * (1 - (7 / 8) ** 5)] * 4)
    assert most_experts(NANO, 5) == [10] * 4
    assert most_experts(NANO, 50) == [16] * 4
    mixed = load_shape(dataclasses.replace(load_config("replica-nano"), dense=DenseConfig(layers=1, d_ff=64)))
    assert len(expected_experts(mixed, 5)) == 3
    load = pass_load(mixed, [(0, 1)], 1, expected_experts(mixed, 1), Bytes(1, 1, 1))
    counts = plan.params(mixed)
    assert load.weights + load.experts == pytest.approx(counts.active["output"] - counts.norms)


# ------------------------------------------------------------------------------------------------------------- load


def simulated(rate: float, prompt: int, output: int, max_running: int, requests: int) -> tuple[float, float]:
    """(tokens a second, seconds a token of a user) of requests that arrive evenly, step by step."""
    context, peak = prompt + output // 2, CPU.peak("fp32").to("FLOP/s")
    read = prompt * flops_per_token(NANO, prompt) / peak
    steps = [decode(NANO, FP32, CPU, batch=b, context=context, **ALONE)["decode.latency"].to("s")
             for b in range(1, max_running + 1)]  # fmt: skip
    now, arrived, running, done, took = 0.0, 0, [], [], []
    while len(done) < requests:
        while arrived < requests and arrived / rate <= now and len(running) < max_running:
            now += read  # its prompt delays everybody
            running.append([output, now])
            arrived += 1
        if not running:
            now = max(now, arrived / rate)
            continue
        now += steps[len(running) - 1]
        for one in running:
            one[0] -= 1
        took += [now - begun for left, begun in running if not left]
        done += [one for one in running if not one[0]]
        running = [one for one in running if one[0]]
    return requests * output / now, sum(took) / len(took) / output


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8, 3.0])
def test_requests_at_a_rate_get_what_a_simulation_of_every_step_gives_them(share: float) -> None:
    load = {"prompt": 16, "output": 64, "max_running": 8}
    most = under_load(NANO, FP32, CPU, rate=1.0, **load)["load.most"].to("1/s")
    found = under_load(NANO, FP32, CPU, rate=share * most, **load)
    tokens, latency = simulated(share * most, **load, requests=400)
    assert found["load.throughput"].to("token/s") == pytest.approx(tokens, rel=0.05)
    assert found["load.latency"].to("s") == pytest.approx(latency, rel=0.1)


def test_a_rate_that_is_too_high_is_served_as_far_as_it_can_be() -> None:
    load = {"prompt": 32, "output": 16, "max_running": 4}
    one, more = (under_load(NANO, FP32, CPU, rate=rate, **load) for rate in (1e6, 1e9))
    assert one["load.throughput"].value == more["load.throughput"].value
    assert one["load.running"].value == pytest.approx(4)
    seconds = 16 * decode(NANO, FP32, CPU, batch=4, context=40, **ALONE)["decode.latency"].to("s") / 4
    seconds += prefill(NANO, FP32, CPU, batch=1, prompt=32)["prefill.compute"].to("s")
    assert one["load.most"].to("1/s") == pytest.approx(1 / seconds)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"prompt": 0}, {"max_running": 0}, {"layout": Layout(tp=2)}])
def test_what_cannot_be_is_named(wrong: dict) -> None:
    given = {"layout": FP32, "hardware": CPU, "rate": 1.0, "prompt": 8, "output": 8, "max_running": 4, **wrong}
    with pytest.raises(ConfigError, match="gpus" if "layout" in wrong else next(iter(wrong))):
        under_load(NANO, **given)
