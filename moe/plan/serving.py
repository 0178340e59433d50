"""Serving as a roofline: what one decoding step reads, computes and sends, and what that makes of latency, throughput,
utilisation and price.

A step reads every weight that its tokens touch once, and the KV cache of its sequences. A user's latency is the sum
over all layers: a pipeline never shortens it. Throughput is the tokens of a pass over the time of the slowest stage;
in flight are the tokens of a pass times the stages. A roofline is a floor: real steps take longer.
"""

from dataclasses import dataclass

from moe.plan.bounds import amount, real, share, whole
from moe.plan.experts import touched
from moe.plan.flops import flops_per_token, head_flops, layer_flops
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.memory import kv_per_gpu, stage_counts
from moe.plan.models import Model, load_shape
from moe.plan.quantities import Quantity, Sheet, assumed, quantity
from moe.plan.shape import Layer, Shape
from moe.plan.sizes import NARROW, element_bytes
from moe.plan.weights import attention_weights, head_weights, mlp_weights, router_weights, shared_weights


@dataclass(frozen=True)
class StageLoad:
    """What one pass asks of each GPU of a stage; seconds follow from the hardware."""

    weights: float  # bytes read
    kv: float  # bytes read
    flops: float
    tensor: float  # bytes sent by tensor parallelism
    routed: float  # bytes sent to experts on other GPUs and back
    reductions: int  # collectives, each of which costs its latency


def stage_loads(
    shape: Shape, layout: Layout, batch: float, context: int, tokens_per_sequence: int = 1, all_experts: bool = False
) -> list[StageLoad]:
    """The loads of one pass of `batch` sequences that have `context` tokens each, by pipeline stage.

    Args:
        tokens_per_sequence: more than 1 when drafts are verified.
        all_experts: charge every expert, whatever the batch.
    """
    layout.check(shape)
    tokens = batch * tokens_per_sequence
    stages = layout.layers_of(shape)
    found = []
    cache: dict[Layer, tuple[float, float, float, float]] = {}
    for i, layers in enumerate(stages):
        weights = flops = tensor = routed = 0.0
        for n in layers:
            layer = shape.layers[n]
            if layer not in cache:
                cache[layer] = _layer_load(shape, layer, layout, tokens, context, all_experts)
            read, computed, reduced, exchanged = cache[layer]
            weights, flops, tensor, routed = weights + read, flops + computed, tensor + reduced, routed + exchanged
        if i == len(stages) - 1:
            weights += head_weights(shape) / layout.tp * element_bytes(layout.weights)
            flops += head_flops(shape) * tokens / (layout.tp * layout.dp)
        kv = kv_per_gpu(shape, layers, layout, context) * batch
        found.append(StageLoad(weights, kv, flops, tensor, routed, 2 * len(layers)))
    return found


def _layer_load(
    shape: Shape, layer: Layer, layout: Layout, tokens: float, context: int, all_experts: bool
) -> tuple[float, float, float, float]:
    """Bytes of weights read, FLOPs, bytes sent by tensor and by expert parallelism, per GPU, for one layer."""
    d, a, m = shape.d_model, layer.attention, layer.mlp
    size = element_bytes(layout.weights)
    own = tokens / layout.dp  # sequences of one data parallel rank
    read = (attention_weights(d, a) + shared_weights(d, m)) / layout.tp
    each = layer_flops(d, layer, 2 * a.seen(context))
    flops = (each.projections + each.shared + each.scores) * own / layout.tp
    if m.n_experts:
        experts = m.n_experts if all_experts else touched(m.n_experts, m.top_k, tokens)
        read += experts * mlp_weights(d, m) / layout.expert_ranks + router_weights(d, m)
        flops += (each.up + each.down) * tokens / layout.expert_ranks / layout.expert_dp
        flops += each.router * own
    else:
        read += mlp_weights(d, m) / layout.tp
        flops += (each.up + each.down) * own / layout.tp
    # Two all-reduces of the activations over tp; tokens to their experts and back over ep.
    tensor = 2 * 2 * (layout.tp - 1) / layout.tp * own * d * NARROW
    routed = 2 * own / layout.tp * m.top_k * d * NARROW * (layout.ep - 1) / layout.ep
    return read * size, flops, tensor, routed


