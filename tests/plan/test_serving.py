"""Serving: published latencies, the article's contradictions, expert loads against brute force, speculation."""

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError
from moe.plan.experts import (
    busiest_mean,
    experts_sheet,
    load_covariance,
    load_probability,
    load_quantile,
    touched,
)
from moe.plan.hardware import load_hardware
from moe.plan.layout import Layout, load_layout
from moe.plan.memory import kv_bytes_per_token, serving_memory
from moe.plan.models import load_shape
from moe.plan.partition import frontier
from moe.plan.quantities import quantity
from moe.plan.search import ARTICLE, evaluate, fit, redesign
from moe.plan.serving import decode, prefill, ridge, serving_price
from moe.plan.shape import dense
from moe.plan.speculation import speculate
from moe.plan.sweeps import kv_room, sweep, to_csv

A40, A80, H100 = (load_hardware(name) for name in ("a100-40", "a100-80", "h100-sxm"))
SERVE = load_layout("gpt4-serve")
PLAIN: dict[str, Any] = {"context": 0, "collectives": False}


# ---------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 2, 3), (5, 1, 3), (3, 3, 2), (4, 2, 1)])
def test_loads_against_every_possible_routing(experts: int, top_k: int, tokens: int) -> None:
    choices = list(itertools.combinations(range(experts), top_k))
    loads = [
        [sum(e in chosen for chosen in routing) for e in range(experts)]
        for routing in itertools.product(choices, repeat=tokens)
    ]
    n = len(loads)
    assert touched(experts, top_k, tokens) == pytest.approx(sum(sum(x > 0 for x in load) for load in loads) / n)
    for x in range(tokens + 1):
        assert load_probability(experts, top_k, tokens, x) == pytest.approx(sum(load[0] == x for load in loads) / n)
    mean = tokens * top_k / experts
    for level in (0.01, 0.05, 0.3, 0.5, 0.95, 0.999, 1.0):
        least = next(x for x in range(tokens + 1) if sum(load[0] <= x for load in loads) / n >= level - 1e-9)
        assert load_quantile(experts, top_k, tokens, level) == least
    covariance = sum((load[0] - mean) * (load[1] - mean) for load in loads) / n
    assert load_covariance(experts, top_k, tokens) == pytest.approx(covariance, abs=1e-12)


def test_loads_of_large_batches() -> None:
    assert touched(16, 2, 1) == 2
    assert touched(16, 2, 5) == pytest.approx(7.8, abs=0.01)  # verifying 4 drafts and 1 touches 7.8, not 10
    assert sum(load_probability(16, 2, 4096, x) for x in range(4097)) == pytest.approx(1)
    assert sum(load_probability(16, 2, 4096, x) for x in range(load_quantile(16, 2, 4096, 0.95))) < 0.95
    # The sum of all loads is fixed, so that the covariances cancel the variances.
    variance = 64 * 2 / 16 * (1 - 2 / 16)
    assert 16 * variance + 16 * 15 * load_covariance(16, 2, 64) == pytest.approx(0, abs=1e-9)


def test_the_busiest_expert_against_a_simulation() -> None:
    rng = random.Random(0)
    most = []
    for _ in range(2000):
        counts = [0] * 16
        for _ in range(64):
            for e in rng.sample(range(16), 2):
                counts[e] += 1
        most.append(max(counts))
    assert busiest_mean(16, 2, 64) == pytest.approx(sum(most) / len(most), rel=0.03)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 1000))
def test_touched_is_bounded_and_grows(experts: int, top_k: int, tokens: int) -> None:
    top_k = min(top_k, experts)
    now = touched(experts, top_k, tokens)
    assert top_k - 1e-9 <= now <= min(experts, tokens * top_k) + 1e-9
    assert now <= touched(experts, top_k, tokens + 1) + 1e-9


# ----------------------------------------------------------------------------------------------------- decode


