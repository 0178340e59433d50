"""Curves over batch, context, precision and chips: latency, throughput and utilisation, the three axes of serving."""

import csv
import io
from collections.abc import Iterable, Sequence

from moe.plan.decode import decode
from moe.plan.experts import touched
from moe.plan.hardware import load_hardware
from moe.plan.layout import Layout
from moe.plan.memory import serving_memory
from moe.plan.models import Model, load_shape

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


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV text with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
