"""Training: published step times, utilisations and activation memory, conservation under any layout, bad layouts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import plan
from moe.errors import ConfigError
from moe.plan.comm import training_traffic
from moe.plan.hardware import load_hardware
from moe.plan.layout import Layout, layout_from, load_layout
from moe.plan.memory import in_flight, stage_counts, training_memory
from moe.plan.models import load_shape
from moe.plan.quantities import quantity
from moe.plan.shape import dense
from moe.plan.train import Efficiency, bubble, mfu, predict_run, predict_step, train_cost
from tests.conftest import tiny_config

A100, H100 = load_hardware("a100-80"), load_hardware("h100-sxm")

# Korthikanti et al. 2022 (arXiv:2205.05198), tables 3 and 5: width, layers, heads, pipeline, interleaving, micro-batch,
# global batch (2,048 tokens each); seconds per iteration with full and with selective recomputation.
MEGATRON = {
    "22B": (6144, 48, 64, 1, 1, 4, 4, 1.42, 1.10),
    "175B": (12288, 96, 96, 8, 3, 1, 64, 18.13, 13.75),
    "530B": (20480, 105, 128, 35, 3, 1, 280, 49.05, 37.83),
    "1T": (25600, 128, 160, 64, 1, 1, 512, 94.42, 71.49),
}


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("name", ["530B", "1T"])
def test_held_out_iteration_times(name: str, recompute: str) -> None:
    d, layers, heads, pp, v, micro, batch, full, selective = MEGATRON[name]
    shape = dense(name, d, layers, n_heads=heads, head_dim=d // heads)
    layout = Layout(tp=8, pp=pp, interleave=v, micro_batch=micro, seq_len=2048, batch_tokens=batch * 2048)
    found = predict_step(shape, layout.replace(recompute=recompute), A100, causal=False)["step.time"]
    assert found.to("s") == pytest.approx(full if recompute == "full" else selective, rel=0.036)


@pytest.mark.parametrize(
    ("achieved", "percent"),
    [("468 TFLOP/s", 47.3), ("430 TFLOP/s", 43.5), ("400 TFLOP/s", 40.4), ("380 TFLOP/s", 38.4)],
)
def test_published_utilisations_on_h100(achieved: str, percent: float) -> None:
    """Mixtral on 64 H100 (Megatron-Core); Llama-3 405B on 8k, 16k, 16k H100 (arXiv:2407.21783, table 4)."""
    assert 100 * (quantity(achieved) / H100.peak("bf16")).value == pytest.approx(percent, rel=0.005)


def test_utilisation_of_llama_2_70b() -> None:
    """Touvron et al. 2023 (arXiv:2307.09288), table 2: 2T tokens in 1,720,320 A100-80 hours; 42.7%."""
    found = mfu("llama-2-70b", A100, tokens=quantity("2 Ttoken"), gpu_time=quantity("1720320 h"))
    assert found.to("%") == pytest.approx(42.7, rel=0.005)


@pytest.mark.parametrize(
    ("recompute", "interleave", "percent", "days"),
    [
        ("full", 1, 28, 117),
        ("full", 2, 32, 101),
        ("full", 8, 36, 89),
        ("selective", 1, 36, 89),
        ("selective", 8, 47, 68),
    ],
)
def test_the_article_s_run(recompute: str, interleave: int, percent: float, days: float) -> None:
    layout = load_layout("gpt4-train").replace(recompute=recompute, interleave=interleave)
    run = predict_run("gpt4-8k", layout, A100, quantity("13 Ttoken"))
    assert run["step.mfu"].to("%") == pytest.approx(percent, abs=0.6)
    assert run["train.days"].to("day") == pytest.approx(days, abs=1)
    assert run["step.tokens_per_expert"].to("token") == pytest.approx(7.5e6, rel=0.01)
    # 6 N D over GPUs x peak x MFU is the same time, from the other side.
    from_mfu = train_cost("gpt4-8k", A100, tokens=quantity("13 Ttoken"), gpus=layout.gpus, mfu=run["step.mfu"])
    assert from_mfu["train.days"].value == pytest.approx(run["train.days"].value, rel=1e-9)


def test_the_article_s_memory() -> None:
    layout = load_layout("gpt4-train")
    full = training_memory("gpt4-8k", layout, A100)
    assert full["memory.peak"].to("GB") == pytest.approx(65.8, rel=0.01)
    assert full["memory.headroom"].value > 0
    kept = training_memory("gpt4-8k", layout.replace(recompute="selective"), A100)
    assert kept["memory.headroom"].value < 0, "selective recomputation does not fit in 80 GB"


LAYOUTS = st.tuples(
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 5])
)


@given(LAYOUTS, st.sampled_from([1, 2, 4]))
def test_parallelism_conserves_parameters(degrees: tuple[int, int, int, int], n_kv: int) -> None:
    tp, pp, dp, ep = degrees
    shape = load_shape(tiny_config(n_kv_heads=n_kv))
    ranks = tp * dp
    if ranks % (ep * tp):
        ep = 1
    layout = Layout(tp=tp, pp=pp, dp=dp, ep=ep)
    counts = stage_counts(shape, layout)
    assert sum(c.sharded + c.replicated + c.routed for c in counts) == plan.params(shape).total
    for c in counts:
        # All GPUs of a stage together hold each sharded part dp times, routed parts expert_dp times, the rest always.
        together = c.sharded * dp + c.routed * layout.expert_dp + c.replicated * ranks
        assert ranks * c.per_gpu(layout) == pytest.approx(together)


def test_more_of_anything_costs_more() -> None:
    layout = load_layout("gpt4-train")
    peaks = [training_memory("gpt4-8k", layout.replace(micro_batch=b), A100)["memory.peak"].value for b in (1, 2, 4)]
    assert peaks == sorted(set(peaks))
    steps = [predict_step(dense("d", d, 16), Layout(batch_tokens=65536), A100)["step.time"].value for d in (1024, 2048)]
    assert steps[0] < steps[1]
    even = predict_step("gpt4-8k", layout, A100)["step.time"]
    uneven = predict_step("gpt4-8k", layout, A100, Efficiency(expert_imbalance=1.3))["step.time"]
    assert even < uneven


def test_zero_divides_what_it_should() -> None:
    layout = Layout(dp=8, batch_tokens=65536, seq_len=1024)
    none, one, two, three = (training_memory("replica-1b", layout.replace(zero=z), A100) for z in (0, 1, 2, 3))
    for part, first in (("optimizer", one), ("gradients", two), ("weights", three)):
        assert none[f"stage0.{part}"].value == pytest.approx(8 * first[f"stage0.{part}"].value)


def test_traffic_by_hand() -> None:
    """d 192, 2 layers, 512 tokens: an all-reduce over 2 GPUs moves 512 x 192 x 2 bytes; 4 a layer, 1 micro-batch."""
    layout = Layout(tp=2, dp=2, seq_len=512, batch_tokens=1024, recompute="none", gradients="fp32")
    found = training_traffic("replica-tiny", layout, A100)
    assert found["comm.tensor"].to("B") == 4 * 2 * 512 * 192 * 2
    counts = stage_counts("replica-tiny", layout)[0]
    # Half of (gradients in 4 bytes, weights in 2), over two replicas.
    assert found["comm.data"].to("B") == pytest.approx(0.5 * 6 * counts.per_gpu(layout))
    assert found["comm.pipeline"].to("B") == found["comm.experts"].to("B") == 0


def test_bubbles_and_micro_batches_in_flight() -> None:
    """Narayanan et al. 2021, section 2.2: (p - 1) / m of the ideal time; interleaved that over v."""
    for p, m, v in ((4, 8, 1), (8, 32, 4)):
        share = bubble(Layout(pp=p, interleave=v), m)
        assert share / (1 - share) == pytest.approx((p - 1) / (v * m))
    assert bubble(Layout(pp=4, schedule="zero-bubble"), 8) < bubble(Layout(pp=4), 8)
    assert [in_flight(Layout(pp=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(pp=4, schedule="gpipe"), 0, 8) == 8
    p, v = 8, 3
    assert in_flight(Layout(pp=p, interleave=v), 0, 64) == pytest.approx(p * (1 + (p - 1) / (p * v)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tp": 5}, "tp = 5: does not divide 168 query heads; the nearest that does is 4"),
        ({"pp": 7}, "pp = 7: 120 layers do not divide.*, or pp = 6"),
        ({"pp": 7, "interleave": 20}, "give stage_layers, or pp = 6"),
        ({"ep": 3, "dp": 3, "tp": 8}, "ep = 3: does not divide 16 experts; the nearest that does is 2"),
        ({"ep": 16}, r"ep = 16: ep x expert_tp = 16 must divide the 1 GPUs"),
        ({"tpp": 8}, "unknown key 'tpp'; did you mean 'tp'"),
        ({"tp": -8}, "tp = -8: must be a whole number from 1"),
        ({"tp": 8.5}, "tp = 8.5: must be a whole number"),
        ({"zero": 4}, "zero = 4: must be one of 0, 1, 2, 3"),
        ({"weights": "fp5"}, "dtype = 'fp5': must be one of"),
        ({"pp": 2, "stage_layers": [60, 61]}, "must sum to 120 layers"),
        ({"interleave": 2}, "needs a pipeline"),
        ({"assumed": {"tpp": "?"}}, "'tpp' is not a setting"),
    ],
)
def test_bad_layouts(table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_counts("gpt4-8k", layout_from(table))


def test_bad_training_input() -> None:
    tokens = quantity("1 Gtoken")
    for arguments in ({"mfu": 1.2}, {"mfu": -0.1}, {"mfu": 0.3, "duty": 0.0}, {"mfu": 0.3, "gpus": 0}):
        with pytest.raises(ConfigError):
            train_cost("replica-1b", A100, **{"tokens": tokens, "gpus": 8, **arguments})  # type: ignore[arg-type]
    for arguments in ({"gemm": 0}, {"gemm": 1.1}, {"expert_imbalance": 0.9}):
        with pytest.raises(ConfigError):
            Efficiency(**arguments)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- counted by hand, one GPU at a time


def bytes_per_parameter(zero: int, optimizer: str = "adamw", dp: int = 64) -> float:
    shape = dense("any", 512, 4)
    layout = Layout(dp=dp, zero=zero, seq_len=128)  # type: ignore[arg-type]
    sheet = training_memory(shape, layout, A100, optimizer)
    return sum(sheet[f"stage0.{name}"].to("B") for name in ("weights", "gradients", "optimizer")) / (
        plan.params(shape).total
    )


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_states_of_adam_as_the_zero_paper_counts_them(zero: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1: 7.5B parameters, 64 GPUs, mixed precision."""
    assert 7.5 * bytes_per_parameter(zero) == pytest.approx(gigabytes, rel=0.003)


