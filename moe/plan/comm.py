"""What training sends over each link: tensor, expert, pipeline and data parallelism, per GPU and optimizer step.

Ring collectives move (n - 1) / n of a tensor per reduce-scatter or all-gather, twice that for an all-reduce (Thakur et
al. 2005, section 4). With sequence parallelism each all-reduce becomes a reduce-scatter and an all-gather: as many
bytes.
"""

from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.memory import stage_counts
from moe.plan.models import Model, load_shape
from moe.plan.quantities import Sheet
from moe.plan.shape import Shape
from moe.plan.sizes import NARROW, element_bytes


def training_traffic(model: Model, layout: Layout, hardware: Hardware) -> Sheet:
    """Bytes that the busiest GPU sends in one optimizer step, by kind, and the time each takes at its link's peak.

    Tensor and expert parallelism talk within the node where they fit in, the others where all GPUs do; else over the
    network.

    Raises:
        ConfigError: the model does not divide so, or the layout has no batch.
    """
    shape = load_shape(model)
    layout.check(shape)
    sheet = Sheet()
    micro_batches = layout.micro_batches()
    tokens = layout.micro_batch * layout.seq_len // layout.cp
    layers = max(len(r) for r in layout.layers_of(shape))
    _tensor(sheet, shape, layout, tokens, layers, micro_batches)
    _experts(sheet, shape, layout, tokens, layers, micro_batches)
    sheet.derive(
        "comm.pipeline", "GB", f"2 * {NARROW} * byte * tokens * d / sp * chunks * micro_batches",
        "activations forward, gradients backward, over each chunk's border",
        tokens=tokens, d=shape.d_model, sp=layout.tp if layout.sequence_parallel else 1,
        chunks=layout.interleave if layout.pp > 1 else 0, micro_batches=micro_batches,
    )  # fmt: skip
    _data(sheet, shape, layout)
    node, network = hardware.node, hardware.network
    groups = {"tensor": layout.tp, "experts": layout.expert_ranks, "pipeline": layout.gpus, "data": layout.gpus}
    for name, size in groups.items():
        link = node if size <= hardware.node_size else network
        sheet.derive(
            f"comm.{name}.time", "s", "bytes / link", "within the node" if link is node else "over the network",
            bytes=sheet[f"comm.{name}"], link=link,
        )  # fmt: skip
    return sheet


def _tensor(sheet: Sheet, shape: Shape, layout: Layout, tokens: int, layers: int, micro_batches: int) -> None:
    t = layout.tp
    sheet.derive(
        "comm.tensor.reduction", "MB", f"2 * (t - 1) / t * {NARROW} * byte * tokens * d",
        "one all-reduce of a layer's activations, in 2 bytes", t=t, tokens=tokens, d=shape.d_model,
    )  # fmt: skip
    # Attention and MLP each reduce once forward and once backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    sheet.derive(
        "comm.tensor", "GB", "reductions * layers * micro_batches * reduction",
        reductions=6 if layout.recompute == "full" else 4, layers=layers, micro_batches=micro_batches,
        reduction=sheet["comm.tensor.reduction"],
    )  # fmt: skip


def _experts(sheet: Sheet, shape: Shape, layout: Layout, tokens: int, layers: int, micro_batches: int) -> None:
    passes = 3 if layout.recompute == "full" else 2
    sheet.derive(
        "comm.experts", "GB",
        f"passes * 2 * {NARROW} * byte * tokens / tp * k * d * (ep - 1) / ep * layers * micro_batches",
        "tokens to their experts and back, forward and backward, in 2 bytes",
        passes=passes, tokens=tokens, tp=layout.tp, k=max(1, shape.top_k), d=shape.d_model, ep=layout.ep,
        layers=layers, micro_batches=micro_batches,
    )  # fmt: skip


def _data(sheet: Sheet, shape: Shape, layout: Layout) -> None:
    """Reduce-scatter of the gradients and all-gather of the weights; ZeRO-3 gathers weights for each pass."""
    counts = max(stage_counts(shape, layout), key=lambda c: c.per_gpu(layout))
    copies, expert_copies = layout.dp * layout.cp, layout.expert_dp
    gathers = 2 if layout.zero == 3 else 1
    sheet.derive(
        "comm.data", "GB",
        "byte * (gradients + gathers * weights) * ((sharded / tp + replicated) * (copies - 1) / copies"
        " + routed / expert_ranks * (expert_copies - 1) / expert_copies)",
        gradients=element_bytes(layout.gradients), weights=element_bytes(layout.weights), gathers=gathers,
        sharded=counts.sharded, tp=layout.tp, replicated=counts.replicated, routed=counts.routed,
        expert_ranks=layout.expert_ranks, copies=copies, expert_copies=expert_copies,
    )  # fmt: skip