def decode(
    model: Model,
    layout: Layout,
    hardware: Hardware,
    *,
    batch: int,
    context: int,
    tokens_per_sequence: int = 1,
    all_experts: bool = False,
    collectives: bool = True,
    latency: Quantity | None = None,
    price: Quantity | None = None,
) -> Sheet:
    """One decoding step: time, tokens per second and user, throughput, utilisation, price.

    Args:
        batch: sequences that share one pass; with a pipeline, batch x stages are in flight.
        context: tokens that each sequence already has.
        tokens_per_sequence: tokens that a sequence adds in a pass: 1, or drafts + 1 where these are verified.
        all_experts: charge every expert, whatever the batch.
        collectives: count what links carry; without, only memory and compute.
        latency: of one collective; by default none, so that the result stays a floor.

    Raises:
        ConfigError: a batch or context that cannot be, or a layout that does not fit the model.
    """
    shape = load_shape(model)
    whole(batch=batch, tokens_per_sequence=tokens_per_sequence)
    whole(0, context=context)
    loads = stage_loads(shape, layout, batch, context, tokens_per_sequence, all_experts)
    sheet = Sheet()
    dtype = hardware.compute_dtype(layout.weights)
    bandwidth, peak = hardware.bandwidth, hardware.peak(dtype)
    links = {
        "node": hardware.node if layout.tp <= hardware.node_size else hardware.network,
        "net": hardware.node if layout.expert_ranks <= hardware.node_size else hardware.network,
    }
    sent = " + tensor / node + routed / net + n * wait"
    wait = latency if latency is not None else quantity(0, "s")
    for i, load in enumerate(loads):
        sheet.derive(
            f"stage{i}.time", "ms",
            "max((weights + kv) / bandwidth, flops / peak)" + (sent if collectives else ""),
            weights=quantity(load.weights, "B"), kv=quantity(load.kv, "B"), bandwidth=bandwidth,
            flops=quantity(load.flops, "FLOP"), peak=peak,
            **(_link_inputs(load, links, wait) if collectives else {}),
        )  # fmt: skip
    times = {f"stage{i}": sheet[f"stage{i}.time"] for i in range(len(loads))}
    sheet.derive("decode.latency", "ms", " + ".join(times), "of one pass through all layers", **times)
    sheet.derive("decode.slowest", "ms", f"max({', '.join(times)})", "stage", **times)
    _decode_results(sheet, shape, layout, hardware, batch, tokens_per_sequence, price, peak)
    for name in ("weights", "kv", "flops", "tensor", "routed"):
        unit = "GFLOP" if name == "flops" else "GB"
        scale = layout.tp * layout.cp * layout.dp
        total = quantity(sum(getattr(load, name) for load in loads) * scale, "FLOP" if name == "flops" else "B")
        sheet.put(f"decode.{name}", total, unit, "of a pass, all GPUs together")
    if shape.n_experts:
        sheet.derive(
            "decode.experts", "x", "E * (1 - (1 - k / E) ** T)", "distinct experts that a pass touches in a layer",
            E=shape.n_experts, k=shape.top_k, T=batch * tokens_per_sequence,
        )  # fmt: skip
    return sheet


def _link_inputs(load: StageLoad, links: dict[str, Quantity], wait: Quantity) -> dict[str, Quantity | float]:
    sent = {"tensor": quantity(load.tensor, "B"), "routed": quantity(load.routed, "B")}
    return {**sent, **links, "n": load.reductions, "wait": wait}


def _decode_results(
    sheet: Sheet, shape: Shape, layout: Layout, hardware: Hardware, batch: int, per_sequence: int,
    price: Quantity | None, peak: Quantity,
) -> None:  # fmt: skip
    sheet.derive(
        "decode.per_user", "token/s", "token * n / latency", "what one user sees", n=per_sequence,
        latency=sheet["decode.latency"],
    )  # fmt: skip
    sheet.derive("decode.in_flight", "x", "batch * stages", "sequences", batch=batch, stages=layout.pp)
    sheet.derive(
        "decode.throughput", "token/s", "token * batch * n / slowest", "of the whole cluster, its pipeline full",
        batch=batch, n=per_sequence, slowest=sheet["decode.slowest"],
    )  # fmt: skip
    sheet.derive(
        "decode.utilisation", "%", "throughput * forward / (gpus * peak)",
        throughput=sheet["decode.throughput"], forward=quantity(flops_per_token(shape), "FLOP/token"),
        gpus=layout.gpus, peak=peak,
    )  # fmt: skip
    sheet.derive(
        "decode.cost", "USD/ktoken", "gpus * price / throughput", gpus=layout.gpus, price=price or hardware.price,
        throughput=sheet["decode.throughput"],
    )  # fmt: skip