def test_fastertransformer_13b_on_an_a100_40() -> None:
    """Measured at batch 1, context 512: 22.0 ms a token, 63.2 ms for the prompt (kipply, Transformer Inference
    Arithmetic, 2022). The floors are 16.8 and 42.5 ms."""
    shape, layout = dense("13B", 5120, 40), Layout()
    step = decode(shape, layout, A40, batch=1, context=512)["decode.latency"].to("ms")
    prompt = prefill(shape, layout, A40, batch=1, prompt=512)["prefill.time"].to("ms")
    assert step == pytest.approx(16.8, abs=0.05)
    assert step < 22.0
    assert prompt == pytest.approx(42.5, abs=0.05)
    assert prompt < 63.2


@pytest.mark.parametrize(("batch", "rate"), [(1, 22), (2, 13), (3, 9.7)])
def test_reading_speed_ends_at_three_tokens_a_pass(batch: int, rate: float) -> None:
    assert decode("gpt4-8k", SERVE, A40, batch=batch, **PLAIN)["decode.per_user"].to("token/s") == pytest.approx(
        rate, rel=0.02
    )


def test_all_experts_are_not_charged_at_every_batch() -> None:
    one = decode("gpt4-8k", SERVE, A40, batch=1, **PLAIN)["decode.per_user"]
    charged = decode("gpt4-8k", SERVE, A40, batch=1, all_experts=True, **PLAIN)["decode.per_user"]
    many = decode("gpt4-8k", SERVE, A40, batch=512, **PLAIN)["decode.per_user"]
    assert charged.to("token/s") == pytest.approx(3.4, abs=0.05)
    assert many.value == pytest.approx(charged.value, rel=1e-3)
    assert one > charged


def test_top_1_reads_less_than_top_2() -> None:
    from dataclasses import replace

    from moe.config import Config

    cfg = Config()
    top_1 = replace(cfg, experts=replace(cfg.experts, top_k=1))
    assert decode(top_1, SERVE, A40, batch=1, **PLAIN)["decode.latency"].value < 0.7 * (
        decode(cfg, SERVE, A40, batch=1, **PLAIN)["decode.latency"].value
    )


def test_a_pipeline_multiplies_what_is_in_flight_and_never_shortens_latency() -> None:
    deep = Layout(tp=8, pp=15)
    flat = decode("gpt4-8k", Layout(tp=8), A80, batch=8, **PLAIN)
    made = decode("gpt4-8k", deep, A80, batch=8, **PLAIN)
    assert made["decode.latency"].value == pytest.approx(flat["decode.latency"].value)
    assert made["decode.in_flight"].value == 15 * 8
    assert made["decode.throughput"].value > 14 * flat["decode.throughput"].value


@pytest.mark.parametrize("change", [{"batch": 64}, {"context": 16384}])
def test_a_pass_takes_longer_with_more_in_it(change: dict) -> None:
    base: dict[str, Any] = {"batch": 8, "context": 2048}
    small = decode("gpt4-8k", SERVE, A40, **base)
    large = decode("gpt4-8k", SERVE, A40, **{**base, **change})
    assert small["decode.latency"] < large["decode.latency"]


def test_links_only_add() -> None:
    with_links = decode("gpt4-8k", SERVE, A40, batch=64, context=0)
    assert decode("gpt4-8k", SERVE, A40, batch=64, **PLAIN)["decode.latency"] < with_links["decode.latency"]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "dp": 4, "ep": 4}, {"dp": 8, "ep": 8}, {"pp": 4, "tp": 4}])
