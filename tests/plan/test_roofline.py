"""A small model's run from its components: by hand where one thing limits, and every complaint."""

import dataclasses

import pytest

from moe import plan
from moe.config import Config, load_config
from moe.errors import ConfigError
from moe.plan.hardware import Hardware, load_hardware
from moe.plan.layout import Layout, load_layout
from moe.plan.quantities import quantity
from moe.plan.roofline import SLOWER, predict_small_run, run_tokens
from moe.plan.train import Efficiency

WEB, NODE, H100 = load_config("replica-1b-web"), load_layout("node-8"), load_hardware("h100-sxm")
FULL = Efficiency(gemm=1.0, memory=1.0)


def plain(**train) -> Config:
    """replica-1b-web without a ramp, 256 windows a step."""
    return dataclasses.replace(WEB, train=dataclasses.replace(WEB.train, batch_ramp="", **train))


def hardware(**changes) -> Hardware:
    peaks = {"bf16": H100.peak("bf16"), "fp32": H100.peak("bf16")}
    return dataclasses.replace(H100, peaks=peaks, **changes)


def test_with_endless_bandwidth_products_are_all() -> None:
    """3 forward passes of every token at the peak: the planner's own FLOP, counted in another module."""
    endless = quantity("1e12 GB/s")
    run = predict_small_run(plain(), NODE, hardware(bandwidth=endless, node=endless), efficiency=FULL)
    flop = 3 * plan.flops_per_token(WEB, 2048) * 9e9
    assert run["run.floor.hours"].to("h") == pytest.approx(flop / (8 * 989.4e12) / 3600, rel=1e-3)
    assert run["run.slow.hours"].to("h") == pytest.approx(SLOWER * run["run.floor.hours"].to("h"))
    without_scores = 3 * plan.flops_per_token(WEB) * 9e9
    assert run["run.floor.mfu"].to("%") == pytest.approx(100 * without_scores / flop, rel=1e-3)
    again = predict_small_run(
        plain(), NODE.replace(recompute="full"), hardware(bandwidth=endless, node=endless), efficiency=FULL
    )
    head = 3 * 2 * WEB.vocab_size * WEB.d_model * 9e9
    expected = run["run.floor.hours"].value * (4 / 3 * (flop - head) + head) / flop
    assert again["run.floor.hours"].value == pytest.approx(expected, rel=1e-3)


def test_muon_takes_its_own_time() -> None:
    """Its Newton-Schulz steps take longer than its bytes: FLOP as test_work.py holds them against torch's,
    at the float32 peak."""
    cfg = load_config("replica-1b-web").with_overrides(["train.optimizer=muon"])
    hardware, layout = load_hardware("h100-sxm"), load_layout("node-8")
    found = predict_small_run(cfg, layout, hardware, tokens=quantity("1 Gtoken"))["floor.optimizer"]
    flop = 0.0
    for rows, columns, n in ((1536, 768, 2), (64, 768, 2), (4096, 768, 16), (768, 2048, 16)):
        small, large = min(rows, columns), max(rows, columns)
        flop += 12 * n * (4 * small**2 * large + 34 * small**3)
    seconds = flop / (hardware.peak("fp32").to("FLOP/s") * 0.735) / 8
    assert found.to("s") == pytest.approx(seconds)


def test_optimizer_and_reduction_by_hand() -> None:
    n = plan.params(WEB).total
    run = predict_small_run(plain(), NODE, H100, efficiency=FULL)
    assert run["floor.optimizer"].to("s") == pytest.approx(28 * n / 8 / 3.35e12)
    # A ring sends 7/8 of the gradients in 4 bytes and of the weights in 2, over NVLink.
    assert run["floor.reduction"].to("s") == pytest.approx(7 / 8 * 6 * n / 450e9)
    whole = predict_small_run(plain(), NODE.replace(zero=0), H100, efficiency=FULL)
    assert whole["floor.optimizer"].value == pytest.approx(8 * run["floor.optimizer"].value)
    two_nodes = predict_small_run(plain(), NODE.replace(dp=16), H100, efficiency=FULL)
    assert two_nodes["floor.reduction"].to("s") == pytest.approx(15 / 16 * 6 * n / 50e9)
    alone = predict_small_run(plain(), NODE.replace(dp=1), H100, efficiency=FULL)
    assert alone["floor.reduction"].value == 0