@pytest.mark.parametrize(("optimizer", "state"), [("adamw", 4 + 4 + 4), ("muon", 4 + 4), ("sgd", 4)])
def test_states_of_each_optimizer(optimizer: str, state: int) -> None:
    """Weight and gradient in 2 bytes; a float32 master, and so many float32 averages."""
    assert bytes_per_parameter(0, optimizer, dp=1) == 2 + 2 + state


@pytest.mark.parametrize(("tp", "n_kv"), [(1, 1), (2, 1), (4, 1), (4, 4), (2, 4), (1, 2), (2, 2)])
def test_key_value_heads_of_one_gpu(tp: int, n_kv: int) -> None:
    """GPU 0 has its share of the query heads, and the key/value heads that these look at."""
    d, heads, width, f, vocab = 64, 8, 16, 48, 100
    shape = dense("any", d, 1, n_heads=heads, n_kv_heads=n_kv, head_dim=width, d_ff=f, vocab_size=vocab)
    own = range(heads // tp)
    looked_at = {head * n_kv // heads for head in own}
    attention = 2 * d * width * len(own) + 2 * d * width * len(looked_at)
    expected = attention + 2 * d * f / tp + vocab * d / tp + 3 * d  # MLP, tied embedding, norms
    assert stage_counts(shape, Layout(tp=tp))[0].per_gpu(Layout(tp=tp)) == expected


def one_forward_one_backward(p: int, m: int, backward: float = 2.0) -> tuple[float, list[int]]:
    """Plays 1F1B, a forward of 1 and a backward of 2: the time of a step, and the most micro-batches that each stage
    holds at once."""
    orders = []
    for stage in range(p):
        warm = min(m, p - stage - 1)
        order = [("F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(m - warm, m)])
    done: dict[tuple[str, int, int], float] = {}
    clock, at, held, most = [0.0] * p, [0] * p, [0] * p, [0] * p
    while any(at[s] < 2 * m for s in range(p)):
        for s in range(p):
            while at[s] < 2 * m:
                kind, i = orders[s][at[s]]
                needs = (kind, i, s - 1) if kind == "F" else ("B", i, s + 1)
                first = needs[2] in (-1, p)
                if not first and needs not in done:
                    break
                start = max(clock[s], 0.0 if first else done[needs])
                clock[s] = done[kind, i, s] = start + (1.0 if kind == "F" else backward)
                held[s] += 1 if kind == "F" else -1
                most[s] = max(most[s], held[s])
                at[s] += 1
    return max(clock), most


@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 8), (4, 8), (4, 2), (8, 3), (3, 16)])
def test_pipelines_against_the_schedule_played_out(p: int, m: int) -> None:
    seconds, most = one_forward_one_backward(p, m)
    layout = Layout(pp=p, dp=2, seq_len=128, batch_tokens=2 * 128 * m)
    shape = dense("any", 512, 24)
    found = predict_step(shape, layout, A100)
    stage = found["step.stage"].to("s")
    assert (found["step.time"] - found["comm.data.time"]).to("s") == pytest.approx(seconds / 3 * stage)
    assert found["step.bubble"].to("%") == pytest.approx(100 * (1 - 3 * m / seconds))
    assert found["step.micro_batches"].value == m
    assert found["step.tokens"].to("token") == 2 * 128 * m
    memory = training_memory(shape, layout.replace(recompute="none"), A100)
    for i, count in enumerate(most):
        assert in_flight(layout, i, m) == count
        one = memory[f"stage{i}.activations.token"].value * 128
        assert memory[f"stage{i}.activations"].to("B") == pytest.approx(count * one)
    # Without a batch there are as many micro-batches as a full pipeline needs.
    full = training_memory(shape, layout.replace(recompute="none", batch_tokens=0), A100)
    assert full["stage0.activations"].to("B") == pytest.approx(p * full["stage0.activations.token"].value * 128)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_flops_of_a_micro_batch_by_hand(recompute: str) -> None:
    """Mixtral 8x7B on 2 x 4 x 2 GPUs: each product of a layer, 2 FLOP for each of a token's multiply-adds."""
    layout = Layout(tp=2, pp=4, dp=2, ep=2, seq_len=1024, batch_tokens=2**20, recompute=recompute)  # type: ignore[arg-type]
    d, f, q, kv, layers, k, experts, vocab = 4096, 14336, 4096, 1024, 32, 2, 8, 32000
    scores = layers * 2 * 2 * q * 512  # queries with keys, weights with values; half of the positions are seen
    routed = layers * k * 2 * 3 * d * f
    forward = layers * 2 * (2 * d * q + 2 * d * kv + d * experts) + routed + scores + 2 * d * vocab
    again = {"none": 0, "full": forward, "selective": scores}[recompute]
    even = predict_step("mixtral-8x7b", layout, H100)
    assert even["step.stage.flops"].to("FLOP") == pytest.approx((3 * forward + again) * 1024 / (4 * 2), rel=1e-12)
    uneven = predict_step("mixtral-8x7b", layout, H100, Efficiency(expert_imbalance=1.5))
    passes = 4 if recompute == "full" else 3
    more = uneven["step.stage.flops"].to("FLOP") - even["step.stage.flops"].to("FLOP")
    assert more == pytest.approx(passes * 0.5 * routed * 1024 / (4 * 2), rel=1e-9)
    assert even["step.stage.compute"].to("s") == pytest.approx(
        even["step.stage.flops"].to("FLOP") / (0.735 * 989.4e12), rel=1e-9
    )