def prefill(model: Model, layout: Layout, hardware: Hardware, *, batch: int, prompt: int) -> Sheet:
    """A prompt's pass: FLOPs of all its tokens at the dense peak, or the weights read once, whichever takes longer."""
    shape = load_shape(model)
    whole(batch=batch, prompt=prompt)
    counts = stage_counts(shape, layout)
    sheet = Sheet()
    peak = hardware.peak(hardware.compute_dtype(layout.weights))
    forward = quantity(flops_per_token(shape, prompt), "FLOP/token", key="flops.forward")
    held = sum(c.per_gpu(layout) for c in counts)
    sheet.derive(
        "prefill.compute", "ms", "token * batch * prompt * forward / (tp * cp * dp * peak)",
        batch=batch, prompt=prompt, forward=forward, tp=layout.tp, cp=layout.cp, dp=layout.dp, peak=peak,
    )  # fmt: skip
    sheet.derive(
        "prefill.read", "ms", "bytes * byte * held / bandwidth", "every weight once",
        bytes=element_bytes(layout.weights), held=held, bandwidth=hardware.bandwidth,
    )  # fmt: skip
    sheet.derive(
        "prefill.time", "ms", "max(compute, read)", compute=sheet["prefill.compute"], read=sheet["prefill.read"]
    )
    sheet.derive(
        "prefill.cost", "USD/ktoken", "tp * cp * dp * price * time / (token * batch * prompt)",
        "of a prompt token, its pipeline full", tp=layout.tp, cp=layout.cp, dp=layout.dp, price=hardware.price,
        time=sheet["prefill.time"], batch=batch, prompt=prompt,
    )  # fmt: skip
    return sheet


def ridge(hardware: Hardware, dtype: str) -> Quantity:
    """Tokens of a pass from which a matrix product is bound by compute: peak x bytes / (2 x bandwidth)."""
    sheet = Sheet()
    return sheet.derive(
        "decode.ridge", "token", "peak / bandwidth * bytes * byte/param / (2 * FLOP/param/token)",
        peak=hardware.peak(hardware.compute_dtype(dtype)), bandwidth=hardware.bandwidth, bytes=element_bytes(dtype),
    )  # fmt: skip


def serving_price(
    *, output: Quantity, prompt: Quantity, utilisation: Quantity | float, reclaimed: Quantity | float = 0.0,
    training: Quantity | None = None, lifetime_tokens: Quantity | None = None, prompt_share: float = 0.75,
) -> Sheet:  # fmt: skip
    """What a token costs over a day, and over the model's life.

    Args:
        output: cost per token at full load, as `decode.cost` gives it.
        prompt: the same of prompts, as `prefill.cost` gives it.
        utilisation: share of the hours that the cluster serves at that load.
        reclaimed: share of the idle hours that other work (training small models) pays for.
        training: cost of training the model.
        lifetime_tokens: tokens it will have served, prompts included.
        prompt_share: of the tokens.

    Raises:
        ConfigError: a share outside [0, 1], or no utilisation.
    """
    share(utilisation=utilisation)
    real(0, 1, "is a share:", reclaimed=reclaimed, prompt_share=prompt_share)
    amount(output=output, prompt=prompt)
    if lifetime_tokens is not None:
        amount(lifetime_tokens=lifetime_tokens)
    sheet = Sheet()
    sheet.derive(
        "serving.idle_factor", "x", "(u + (1 - u) * (1 - r)) / u", "hours paid for over hours used",
        u=utilisation, r=reclaimed,
    )  # fmt: skip
    for name, cost in (("output", output), ("prompt", prompt)):
        sheet.derive(f"serving.{name}", "USD/ktoken", "cost * factor", cost=cost, factor=sheet["serving.idle_factor"])
    sheet.derive(
        "serving.ratio", "x", "output / prompt", "output token over prompt token", output=output, prompt=prompt
    )
    if training is not None and lifetime_tokens is not None:
        prompts = assumed(quantity(prompt_share), "serving.prompt_share", note="prompt tokens of all tokens")
        sheet.derive(
            "serving.lifetime", "USD", "tokens * (p * prompt + (1 - p) * output)", tokens=lifetime_tokens, p=prompts,
            prompt=sheet["serving.prompt"], output=sheet["serving.output"],
        )  # fmt: skip
        sheet.derive(
            "serving.over_training", "x", "lifetime / training", lifetime=sheet["serving.lifetime"], training=training
        )
    return sheet