def test_a_pass_of_mixtral_by_hand(layout: dict) -> None:
    """16 sequences after 1,000 tokens: FLOP, weights read, KV cache read and bytes sent, all GPUs together."""
    made = decode("mixtral-8x7b", where := Layout(**layout), H100, batch=16, context=1000)
    d, f, q, kv, layers, k, experts, vocab = 4096, 14336, 4096, 1024, 32, 2, 8, 32000
    attention = 2 * d * q + 2 * d * kv
    routers = d * experts * where.tp  # each GPU of a group routes all tokens of the group
    each = layers * (attention + routers + k * 3 * d * f + 2 * q * 1000) + d * vocab
    assert made["decode.flops"].to("FLOP") == pytest.approx(16 * 2 * each, rel=1e-12)
    read = layers * (1 - (3 / 4) ** 16) * experts * 3 * d * f * where.expert_dp
    read += layers * (attention * where.dp + d * experts * where.tp * where.dp) + d * vocab * where.dp
    assert made["decode.weights"].to("B") == pytest.approx(2 * read, rel=1e-12)
    assert made["decode.kv"].to("B") == 16 * 1000 * 2 * 2 * kv * layers
    # Two all-reduces a layer, each 2 (t - 1) / t of 2 bytes a value on every GPU; to k experts and back, all but 1/ep.
    tensor = layers * 2 * 2 * (where.tp - 1) * 16 * d * 2
    assert made["decode.tensor"].to("B") == pytest.approx(tensor, rel=1e-12)
    routed = layers * 2 * 16 * k * d * 2 * (where.ep - 1) / where.ep
    assert made["decode.routed"].to("B") == pytest.approx(routed, rel=1e-12)


def test_ridge_of_an_h100() -> None:
    assert ridge(H100, "bf16").to("token") == pytest.approx(989.4 / 3.35, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- KV


def test_kv_cache_of_one_sequence() -> None:
    """Other tools give 39.4 GiB (84 heads) or 78.8 (168) where one key/value head takes 0.47."""
    one = kv_bytes_per_token("gpt4-8k") * quantity("8192 token")
    assert one.to("GiB") == pytest.approx(120 * 2 * 128 * 2 * 8192 / 2**30)
    assert one.to("GiB") == pytest.approx(0.47, abs=0.005)
    # DeepSeek-V2 (arXiv:2405.04434, section 2.1.4): the latent and the rotated key, 576 elements a layer.
    assert kv_bytes_per_token("deepseek-v2").to("B/token") == 2 * 60 * 576
    # Pope et al. 2022, section 3.3: 3 TB for 512 sequences of 2048 in a 500B+ model with multi-head attention.
    mha = dense("palm-mha", 18_432, 118, n_heads=48, head_dim=128)
    assert (kv_bytes_per_token(mha) * quantity(512 * 2048, "token")).to("TB") == pytest.approx(3, abs=0.05)


def test_32k_runs_on_40_gb_cards() -> None:
    found = {
        sharding: serving_memory("gpt4-8k", SERVE.replace(kv_sharding=sharding), A40, 32768)["memory.max_sequences"]
        for sharding in ("heads", "batch")
    }
    assert found["heads"].value == 55
    assert found["batch"].value == pytest.approx(445, abs=3)
    assert serving_memory("gpt4-8k", SERVE, A40, 8192)["memory.max_sequences"].value > 200


def test_more_key_value_heads_and_longer_contexts_leave_room_for_fewer() -> None:
    rows: list[Any] = kv_room("gpt4-8k", SERVE)
    cards = {row["hardware"] for row in rows}
    assert {"a100-40", "a100-80", "h100-sxm", "h100-pcie", "h200", "b200", "mi300x"} == cards
    found = {(row["attention"], row["context"], row["hardware"]): row for row in rows}
    for card in cards:
        for context in (8192, 32768):
            one, eight, all_heads = (found[kind, context, card] for kind in ("MQA", "GQA-8", "MHA"))
            # Keys and values of 120 layers, 128 wide, 2 bytes.
            for heads, row in ((1, one), (8, eight), (168, all_heads)):
                assert row["gb_per_sequence"] == pytest.approx(heads * 120 * 2 * 128 * 2 * context / 1e9)
            # Over 8 GPUs a single head, split by heads, takes as much of each as eight heads do.
            assert one["split_by_heads"] >= eight["split_by_heads"] > all_heads["split_by_heads"]
            assert one["split_by_sequences"] > eight["split_by_sequences"] > all_heads["split_by_sequences"]
        for kind in ("MQA", "GQA-8", "MHA"):
            assert found[kind, 8192, card]["split_by_sequences"] > found[kind, 32768, card]["split_by_sequences"]
    assert found["MHA", 32768, "a100-40"]["split_by_sequences"] < SERVE.pp, "not one sequence in each stage"
    with pytest.raises(ConfigError, match="kv_heads = 5: must divide the 168 query heads"):
        kv_room("gpt4-8k", SERVE, kv_heads=(5,))
    with pytest.raises(ConfigError, match="latent attention"):
        kv_room("deepseek-v2", Layout(tp=8))


# ---------------------------------------------------------------------------------------- speculation, searches


def test_speculation_gains_nothing_for_one_sequence_and_much_for_many() -> None:
    gain = {
        batch: speculate("gpt4-8k", SERVE, A40, batch=batch, acceptance=0.8)["speculate.gain"].value
        for batch in (1, 32, 256)
    }
    assert gain[1] == pytest.approx(0.96, abs=0.01)
    assert gain[32] == pytest.approx(2.8, abs=0.05)
    assert gain[256] == pytest.approx(2.8, abs=0.05)
    for drafts in range(1, 17):
        refused = speculate("gpt4-8k", SERVE, A40, batch=1, acceptance=0.0, drafts=drafts)["speculate.gain"]
        assert refused.value < 1


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 1.0])
def test_tokens_of_a_pass_against_a_simulation(acceptance: float) -> None:
    rng, total, n, drafts = random.Random(1), 0, 20_000, 4
    for _ in range(n):
        run = next((i for i in range(drafts) if rng.random() >= acceptance), drafts)
        total += run + 1
    found = speculate("gpt4-8k", SERVE, A40, batch=4, acceptance=acceptance, drafts=drafts)["speculate.tokens"]
    assert found.value == pytest.approx(total / n, rel=0.02)


