"""Memory of a GPU in training and in serving: weights, gradients, optimizer states, activations, KV cache.

Within a stage, `tp` GPUs share attention, embeddings and dense MLPs; ep x expert_tp GPUs share the routed experts;
norms, the router and key/value heads that tp cannot split are on every GPU. Optimizer states divide over data parallel
ranks with ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054), those of routed experts over the experts' copies.
"""

from dataclasses import dataclass, replace

from moe.plan.bounds import whole
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.models import Model, load_shape
from moe.plan.quantities import Quantity, Sheet, assumed, larger, quantity
from moe.plan.shape import Attention, Layer, Shape
from moe.plan.sizes import NARROW, element_bytes, saved_elements, state_bytes
from moe.plan.weights import attention_weights, head_weights, mlp_weights, router_weights, shared_weights


@dataclass(frozen=True)
class StageCounts:
    """Parameters of one pipeline stage, by how they divide over its GPUs."""

    sharded: int  # over tp
    replicated: int  # on every GPU
    routed: int  # over ep x expert_tp

    def per_gpu(self, layout: Layout) -> float:
        """Parameters that one GPU holds."""
        return self.sharded / layout.tp + self.replicated + self.routed / layout.expert_ranks


def stage_counts(model: Model, layout: Layout) -> list[StageCounts]:
    """What each stage of the pipeline holds; the first has the embedding, the last the output layer.

    Raises:
        ConfigError: the model does not divide so.
    """
    shape = load_shape(model)
    layout.check(shape)
    found = []
    stages = layout.layers_of(shape)
    for i, layers in enumerate(stages):
        parts = [_layer_counts(shape, shape.layers[n], layout.tp) for n in layers]
        sharded, replicated, routed = (sum(p[j] for p in parts) for j in range(3))
        if i == 0:
            sharded += (shape.vocab_size + shape.positions) * shape.d_model
        if i == len(stages) - 1:
            replicated += shape.final_norms
            # With a pipeline, tied embeddings stand on the first and on the last stage.
            if not shape.tied or len(stages) > 1:
                sharded += head_weights(shape) + shape.head_biases
        found.append(StageCounts(sharded, replicated, routed))
    return found


def _layer_counts(shape: Shape, layer: Layer, tp: int) -> tuple[int, int, int]:
    d, a, m = shape.d_model, layer.attention, layer.mlp
    everywhere = _kv_on_every_gpu(d, a, tp)
    replicated = layer.norms + a.norms + a.biases + everywhere
    sharded = attention_weights(d, a) - everywhere + shared_weights(d, m)
    routed = m.n_experts * (mlp_weights(d, m) + m.biases)
    if m.n_experts:
        replicated += router_weights(d, m) + m.router_biases
    else:
        sharded += mlp_weights(d, m) + m.biases
    return sharded, replicated, routed


def _kv_on_every_gpu(d: int, a: Attention, tp: int) -> int:
    """Key and value weights that tp GPUs cannot split: of fewer heads than GPUs, or of a latent."""
    if a.kv_rank:
        return d * (a.kv_rank + a.rope_dim) + d * a.q_rank if tp > 1 else 0
    if a.n_kv_heads >= tp:
        return 0
    # Each GPU holds one head. As a part r that all hold and a rest that is split: r + (heads - r) / tp = 1 head.
    return d * (a.head_dim + a.v_dim) * (tp - a.n_kv_heads) // (tp - 1)


# ---------------------------------------------------------------------------------------------------------- training


