"""Results of the planner against sums written out here: traffic, memory of one device, ways to divide, work of a step.

Each test repeats no code of the planner: sizes are typed in, and the sums go over GPUs, layers or tensors one by one.
"""

from typing import Any

import pytest

from moe import plan
from moe.config import load_config
from moe.errors import ConfigError
from moe.plan.calibrate import Step, calibrate
from moe.plan.comm import training_traffic
from moe.plan.device import device_memory, device_step_time, device_step_work
from moe.plan.hardware import load_hardware
from moe.plan.layout import Layout
from moe.plan.partition import frontier, shape_bytes
from moe.plan.search import evaluate
from moe.plan.serving import prefill, serving_price
from moe.plan.shape import Attention, Layer, Mlp, Shape, dense
from moe.plan.work import step_work

H100 = load_hardware("h100-sxm")
# Mixtral 8x7B, from its config.json.
D, F, Q, KV, LAYERS, K, E, V = 4096, 14336, 4096, 1024, 32, 2, 8, 32000


# ---------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize("recompute", ["full", "none"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_traffic_of_mixtral(recompute: Any, sequence_parallel: bool) -> None:
    layout = Layout(
        tp=2, pp=4, dp=8, ep=4, expert_tp=2, interleave=2, seq_len=1024, batch_tokens=8 * 1024 * 16,
        recompute=recompute, sequence_parallel=sequence_parallel, gradients="fp32",
    )  # fmt: skip
    found = training_traffic("mixtral-8x7b", layout, H100)
    passes = 3 if recompute == "full" else 2  # forward, backward, and forward again
    layers, micro_batches = 8, 16
    # Of each layer two sums forward and two backward; a ring sends all but 1/t of it, twice.
    one = 2 * 1 / 2 * 1024 * D * 2
    assert found["comm.tensor.reduction"].to("B") == one
    assert found["comm.tensor"].to("B") == 2 * passes * layers * micro_batches * one
    # A GPU has half of the tokens; each goes to 2 experts and back, 3 of 4 times to another GPU.
    assert found["comm.experts"].to("B") == passes * 2 * 512 * 2 * D * 2 * 3 / 4 * layers * micro_batches
    # Activations forward and gradients backward over the border of each of 2 chunks.
    border = 1024 * D * 2 / (2 if sequence_parallel else 1)
    assert found["comm.pipeline"].to("B") == 2 * border * 2 * micro_batches
    # The first and the last stage have an embedding more than the others: gradients in 4 bytes, weights in 2.
    shared = layers * (2 * D * Q + 2 * D * KV) / 2 + V * D / 2 + layers * (2 * D + D * E)
    experts = layers * E * 3 * D * F / 8
    last = shared + D  # the norm before the output layer
    assert found["comm.data"].to("B") == pytest.approx(6 * (last * 7 / 8 + experts * 1 / 2), rel=1e-12)
    for name, link in (("tensor", 450e9), ("experts", 450e9), ("pipeline", 50e9), ("data", 50e9)):
        assert found[f"comm.{name}.time"].to("s") == pytest.approx(found[f"comm.{name}"].to("B") / link)
    gathered = training_traffic("mixtral-8x7b", layout.replace(zero=3), H100)
    assert gathered["comm.data"].value == pytest.approx(found["comm.data"].value * 8 / 6)


def test_links_of_a_node_end_at_its_size() -> None:
    for gpus, link in ((8, 450e9), (16, 50e9)):
        layout = Layout(dp=gpus, seq_len=64, batch_tokens=64 * gpus)
        found = training_traffic(dense("any", 512, 2), layout, H100)
        assert found["comm.data.time"].to("s") == pytest.approx(found["comm.data"].to("B") / link)