def test_the_search_finds_our_shape() -> None:
    best, second = fit(ARTICLE)[:2]
    assert (best.shape.d_model, best.shape.main.attention.n_heads, best.shape.main.mlp.d_ff) == (10752, 168, 28672)
    assert best.error < 0.02 < second.error
    assert len(fit(ARTICLE)) == 10
    assert [f.shape for f in fit(ARTICLE, results=2)] == [best.shape, second.shape]
    # GELU experts of 4 d, with the same query widths: 2 d f in place of 3 d f.
    gelu = fit({"expert": 120 * 2 * 10752 * 43008}, gated=False)[0]
    assert (gelu.shape.d_model, gelu.error) == (10752, 0)


def test_an_expert_on_each_node_serves_at_reading_speed_near_the_article_s_price() -> None:
    article = evaluate(load_shape("gpt4-8k"), SERVE, A80, 256, 8192)
    other = evaluate(load_shape("gpt4-8k"), load_layout("gpt4-serve-ep"), A80, 256, 8192)
    assert article.per_user < 8.33 < 33.3 < other.per_user
    assert 0.0025 < other.usd_per_1k < 0.0075
    designs = redesign("gpt4-8k", A80, gpus=128, per_user=8.33)
    assert {design.layout.ep for design in designs} == {1, 2, 4, 8, 16}
    for design in designs:
        assert design.per_user >= 8.33
        assert design.memory <= A80.memory.value
        made = decode("gpt4-8k", design.layout, A80, batch=design.batch, context=8192)
        assert made["decode.per_user"].to("token/s") == pytest.approx(design.per_user)
        assert made["decode.cost"].to("USD/ktoken") == pytest.approx(design.usd_per_1k)


def test_the_frontier_moves_from_heads_to_sequences() -> None:
    rows = frontier("gpt4-8k", A80)
    best = sorted((r for r in rows if r["best"]), key=lambda r: float(r["latency_ms"]))
    costs = [float(r["usd_per_1k"]) for r in best]
    assert costs == sorted(costs, reverse=True)
    assert best[0]["attention"] == "heads"
    assert best[-1]["attention"] == "batch"