def activation_bytes(shape: Shape, layer: Layer, layout: Layout) -> Quantity:
    """Bytes per token that one GPU keeps of one layer for its backward pass, at 2 bytes an element.

    Everything in `saved_elements`; with "full" recomputation only the block's input.
    """
    sheet = Sheet()
    split = layout.tp if layout.sequence_parallel else 1
    if layout.recompute == "full":
        return sheet.derive(
            "activations.layer", "B/token", f"{NARROW} * byte/token * d / sp", d=shape.d_model, sp=split
        )
    return sheet.derive(
        "activations.layer", "B/token",
        f"{NARROW} * byte/token * (residual / sp + queries / tp + keys / kv_split + routed / expert_tp + shared / tp)",
        **saved_elements(shape.d_model, layer), sp=split, tp=layout.tp,
        kv_split=min(layout.tp, layer.attention.n_kv_heads), expert_tp=layout.expert_tp or layout.tp,
    )  # fmt: skip


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once.

    GPipe holds all of them (Huang et al. 2019); 1F1B min(m, p - stage) (Narayanan et al. 2021, arXiv:2104.04473,
    section 2.2), interleaved with v chunks (2 (p - stage - 1) + (v - 1) p + 1) / v, on the first stage
    p (1 + (p - 1) / (p v)).
    """
    m, p, v = micro_batches, layout.pp, layout.interleave
    if layout.schedule == "gpipe":
        return m
    if v == 1:
        return min(m, p - stage)
    return min(m, (2 * (p - stage - 1) + (v - 1) * p + 1) / v)


def training_memory(model: Model, layout: Layout, hardware: Hardware, optimizer: str = "adamw") -> Sheet:
    """Memory of one GPU of each stage in training, as quantities stageN.weights, .gradients, .optimizer, .activations,
    .total, and memory.peak, memory.headroom for the stage that needs most.

    Args:
        optimizer: "adamw" (float32 master, two moments), "muon" (master, momentum) or "sgd" (master).

    Raises:
        ConfigError: an optimizer or layout that cannot be.
    """
    shape = load_shape(model)
    state = state_bytes(optimizer)
    sheet = Sheet()
    micro_batches = layout.micro_batches() if layout.batch_tokens else layout.pp
    for i, (counts, layers) in enumerate(zip(stage_counts(shape, layout), layout.layers_of(shape), strict=True)):
        key = f"stage{i}"
        _static_memory(sheet, key, counts, layout, state)
        _activations(sheet, key, shape, [shape.layers[n] for n in layers], layout, i, micro_batches)
        parts = {name: sheet[f"{key}.{name}"] for name in ("weights", "gradients", "optimizer", "activations")}
        sheet.derive(f"{key}.total", "GB", "weights + gradients + optimizer + activations", **parts)
    worst = max(range(layout.pp), key=lambda i: sheet[f"stage{i}.total"].value)
    sheet.derive("memory.peak", "GB", "total", f"stage {worst} needs most", total=sheet[f"stage{worst}.total"])
    sheet.derive("memory.gpu", "GB", "memory", hardware.name, memory=hardware.memory)
    sheet.derive(
        "memory.headroom", "GB", "gpu - peak", "negative: it does not fit",
        gpu=sheet["memory.gpu"], peak=sheet["memory.peak"],
    )  # fmt: skip
    return sheet


def _static_memory(sheet: Sheet, key: str, counts: StageCounts, layout: Layout, state_bytes: int) -> None:
    on_gpu = sheet.derive(
        f"{key}.params", "param", "param * (sharded / tp + replicated + routed / expert_ranks)",
        sharded=counts.sharded, tp=layout.tp, replicated=counts.replicated, routed=counts.routed,
        expert_ranks=layout.expert_ranks,
    )  # fmt: skip
    copies = layout.dp * layout.cp
    for name, dtype, from_zero in (("weights", layout.weights, 3), ("gradients", layout.gradients, 2)):
        zero = copies if layout.zero >= from_zero else 1
        sheet.derive(
            f"{key}.{name}", "GB", "bytes * byte/param * params / zero",
            bytes=element_bytes(dtype), params=on_gpu, zero=zero,
        )  # fmt: skip
    zero = layout.value("zero")
    q = sheet.derive(
        f"{key}.optimizer", "GB",
        "bytes * byte/param * param * ((sharded / tp + replicated) / copies + routed / expert_ranks / expert_copies)",
        zero.note, bytes=state_bytes, sharded=counts.sharded, tp=layout.tp, replicated=counts.replicated,
        routed=counts.routed, expert_ranks=layout.expert_ranks,
        copies=copies if zero.value else 1, expert_copies=layout.expert_dp if zero.value else 1,
    )  # fmt: skip
    # Whether it is divided hangs on a setting that no number of the formula shows.
    sheet[f"{key}.optimizer"] = replace(q, assumptions=q.assumptions | zero.assumptions)


def _activations(
    sheet: Sheet, key: str, shape: Shape, layers: list[Layer], layout: Layout, stage: int, micro_batches: int
) -> None:
    tokens = quantity(layout.micro_batch * layout.seq_len / layout.cp, "token")
    held = Quantity(0.0, (("byte", 1), ("token", -1)))
    working = held
    for layer in layers:
        held = held + activation_bytes(shape, layer, layout)
        whole = activation_bytes(shape, layer, layout.replace(recompute="none"))
        working = larger(working, whole) if layout.recompute == "full" else working
    sheet.put(f"{key}.activations.token", held, "B/token", "kept per token of a micro-batch, all layers of the stage")
    sheet.put(f"{key}.activations.working", working, "B/token", "one layer, while its backward pass recomputes it")
    sheet.derive(
        f"{key}.activations", "GB", "tokens * (in_flight * kept + working)",
        tokens=tokens, in_flight=in_flight(layout, stage, micro_batches),
        kept=sheet[f"{key}.activations.token"], working=sheet[f"{key}.activations.working"],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- serving


def kv_bytes_per_token(model: Model, dtype: str = "bf16") -> Quantity:
    """Bytes of KV cache per token of a sequence, all layers and heads once; windows are not looked at."""
    shape = load_shape(model)
    elements = sum(layer.attention.cached for layer in shape.layers)
    sheet = Sheet()
    return sheet.derive(
        "kv.token", "B/token", "bytes * byte/token * elements", "keys and values of all layers",
        bytes=element_bytes(dtype), elements=elements,
    )  # fmt: skip


def kv_per_gpu(shape: Shape, layers: range, layout: Layout, context: int) -> float:
    """Bytes of KV cache that one GPU of a stage holds, on average, for one sequence of `context` tokens.

    Sharded by heads, a GPU holds at least one head, so a single one is on all tp GPUs; by batch, each sequence is on
    one of them.
    """
    size = element_bytes(layout.kv_cache)
    total = 0.0
    for n in layers:
        a = shape.layers[n].attention
        if layout.kv_sharding == "batch":
            share = 1 / layout.tp
        elif a.kv_rank:
            share = 1.0
        else:
            share = 1 / min(layout.tp, a.n_kv_heads)
        total += size * a.cached * a.seen(context) * share
    # Data parallel ranks have sequences of their own.
    return total / (layout.cp * layout.dp)


def serving_memory(
    model: Model, layout: Layout, hardware: Hardware, context: int, reserve: Quantity | None = None
) -> Sheet:
    """Weights and KV cache of one GPU in serving: how many sequences of `context` tokens fit, by stage.

    Args:
        reserve: memory for activations, buffers and the runtime; by default 2 GB, an assumption.

    Raises:
        ConfigError: the model does not divide so, or a context that cannot be.
    """
    shape = load_shape(model)
    whole(context=context)
    reserve = reserve if reserve is not None else assumed("2 GB", "serving.reserve", note="activations, runtime")
    sheet = Sheet()
    sheet.put("kv.token", kv_bytes_per_token(shape, layout.kv_cache), "B/token")
    sheet.derive(
        "kv.sequence", "GB", "token * per_token * context", "one sequence, each head once",
        per_token=sheet["kv.token"], context=context,
    )  # fmt: skip
    stages = layout.layers_of(shape)
    for i, counts in enumerate(stage_counts(shape, layout)):
        weights = sheet.derive(
            f"stage{i}.weights", "GB",
            "bytes * byte/param * param * (sharded / tp + replicated + routed / expert_ranks)",
            bytes=element_bytes(layout.weights), sharded=counts.sharded, tp=layout.tp, replicated=counts.replicated,
            routed=counts.routed, expert_ranks=layout.expert_ranks,
        )  # fmt: skip
        kv = sheet.put(
            f"stage{i}.kv", quantity(kv_per_gpu(shape, stages[i], layout, context), "B"), "MB",
            f"of one sequence on each GPU, sharded by {layout.kv_sharding}",
        )  # fmt: skip
        if not stages[i]:
            continue
        sheet.derive(
            f"stage{i}.sequences", "x", "floor(max(0 * weights, memory - weights - reserve) / kv)",
            memory=hardware.memory, weights=weights, reserve=reserve, kv=kv,
        )  # fmt: skip
    _worst_stage(sheet, layout, hardware)
    return sheet


def _worst_stage(sheet: Sheet, layout: Layout, hardware: Hardware) -> None:
    heaviest = max((f"stage{i}.weights" for i in range(layout.pp)), key=lambda key: sheet[key].value)
    sheet.derive("memory.weights", "GB", "weights", f"{heaviest} is the heaviest", weights=sheet[heaviest])
    tightest = min(
        (key for i in range(layout.pp) if (key := f"stage{i}.sequences") in sheet), key=lambda key: sheet[key].value
    )
    sheet.derive(
        "memory.max_sequences", "x", "sequences", f"in flight on {layout.gpus} GPUs; {tightest} limits it",
        sequences=sheet[tightest],
    )  # fmt: skip
    sheet.derive("memory.gpu", "GB", "memory", hardware.name, memory=hardware.memory)
