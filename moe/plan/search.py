"""Searches: the shape that has claimed totals, and the layout that serves a model best on given GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe.errors import ConfigError
from moe.io.toml import require
from moe.plan.bounds import real, whole
from moe.plan.counts import params
from moe.plan.flops import dense_flops_per_token, flops_per_token
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.memory import kv_per_gpu, stage_counts
from moe.plan.models import Model, load_shape
from moe.plan.serving import stage_loads
from moe.plan.shape import Attention, Layer, Mlp, Shape
from moe.plan.sizes import element_bytes

# What the article says of GPT-4, in parameters and FLOP per token.
ARTICLE = {"total": 1.8e12, "expert": 111e9, "attention": 55e9, "active": 280e9, "forward": 560e9, "dense": 3700e9}
MULTIPLE = 512  # of the model width: 128-wide heads, whole tiles over 8 GPUs


@dataclass(frozen=True)
class Fit:
    """A shape, the largest relative deviation of its totals from those asked for, and these totals."""

    shape: Shape
    error: float
    totals: dict[str, float] = field(hash=False)


def fit(
    targets: Mapping[str, float] | None = None,
    *,
    layers: int = 120,
    n_experts: int = 16,
    top_k: int = 2,
    n_kv_heads: int = 1,
    head_dim: int = 128,
    vocab_size: int = 100_352,
    gated: bool = True,
    results: int = 10,
) -> list[Fit]:
    """Shapes with the totals asked for, best first: model widths in steps of 512, query widths of 1 to 3 times that,
    d_ff of 8/3 (gated) or 4 times it.

    Args:
        targets: any of total, expert, attention, active (with the output layer), forward and dense (FLOP per token).

    Raises:
        ConfigError: an unknown or impossible target, a count that cannot be.
    """
    targets = dict(targets if targets is not None else ARTICLE)
    for name, value in targets.items():
        if name not in ARTICLE:
            raise ConfigError(f"target {name!r}: must be one of {', '.join(ARTICLE)}")
        real(1, 1e30, "must be", **{f"target {name}": value})
    if not targets:
        raise ConfigError(f"no target: give one or more of {', '.join(ARTICLE)}")
    whole(n_experts=n_experts, n_kv_heads=n_kv_heads, head_dim=head_dim, vocab_size=vocab_size, results=results)
    whole(1, 10_000, layers=layers)
    require(1 <= top_k <= n_experts, "top_k", top_k, f"must be from 1 to the {n_experts} experts")
    found = []
    for d in range(MULTIPLE, 65 * MULTIPLE, MULTIPLE):
        for halves in range(2, 7):
            d_ff = (8 * d // 3 + 127) // 128 * 128 if gated else 4 * d
            attention = Attention(halves * d // 2 // head_dim, n_kv_heads, head_dim)
            layer = Layer(attention, Mlp(d_ff, gated, n_experts, top_k), norms=2 * d)
            if attention.n_heads * head_dim * 2 != halves * d or attention.n_heads % n_kv_heads:
                continue
            shape = Shape(f"{d}x{layers}", d, vocab_size, 8192, (layer,) * layers, final_norms=d)
            totals = _totals(shape)
            error = max(abs(totals[name] / value - 1) for name, value in targets.items())
            found.append(Fit(shape, error, totals))
    return sorted(found, key=lambda f: f.error)[:results]


def _totals(shape: Shape) -> dict[str, float]:
    counts = params(shape)
    return {
        "total": counts.total,
        "expert": counts.expert,
        "attention": counts.attention,
        "active": counts.active["output"],
        "forward": flops_per_token(shape),
        "dense": dense_flops_per_token(shape),
    }


# ----------------------------------------------------------------------------------------------------------- redesign


@dataclass(frozen=True)
class Design:
    """A serving layout at a batch per pass, and what it gives: tokens/s of a user and of all, USD per 1k tokens."""

    layout: Layout
    batch: int
    per_user: float
    throughput: float
    usd_per_1k: float
    memory: float  # bytes of the fullest GPU


def evaluate(shape: Shape, layout: Layout, hardware: Hardware, batch: int, context: int) -> Design:
    """One layout at one batch, in plain numbers: the roofline of `decode`, links included."""
    bandwidth, peak = hardware.bandwidth.value, hardware.peak(hardware.compute_dtype(layout.weights)).value
    node = (hardware.node if layout.tp <= hardware.node_size else hardware.network).value
    net = (hardware.node if layout.expert_ranks <= hardware.node_size else hardware.network).value
    times = [
        max((load.weights + load.kv) / bandwidth, load.flops / peak) + load.tensor / node + load.routed / net
        for load in stage_loads(shape, layout, batch, context)
    ]
    throughput = batch / max(times)
    size = element_bytes(layout.weights)
    held = [
        size * counts.per_gpu(layout) + kv_per_gpu(shape, layers, layout, context) * batch * layout.pp
        for counts, layers in zip(stage_counts(shape, layout), layout.layers_of(shape), strict=True)
    ]
    cost = 1e3 * layout.gpus * hardware.price.value / throughput
    return Design(layout, batch, 1 / sum(times), throughput, cost, max(held))


def redesign(
    model: Model, hardware: Hardware, *, gpus: int, per_user: float, context: int = 8192, weights: str = "bf16"
) -> list[Design]:
    """Layouts on `gpus` GPUs that give every user `per_user` tokens/s, cheapest first; empty where none does.

    Raises:
        ConfigError: no GPUs, a rate that is not positive, a negative context.
    """
    shape = load_shape(model)
    whole(1, 10**6, gpus=gpus)
    whole(0, context=context)
    real(1e-6, 1e12, "must be greater than 0:", per_user=per_user)
    found: list[Design] = []
    for layout in _layouts(shape, gpus, weights, hardware.node_size):
        best = None
        for batch in (2**i for i in range(14)):
            design = evaluate(shape, layout, hardware, batch, context)
            if design.memory > 0.95 * hardware.memory.value or design.per_user < per_user:
                break
            best = design
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda design: design.usd_per_1k)


def _layouts(shape: Shape, gpus: int, weights: str, node_size: int) -> list[Layout]:
    found = []
    for pp in (n for n in range(1, gpus + 1) if gpus % n == 0 and shape.n_layers % n == 0):
        for tp in (n for n in (1, 2, 4, 8, 16) if n <= node_size and gpus // pp % n == 0):
            dp = gpus // pp // tp
            for ep in (n for n in range(1, max(1, shape.n_experts) + 1) if max(1, shape.n_experts) % n == 0):
                if dp % ep:
                    continue
                layout = Layout(name=f"tp{tp} pp{pp} dp{dp} ep{ep}", tp=tp, pp=pp, dp=dp, ep=ep, weights=weights)
                try:
                    layout.check(shape)
                except ConfigError:
                    continue  # heads or widths that this tp does not divide
                found.append(layout.replace(kv_sharding="batch"))
    return found