def test_a_context_divided_over_two_gpus() -> None:
    """Each has half of a sequence's tokens, and a copy of the weights whose gradients are summed with the other's."""
    common: dict[str, Any] = {"tp": 2, "seq_len": 1024, "batch_tokens": 4096, "recompute": "none"}
    whole, halved = Layout(**common), Layout(cp=2, **common)
    assert (whole.gpus, halved.gpus) == (2, 4)
    shape = dense("any", 512, 4)
    one, two = (training_traffic(shape, layout, H100) for layout in (whole, halved))
    assert two["comm.tensor"].value == one["comm.tensor"].value / 2
    assert (one["comm.data"].value, two["comm.data"].value > 0) == (0, True)
    one, two = (plan.predict_step(shape, layout, H100)["step.stage.flops"].value for layout in (whole, halved))
    assert two == one / 2
    one, two = (plan.training_memory(shape, layout, H100) for layout in (whole, halved))
    assert two["stage0.activations"].value == one["stage0.activations"].value / 2
    assert two["stage0.optimizer"].value == one["stage0.optimizer"].value / 2
    assert two["stage0.weights"].value == one["stage0.weights"].value


# ------------------------------------------------------------------------------------------------------- one device


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_memory_of_one_device_tensor_by_tensor(dtype: Any, mode: Any) -> None:
    cfg = load_config("replica-nano").with_overrides(["train.batch_size=8"])
    d, f, layers, k, experts, vocab, q, kv, heads = 192, 512, 4, 2, 16, cfg.vocab_size, 384, 64, cfg.attention.n_heads
    found = device_memory(cfg, micro_batch=2, seq_len=100, dtype=dtype, optimizer="muon", activation_checkpointing=mode)
    size, tokens = (4 if dtype == "fp32" else 2), 200
    block = 2 * d * (q + kv) + experts * 3 * d * f
    total = layers * (block + 2 * d + d * experts) + d + 2 * vocab * d
    gets = {name: found[f"device.{name}"].to("B") for name in ("weights", "gradients", "copies", "optimizer")}
    assert gets["weights"] == gets["gradients"] == 4 * total
    assert gets["copies"] == (0 if dtype == "fp32" else 2 * layers * block)
    assert gets["optimizer"] == 8 * (total - layers * block) + 4 * layers * block
    # Both norms' inputs and outputs; queries, keys, values and what attention gives; two halves of each expert.
    saved = 4 * 4 * d + (0 if dtype == "fp32" else 4 * d)
    saved += size * (q + kv + kv + q) + size * k * 2 * f + 16 * experts + 4 * heads
    assert found["device.activations.layer"].to("B/token") == saved
    kept = {"none": saved, "selective": 4 * d + size * (2 * q + 2 * kv + 2 * d), "full": 4 * d}[mode]
    again = 0 if mode == "none" else saved
    assert found["device.activations"].to("B") == tokens * (layers * kept + again)
    rows = min(tokens, 2**22 // vocab)
    loss = rows * vocab * (8 if dtype == "fp32" else 12) + 2 * 4 * vocab * d + tokens * d * (4 + 2 * size)
    working = tokens * (size * k * (3 * d + 4 * f) + 8 * d)
    assert found["device.loss"].to("B") == loss
    assert found["device.working"].to("B") == working
    # 2 of 8 sequences at a time: gradients of those before stand there.
    states = gets["weights"] + gets["optimizer"]
    activations = found["device.activations"].to("B")
    moments = {
        "at_loss": states + gets["copies"] + activations + loss + 4 * total,
        "at_first_block": states + gets["copies"] + activations + working + 4 * (block + vocab * d) + 4 * total,
        "at_last_block": states + gets["copies"] / layers + 4 * total + tokens * saved + working + 4 * block,
    }
    for name, value in moments.items():
        assert found[f"device.{name}"].to("B") == value, name
    assert found["device.peak"].to("B") == max(moments.values())
    whole = device_memory(cfg, micro_batch=8, seq_len=100, dtype=dtype, activation_checkpointing=mode)
    held = sum(whole[f"device.{name}"].to("B") for name in ("weights", "optimizer", "gradients", "working"))
    assert whole["device.at_last_block"].to("B") == held + whole["device.copies"].to("B") / layers + 800 * saved
    assert whole["device.at_loss"].to("B") == pytest.approx(
        sum(whole[f"device.{n}"].to("B") for n in ("weights", "copies", "optimizer", "activations", "loss"))
    )


def test_a_chunk_of_the_loss_is_what_the_kernel_takes() -> None:
    from moe.kernels.loss import chunked

    cfg = load_config("replica-nano").with_overrides(["vocab_size=131072"])
    one, two = (device_memory(cfg, micro_batch=1, seq_len=n)["device.loss"].to("B") for n in (100, 101))
    assert chunked.CHUNK_ELEMENTS // 131072 == 32  # rows of logits: no more for another token
    assert two - one == 192 * (4 + 2 * 4)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_work_of_a_step_by_hand(mode: str) -> None:
    cfg = load_config("replica-nano").with_overrides(
        [f"train.activation_checkpointing={mode}", "train.batch_size=32", "train.micro_batch=8", "train.seq_len=128"]
    )
    d, f, layers, k, experts, q, kv = 192, 512, 4, 2, 16, 384, 64
    block = 2 * (2 * d * (q + kv) + d * experts + k * 3 * d * f) + 2 * 2 * q * 64
    forward = layers * block + 2 * d * cfg.vocab_size
    again = {"none": 0, "selective": layers * 2 * k * d * 2 * f, "full": layers * block}[mode]
    found = device_step_work(cfg)
    assert found["step.tokens"].to("token") == 32 * 128
    assert found["step.flops"].to("FLOP") == (3 * forward + again) * 32 * 128
    # 4 micro-batches read the weights twice and write gradients; AdamW reads 4 tensors and writes 3, Muon, for the
    # matrices of the blocks, 3 and 2.
    counts = plan.params(cfg)
    assert found["step.bytes"].to("B") == 4 * (counts.total * (4 * 3 + 7) - 2 * (counts.attention + counts.experts))
    timed = device_step_time(cfg, load_hardware("cpu"), 0.5)
    assert timed["step.time"].to("s") == pytest.approx((3 * forward + again) * 32 * 128 / (0.5 * 179e9))


def test_bytes_of_a_training_step_component_by_component() -> None:
    """2 sequences of 8 tokens of gpt4-8k-gelu's kind of model, 2 bytes an activation and 4 a weight."""
    cfg = load_config("gpt4-8k-gelu")
    T, R, L, d, f, q, kv, experts, vocab = 16, 32, 120, 10752, cfg.experts.d_ff, 21504, 128, 16, cfg.vocab_size
    found = {
        key: work.bytes for key, work in step_work(cfg, 2, 8, "backward", activation_bytes=2, weight_bytes=4).items()
    }
    dense_weights, io = 2 * d * (q + kv), 2 * (d + q + kv)
    expected = {
        ("embedding", "forward"): T * d * 6,
        ("norm", "forward"): (2 * L + 1) * 2 * T * d * 2,
        ("projections", "forward"): L * (4 * dense_weights + 2 * T * io),
        ("attention", "forward"): L * T * (2 * q + 2 * kv) * 2,
        ("router", "forward"): L * (T * d * 2 + d * experts * 4 + T * experts * 4),
        ("permute", "forward"): L * (T + R) * d * 2,
        ("up", "forward"): L * (experts * d * f * 4 + (R * d + 2 * R * f) * 2),
        ("down", "forward"): L * (experts * d * f * 4 + R * (f + d) * 2),
        ("combine", "forward"): L * (R + T) * d * 2,
        ("head", "forward"): 2 * vocab * d * 4 + 2 * T * d * 2,
        ("embedding", "backward"): vocab * d * 4 + T * d * 2,
        ("norm", "backward"): (2 * L + 1) * 3 * T * d * 2,
        ("projections", "backward"): L * (2 * dense_weights * 4 + 2 * T * io * 2),
        ("attention", "backward"): L * T * 4 * (q + kv) * 2,
        ("router", "backward"): L * (2 * T * d * 2 + 2 * d * experts * 4 + T * experts * 4),
        ("down", "backward"): L * (2 * experts * d * f * 4 + (2 * R * d + 4 * R * f) * 2),
        ("up", "backward"): L * (2 * experts * d * f * 4 + (2 * R * f + 2 * R * d) * 2),
        ("combine", "backward"): L * (R + T) * d * 2,
        ("permute", "backward"): 2 * L * (T + R) * d * 2,
    }
    assert found == expected
    logits = step_work(cfg, 2, 8, "forward", activation_bytes=2, weight_bytes=4, gathered=False)
    assert logits["head", "forward"].bytes == vocab * d * 4 + T * (d + vocab) * 2
    assert ("permute", "forward") not in logits
    assert logits["up", "forward"].bytes == L * (experts * d * f * 4 + (R * d + R * f) * 2)
    assert {key for key, work in logits.items() if work.wide} == {("router", "forward")}


def test_muons_update_moves_five_tensors_of_a_matrix() -> None:
    cfg = load_config("replica-tiny").with_overrides(["train.optimizer=muon"])
    found = step_work(cfg, 1, 8, "train", activation_bytes=4, weight_bytes=4)["optimizer", "update"]
    blocks = 2 * (2 * 192 * (384 + 64) + 16 * 3 * 192 * 512)
    assert found.bytes == 20 * blocks + 28 * (plan.params(cfg).total - blocks)
    assert found.wide
    # Queries and outputs, keys and values, gates and ups together, downs: short side, long side, how many.
    matrices = [(192, 384, 2), (64, 192, 2), (192, 1024, 16), (192, 512, 16)]
    assert found.flop == 2 * sum(n * (4 * short**2 * long + 34 * short**3) for short, long, n in matrices)


# ---------------------------------------------------------------------------------------------- serving on n chips


def frontier_row(strategy: str, attention: str, n: int, batch: int) -> dict[str, Any]:
    rows = frontier("mixtral-8x7b", H100, chips=(n,), batches=(batch,), context=1000)
    (row,) = (r for r in rows if r["strategy"] == strategy and r["attention"] == attention)
    return row


@pytest.mark.parametrize("n", [2, 8, 16])
@pytest.mark.parametrize("attention", ["heads", "batch"])
@pytest.mark.parametrize("strategy", ["1d-stationary", "2d-stationary", "gathered"])
def test_ways_to_divide_by_hand(n: int, attention: str, strategy: str) -> None:
    batch, link = 256, 450e9 if n <= 8 else 50e9
    row = frontier_row(strategy, attention, n, batch)
    experts = E * (1 - (3 / 4) ** batch)
    read = 2 * (V * D + LAYERS * (2 * D * Q + 2 * D * KV + experts * 3 * D * F))
    kv = batch * 1000 * LAYERS * 2 * KV * 2 / (n if attention == "batch" else min(n, 8))
    forward = 2 * (LAYERS * (2 * D * Q + 2 * D * KV + D * E + K * 3 * D * F) + V * D) + LAYERS * 4 * Q * 1000
    compute = batch * forward / n / 989.4e12
    activations = 2 * 2 * batch * D * LAYERS
    divisors = [x for x in range(1, n + 1) if n % x == 0]
    if strategy == "1d-stationary":
        copies, sent = 1, activations * (n - 1) / n
    elif strategy == "2d-stationary":
        copies, sent = 1, min(2 * 2 * batch * LAYERS * (D / x + K * F * x / n) for x in divisors)
    else:
        sent, copies = min((read * (x - 1) / n + (activations / x if x < n else 0), x) for x in divisors if x > 1)
        # The choice among them goes by weights and activations, those of the last one counted too.
        copies = min((x for x in divisors if x > 1), key=lambda x: read * (x - 1) / n + activations / x)
        sent = read * (copies - 1) / n + (activations / copies if copies < n else 0)
    if attention == "batch":
        sent += LAYERS * 2 * batch * (2 * Q + 2 * KV) / n
    latency = max((read * copies / n + kv) / 3.35e12, compute) + sent / link
    assert row["latency_ms"] == pytest.approx(1e3 * latency, rel=1e-9)
    assert row["throughput"] == pytest.approx(batch / latency, rel=1e-9)
    assert row["per_user"] == pytest.approx(1 / latency, rel=1e-9)
    assert row["usd_per_1k"] == pytest.approx(1e3 * n * 2 / 3600 * latency / batch, rel=1e-9)
    assert row["utilisation"] == pytest.approx(compute / latency, rel=1e-9)


def test_what_does_not_fit_or_divide_has_no_row() -> None:
    assert shape_bytes(plan.load_shape("mixtral-8x7b"), 2) == 2 * 46_702_792_704
    rows: list[Any] = frontier("mixtral-8x7b", H100, chips=(1, 8), batches=(4, 4096), context=32768)
    assert {r["chips"] for r in rows} == {8}  # 93 GB on one card of 80
    assert {r["batch"] for r in rows} == {4}  # 4096 x 4 GB of cache
    assert {r["attention"] for r in rows} == {"heads"}  # 4 sequences do not divide over 8
    best = [r for r in rows if r["best"]]
    for r in rows:
        beaten = any(
            o["latency_ms"] <= r["latency_ms"] and o["usd_per_1k"] <= r["usd_per_1k"] and o is not r for o in best
        )
        assert r["best"] != beaten


def test_a_prompt_and_a_layout_by_hand() -> None:
    layout = Layout(tp=4, pp=2, dp=1)
    found = prefill("mixtral-8x7b", layout, H100, batch=3, prompt=512)
    forward = 2 * (LAYERS * (2 * D * Q + 2 * D * KV + D * E + K * 3 * D * F) + V * D) + LAYERS * 4 * Q * 256
    assert found["prefill.compute"].to("s") == pytest.approx(3 * 512 * forward / (4 * 989.4e12))
    norms = LAYERS * (2 * D + D * E) + D
    held = (46_702_792_704 - norms) / 4 + norms
    assert found["prefill.read"].to("s") == pytest.approx(2 * held / 3.35e12)
    assert found["prefill.time"].value == max(found["prefill.compute"].value, found["prefill.read"].value)
    per_token = 4 * 2 / 3600 * found["prefill.time"].to("s") / (3 * 512)
    assert found["prefill.cost"].to("USD/token") == pytest.approx(per_token)
    design = evaluate(plan.load_shape("mixtral-8x7b"), layout, H100, 16, 1000)
    head = V * D + D
    stage = [(46_702_792_704 - V * D - head) / 2 + V * D, (46_702_792_704 - V * D - head) / 2 + head]
    copies = [16 * (2 * D + D * E), 16 * (2 * D + D * E) + D]
    kv = 16 * 1000 * 16 * 2 * KV * 2 / 4 * 2
    expected = max(2 * ((s - c) / 4 + c) + kv for s, c in zip(stage, copies, strict=True))
    assert design.memory == pytest.approx(expected, rel=1e-12)


def test_idle_hours_that_others_pay_for() -> None:
    one = plan.quantity("1 USD/ktoken")
    found = serving_price(output=one, prompt=one, utilisation=0.4, reclaimed=0.25)
    assert found["serving.idle_factor"].value == pytest.approx((0.4 + 0.6 * 0.75) / 0.4)
    assert found["serving.ratio"].value == 1


# --------------------------------------------------------------------------------------------- windows, latents


def test_a_window_bounds_scores_and_cache() -> None:
    """Token by token: token i sees those before it and half of itself, 200 at most."""
    layer = Layer(Attention(4, 2, 16, window=200), Mlp(64), norms=0)
    shape = Shape("any", 32, 10, 1000, (layer,) * 3)
    seen = sum(i + 0.5 if i < 200 else 200 for i in range(1000)) / 1000
    assert plan.attention_flops(shape, 1000) == 3 * 4 * 64 * seen
    assert plan.attention_flops(shape, 200) == 3 * 4 * 64 * 100
    assert plan.attention_flops(shape, 1000, causal=False) == 3 * 4 * 64 * 200
    assert plan.attention_flops(shape, 60, causal=False) == 3 * 4 * 64 * 60
    from moe.plan.memory import kv_per_gpu

    assert kv_per_gpu(shape, range(3), Layout(), 1000) == 3 * 2 * 2 * 16 * 2 * 200
    assert kv_per_gpu(shape, range(2), Layout(tp=2), 5) == 2 * 2 * 2 * 16 * 2 * 5 / 2


def test_shared_experts_serve_every_token() -> None:
    d, f, wide = 32, 24, 40
    mlp = Mlp(f, n_experts=8, top_k=2, shared_d_ff=wide, shared_gate=True)
    shape = Shape("any", d, 10, 100, (Layer(Attention(4, 2, 16), mlp, norms=0),) * 2)
    attention = 2 * d * 64 + 2 * d * 32
    each = 2 * (attention + 8 * d + 2 * 3 * d * f + 3 * d * wide + d) + 10 * d
    assert plan.flops_per_token(shape) == 2 * each
    assert plan.dense_flops_per_token(shape) == 2 * (each + 2 * 6 * 3 * d * f)
    assert plan.params(shape).active["output"] == each
    found = plan.decode(shape, Layout(tp=2), H100, batch=4, context=0)
    assert found["decode.flops"].to("FLOP") == 4 * 2 * (each + 2 * 8 * d)  # both GPUs route
    assert found["decode.weights"].to("B") == pytest.approx(
        2 * (each + 2 * 8 * d + 2 * (8 * (1 - (3 / 4) ** 4) - 2) * 3 * d * f)
    )
    saved = 2 * (4 * d + 2 * 64 + 2 * 32 + 2 * 2 * f + 2 * wide)
    memory = plan.training_memory(shape, Layout(recompute="none", seq_len=16), H100)
    assert memory["stage0.activations.token"].to("B/token") == 2 * saved
    halves = plan.training_memory(shape, Layout(tp=2, recompute="none", seq_len=16, sequence_parallel=False), H100)
    assert halves["stage0.activations.token"].to("B/token") == 2 * (saved + 2 * 4 * d) / 2
    recomputed = plan.training_memory(shape, Layout(tp=2, seq_len=16), H100)
    assert recomputed["stage0.activations.token"].to("B/token") == 2 * 2 * d / 2
    assert recomputed["stage0.activations.working"].to("B/token") == saved / 2


def test_values_of_another_width_than_keys() -> None:
    attention = Attention(4, 2, 16, v_head_dim=24)
    shape = Shape("any", 32, 10, 100, (Layer(attention, Mlp(64), norms=0),))
    expected = 32 * 4 * 16 + 32 * 2 * 16 + 32 * 2 * 24 + 4 * 24 * 32  # queries, keys, values, output
    assert plan.params(shape).attention == expected
    assert attention.cached == 2 * (16 + 24)


def test_latent_attention_on_one_of_eight_gpus() -> None:
    """DeepSeek-V2's: the latents' projections are on every GPU, all that is made from them is divided."""
    from moe.plan.memory import stage_counts

    d, heads, nope, rope, v, q_rank, kv_rank = 5120, 128, 128, 64, 128, 1536, 512
    attention = Attention(heads, heads, nope + rope, v, q_rank=q_rank, kv_rank=kv_rank, rope_dim=rope)
    shape = Shape("any", d, 0, 1, (Layer(attention, Mlp(0), norms=0),), tied=True)
    everywhere = d * q_rank + d * (kv_rank + rope)
    divided = heads * (q_rank * (nope + rope) + kv_rank * (nope + v) + v * d)
    assert plan.params(shape).total == everywhere + divided
    for tp in (1, 8):
        (counts,) = stage_counts(shape, Layout(tp=tp))
        assert counts.per_gpu(Layout(tp=tp)) == everywhere + divided / tp


# ------------------------------------------------------------------------------------------------ measured steps


def test_calibration_falls_back_on_what_alone_fits() -> None:
    """Steps that nothing but their bytes explains, and the reverse."""

    def step(flop: float, size: float, seconds: float) -> Step:
        return Step("train", "any", "cpu", "fp32", flop, size, seconds)

    moved = calibrate([step(1e12, 1e9, 1.0), step(1e12, 2e9, 2.0), step(1e12, 3e9, 3.0), step(3e12, 1e9, 1.0)])
    assert moved.bandwidth == pytest.approx(1e9, rel=1e-6)
    assert moved.error(held_out=False) == pytest.approx(0, abs=1e-6)
    computed = calibrate([step(1e12, 1e9, 1.0), step(2e12, 1e9, 2.0), step(3e12, 1e9, 3.0), step(1e12, 3e9, 1.0)])
    assert computed.rate == pytest.approx(1e12, rel=1e-6)
    pair = [step(1e12, 1e9, 1.0), step(2e12, 1e9, 1.5)]
    assert calibrate(pair).steps == pair
    with pytest.raises(ConfigError, match="1 measured steps: at least 2"):
        calibrate(pair[:1])
