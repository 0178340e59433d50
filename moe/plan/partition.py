"""Which way to divide one layer's work over chips serves best: the frontier of latency and cost.

The strategies of Pope et al. 2022 (arXiv:2211.05102, sections 3.2 and 3.3), with the weights that a batch touches in
place of all: weight-stationary in one or two dimensions, where activations travel; weight-gathered, where weights do;
attention divided by heads, which puts a single key/value head on every chip, or by sequences. Small batches are served
best by the first, large ones by the second.
"""

import math
from collections.abc import Iterator, Sequence

from moe.plan.bounds import whole
from moe.plan.experts import touched
from moe.plan.flops import flops_per_token
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.memory import kv_per_gpu, stage_counts
from moe.plan.models import Model, load_shape
from moe.plan.shape import Shape
from moe.plan.sizes import NARROW, element_bytes
from moe.plan.sweeps import Row
from moe.plan.weights import attention_weights, head_weights, mlp_weights, shared_weights

STRATEGIES = ("1d-stationary", "2d-stationary", "gathered")


def frontier(
    model: Model,
    hardware: Hardware,
    *,
    chips: Sequence[int] = (8, 16, 32, 64, 128),
    batches: Sequence[int] = (1, 4, 16, 64, 256, 1024, 4096),
    context: int = 8192,
    weights: str = "bf16",
) -> list[Row]:
    """A row for each number of chips, batch, strategy and attention division that fits in memory, with its latency per
    token (ms) and cost (USD per 1k tokens); `best` marks those that no other beats in both.

    Raises:
        ConfigError: chips or a batch that cannot be.
    """
    shape = load_shape(model)
    whole(0, context=context)
    for n in chips:
        whole(1, 10**6, chips=n)
    for batch in batches:
        whole(batches=batch)
    rows: list[Row] = []
    for n in chips:
        for batch in batches:
            rows += _rows(shape, hardware, n, batch, context, weights)
    for row in rows:
        row["best"] = not any(
            other["latency_ms"] <= row["latency_ms"]  # type: ignore[operator]
            and other["usd_per_1k"] <= row["usd_per_1k"]  # type: ignore[operator]
            and (other["latency_ms"], other["usd_per_1k"]) != (row["latency_ms"], row["usd_per_1k"])
            for other in rows
        )
    return rows


def _rows(shape: Shape, hardware: Hardware, n: int, batch: int, context: int, weights: str) -> Iterator[Row]:
    size = element_bytes(weights)
    link = (hardware.node if n <= hardware.node_size else hardware.network).value
    bandwidth = hardware.bandwidth.value
    peak = hardware.peak(hardware.compute_dtype(weights)).value
    held = shape_bytes(shape, size) / n
    compute = batch * flops_per_token(shape, 2 * context) / n / peak
    read = _touched_bytes(shape, batch, size)
    for attention in ("heads", "batch"):
        if attention == "batch" and batch < n:
            continue
        one = Layout(tp=n, kv_sharding=attention, kv_cache="bf16")  # type: ignore[arg-type]
        kv = kv_per_gpu(shape, range(shape.n_layers), one, context) * batch
        if held + kv > hardware.memory.value:
            continue
        for strategy in STRATEGIES:
            copies, sent = _traffic(shape, strategy, n, batch, read)
            if attention == "batch":  # queries, keys, values and outputs change hands
                sent += sum(
                    NARROW * batch * (2 * a.q + 2 * a.kv) / n for a in (layer.attention for layer in shape.layers)
                )
            latency = max((read * copies / n + kv) / bandwidth, compute) + sent / link
            yield {
                "chips": n,
                "batch": batch,
                "strategy": strategy,
                "attention": attention,
                "latency_ms": 1e3 * latency,
                "per_user": 1 / latency,
                "throughput": batch / latency,
                "usd_per_1k": 1e3 * n * hardware.price.value * latency / batch,
                "utilisation": compute / latency,
            }


def shape_bytes(shape: Shape, size: float) -> float:
    """Bytes of all weights."""
    (counts,) = stage_counts(shape, Layout())
    return size * (counts.sharded + counts.replicated + counts.routed)


def _touched_bytes(shape: Shape, batch: int, size: float) -> float:
    """Bytes of the weights that a batch touches."""
    total, d = head_weights(shape), shape.d_model
    for layer, n in shape.kinds.items():
        m = layer.mlp
        experts = touched(m.n_experts, m.top_k, batch) if m.n_experts else 1
        total += n * (attention_weights(d, layer.attention) + shared_weights(d, m) + experts * mlp_weights(d, m))
    return total * size


def _traffic(shape: Shape, strategy: str, n: int, batch: int, read: float) -> tuple[int, float]:
    """How many chips' shares of the weights each chip reads, and the bytes that it sends, all layers."""
    d, layers = shape.d_model, shape.n_layers
    hidden = max(1, shape.top_k) * shape.main.mlp.d_ff
    activations = 2 * NARROW * batch * d * layers  # all-gather and reduce-scatter
    if n == 1:
        return 1, 0.0
    if strategy == "1d-stationary":
        return 1, activations * (n - 1) / n
    if strategy == "2d-stationary":
        best = min(2 * NARROW * batch * layers * (d / x + hidden * x / n) for x in _divisors(n))
        return 1, best
    over = min((x for x in _divisors(n) if x > 1), key=lambda x: read * (x - 1) / n + activations / x)
    return over, read * (over - 1) / n + (activations / over if over < n else 0.0)


def _divisors(n: int) -> list[int]:
    return [x for x in range(1, int(math.sqrt(n)) + 1) if n % x == 0] + [
        n // x for x in range(int(math.sqrt(n)), 0, -1) if n % x == 0 and n // x > math.sqrt(n)
    ]
