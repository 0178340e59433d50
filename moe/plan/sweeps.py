"""Curves over batch, context, precision and chips: latency, throughput and utilisation, the three axes of serving.

And the KV cache of multi-query, grouped and multi-head attention, with the sequences that each leaves room for.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace

from moe.errors import ConfigError
from moe.plan.bounds import whole
from moe.plan.experts import touched
from moe.plan.hardware import hardware_names, load_hardware
from moe.plan.layout import Layout
from moe.plan.memory import serving_memory
from moe.plan.models import Model, load_shape
from moe.plan.serving import decode
from moe.plan.shape import Shape

AXES = ("latency", "throughput", "utilisation")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

Row = dict[str, str | int | float | bool]


def sweep(
    model: Model,
    layouts: Iterable[Layout],
    hardware: Iterable[str],
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = (8192,),
    weights: Sequence[str] = ("bf16",),
    collectives: bool = True,
) -> list[Row]:
    """A row for every combination: settings, then latency (ms), tokens/s of a user, throughput (tokens/s), utilisation
    (a share), cost (USD per 1k tokens), distinct experts, sequences in flight and whether they fit in memory.

    Raises:
        ConfigError: a layout that does not fit the model, no such hardware, a batch or context that cannot be.
    """
    shape = load_shape(model)
    rows: list[Row] = []
    for name in hardware:
        hw = load_hardware(name)
        for base in layouts:
            for dtype in weights:
                layout = base.replace(weights=dtype)
                for context in contexts:
                    room = serving_memory(shape, layout, hw, context)["memory.max_sequences"].value
                    for batch in batches:
                        made = decode(shape, layout, hw, batch=batch, context=context, collectives=collectives)
                        rows.append(
                            {
                                "hardware": name,
                                "layout": layout.name,
                                "gpus": layout.gpus,
                                "weights": dtype,
                                "context": context,
                                "batch": batch,
                                "in_flight": batch * layout.pp,
                                "fits": batch * layout.pp <= room,
                                "experts": touched(shape.n_experts, shape.top_k, batch) if shape.n_experts else 0.0,
                                "latency_ms": made["decode.latency"].to("ms"),
                                "per_user": made["decode.per_user"].to("token/s"),
                                "throughput": made["decode.throughput"].to("token/s"),
                                "utilisation": made["decode.utilisation"].to("x"),
                                "usd_per_1k": made["decode.cost"].to("USD/ktoken"),
                            }
                        )
    return rows


def kv_room(
    model: Model,
    layout: Layout,
    hardware: Sequence[str] | None = None,
    *,
    contexts: Sequence[int] = (8192, 32768),
    kv_heads: Sequence[int] | None = None,
) -> list[Row]:
    """A row for each number of key/value heads, context and card: GB of KV cache of one sequence, and how many
    sequences fit in flight, with the cache split by heads and by sequences.

    Args:
        hardware: by default every shipped card of which a node has several.
        kv_heads: by default 1 (multi-query), 8 (grouped) and one per query head (multi-head).

    Raises:
        ConfigError: a number of heads that does not divide the query heads; latent attention, which has none; and as
            `serving_memory`.
    """
    shape = load_shape(model)
    heads = shape.main.attention.n_heads
    cards = hardware or [name for name in hardware_names() if load_hardware(name).node_size > 1]
    rows: list[Row] = []
    for n in kv_heads or (1, 8, heads):
        other = _with_kv_heads(shape, n)
        for context in contexts:
            for name in cards:
                hw = load_hardware(name)
                made = {
                    sharding: serving_memory(other, layout.replace(kv_sharding=sharding), hw, context)
                    for sharding in ("heads", "batch")
                }
                rows.append(
                    {
                        "attention": "MQA" if n == 1 else "MHA" if n == heads else f"GQA-{n}",
                        "context": context,
                        "hardware": name,
                        "gb_per_sequence": made["heads"]["kv.sequence"].to("GB"),
                        "split_by_heads": int(made["heads"]["memory.max_sequences"].value),
                        "split_by_sequences": int(made["batch"]["memory.max_sequences"].value),
                    }
                )
    return rows


def _with_kv_heads(shape: Shape, n: int) -> Shape:
    """The same model with another number of key/value heads in every layer."""
    layers = []
    for layer in shape.layers:
        a = layer.attention
        if a.kv_rank:
            raise ConfigError(f"{shape.name}: has latent attention: its cache does not depend on key/value heads")
        whole(kv_heads=n)
        if a.n_heads % n:
            raise ConfigError(f"kv_heads = {n}: must divide the {a.n_heads} query heads")
        layers.append(replace(layer, attention=replace(a, n_kv_heads=n)))
    return replace(shape, layers=tuple(layers))


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV text with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