def test_norms_move_bytes() -> None:
    """2 bytes an element, read and written: 2 passes forward, 3 backward, over 25 norms of 32,768 x 768."""
    run = predict_small_run(plain(), NODE, H100)
    expected = 25 * 5 * 32768 * 768 * 2 / (3.35e12 * Efficiency().memory)
    assert run["floor.norm"].to("s") == pytest.approx(expected)
    wider = predict_small_run(plain(), NODE, dataclasses.replace(H100, bandwidth=2 * H100.bandwidth))
    assert wider["floor.norm"].value == pytest.approx(run["floor.norm"].value / 2)
    assert wider["floor.attention"].value == run["floor.attention"].value


def test_ramp() -> None:
    """Steps of each stage by hand; a step of fewer tokens costs more for each of them."""
    run = predict_small_run(WEB, NODE, H100)
    last = run["floor.step"].to("s")
    assert run["run.ramp2"].to("s") == pytest.approx(7e9 / 524288 * last)
    assert run["run.ramp0"].to("s") / 500e6 > run["run.ramp1"].to("s") / 1500e6 > run["run.ramp2"].to("s") / 7e9
    hours = sum(run[f"run.ramp{i}"].to("h") for i in range(3))
    assert run["run.floor.hours"].to("h") == pytest.approx(hours)
    assert run["run.floor.cost"].to("USD") == pytest.approx(hours * 8 * 2)
    short = predict_small_run(WEB, NODE, H100, tokens=quantity("500 Mtoken"))
    assert "run.ramp1" not in short
    assert short["run.ramp0"].value == pytest.approx(run["run.ramp0"].value)


def test_a_ramp_that_begins_with_one_window() -> None:
    """1,000 steps of one window of 2,048 tokens, then steps of four."""
    ramp = f"0:2048 {1000 * 2048}:8192"
    cfg = dataclasses.replace(WEB, train=dataclasses.replace(WEB.train, batch_ramp=ramp, batch_size=4, micro_batch=0))
    run = predict_small_run(cfg, NODE.replace(dp=1), H100, tokens=quantity(2000 * 2048, "token"))
    alone = predict_small_run(
        plain(batch_size=1, micro_batch=0), NODE.replace(dp=1), H100, tokens=quantity(2048, "token")
    )  # a single step
    assert run["run.ramp0"].to("s") == pytest.approx(1000 * alone["floor.step"].to("s"))
    assert run["run.ramp1"].to("s") == pytest.approx(250 * run["floor.step"].to("s"))


def test_tokens_of_a_configuration() -> None:
    assert run_tokens(WEB) == 9_000_000_000
    assert run_tokens(load_config("replica-1b")) == 20_000 * 128 * 2048
    for train, message in (({"tokens": "epochs"}, "only the data says"), ({"tokens": ""}, "train.tokens is not set")):
        with pytest.raises(ConfigError, match=message):
            run_tokens(dataclasses.replace(WEB, train=dataclasses.replace(WEB.train, **train)))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 8, "dp": 1}, "tp = 8: the floor is of data parallelism alone"),
        ({"ep": 8, "expert_tp": 1}, "ep = 8"),
        ({"recompute": "selective"}, "recompute"),
        ({"dp": 7}, "64 windows does not divide over dp = 7"),
        ({"dp": 128}, "64 windows does not divide over dp = 128"),
        ({"dp": 2, "micro_batch": 24}, "with micro_batch = 24"),
    ],
)
def test_what_cannot_be(layout: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict_small_run(WEB, NODE.replace(**layout), H100)


def test_the_recipe_fits() -> None:
    """On the smallest card that it is meant for, alone (what is there today) and as one of eight."""
    for name in ("h100-sxm", "a100-80"):
        hw = load_hardware(name)
        assert plan.training_memory(WEB, NODE, hw)["memory.headroom"].to("GB") > 0
        assert plan.device_memory(WEB, dtype="bf16")["device.peak"].to("GB") < 0.9 * hw.memory.to("GB")
    assert isinstance(NODE, Layout)
    assert WEB.train.ramp()[-1][1] == NODE.batch_tokens
    # More than 20 tokens for each parameter that a token uses, and no more than one pass of the corpus gives.
    assert 20 * plan.params(WEB).active["output"] < run_tokens(WEB) < 0.95 * 10_027_019_645