# ------------------------------------------------------------------------------------------------ prices, sweeps


def test_prices_of_a_day_and_of_a_life() -> None:
    cost, prompt = quantity("0.004 USD/ktoken"), quantity("0.0005 USD/ktoken")
    half = serving_price(output=cost, prompt=prompt, utilisation=0.5)
    assert half["serving.output"].to("USD/ktoken") == pytest.approx(0.008)  # an idle half doubles the price
    reclaimed = serving_price(output=cost, prompt=prompt, utilisation=0.5, reclaimed=1.0)
    assert reclaimed["serving.output"].to("USD/ktoken") == pytest.approx(0.004)
    life = serving_price(
        output=cost, prompt=prompt, utilisation=1.0, training=quantity("60 MUSD"),
        lifetime_tokens=quantity("100 Ttoken"), prompt_share=0.75,
    )  # fmt: skip
    assert life["serving.lifetime"].to("USD") == pytest.approx(100e12 * (0.75 * 0.0005 + 0.25 * 0.004) / 1000)
    assert life["serving.over_training"].value == pytest.approx(137.5e6 / 60e6)


def test_a_life_needs_both_its_cost_and_its_tokens() -> None:
    cost = quantity("0.004 USD/ktoken")
    for one in ({"training": quantity("60 MUSD")}, {"lifetime_tokens": quantity("1 Ttoken")}):
        found = serving_price(output=cost, prompt=cost, utilisation=1.0, **one)  # type: ignore[arg-type]
        assert not {"serving.lifetime", "serving.over_training"} & found.keys()


def test_a_sweep_has_every_combination_and_goes_through_csv() -> None:
    rows = sweep("gpt4-8k", [SERVE], ["a100-40", "h100-sxm"], batches=(1, 8), contexts=(2048, 8192), weights=("bf16",))
    assert len(rows) == 8
    lines = to_csv(rows).splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("hardware,layout,gpus,weights,context,batch")
    small = sweep("gpt4-8k", [SERVE], ["h100-sxm"], batches=(8,), weights=("bf16", "fp8"))
    assert small[1]["latency_ms"] < small[0]["latency_ms"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode("gpt4-8k", SERVE, A40, batch=0, context=0), "batch = 0"),
        (lambda: decode("gpt4-8k", SERVE, A40, batch=1, context=-1), "context = -1"),
        (lambda: serving_memory("gpt4-8k", SERVE, A40, 0), "context = 0"),
        (lambda: experts_sheet(16, 17, 8), "top_k = 17"),
        (lambda: experts_sheet(16, 2, 0), "tokens = 0"),
        (lambda: speculate("gpt4-8k", SERVE, A40, batch=1, acceptance=1.2), r"acceptance = 1\.2"),
        (lambda: speculate("gpt4-8k", SERVE, A40, batch=1, acceptance=0.5, drafts=-1), "drafts = -1"),
        (lambda: fit({"totals": 1e12}), "target 'totals'"),
        (lambda: fit({"total": -1}), "target total = -1"),
        (lambda: redesign("gpt4-8k", A80, gpus=0, per_user=1), "gpus = 0"),
        (lambda: prefill("gpt4-8k", SERVE, A40, batch=1, prompt=0), "prompt = 0"),
        (lambda: frontier("gpt4-8k", A80, chips=(0,)), "chips = 0"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_price_shares_are_checked() -> None:
    cost = quantity("0.004 USD/ktoken")
    bad: tuple[dict[str, Any], ...] = (
        {"utilisation": 0.0},
        {"utilisation": 1.5},
        {"utilisation": 0.5, "reclaimed": -1},
    )
    for arguments in bad:
        with pytest.raises(ConfigError):
            serving_price(output=cost, prompt=cost, **arguments)
    assert math.isfinite(serving_price(output=cost, prompt=cost, utilisation=0.01)["serving.output"].value)
