"""What each pass of an engine had to compute and to move, from the experts that it really touched, beside its time.

Three figures for the experts of a layer stand side by side: counted; expected of even, independent routing,
E (1 - (1 - k/E)^T); and min(k T, E), which others' rooflines assume. The floor of a pass is the longer of FLOP over
peak and bytes over bandwidth; what is predicted is the floor with the expected number.

Shape suffixes: L layers that have experts, T tokens, K experts of a token, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from moe.device import device_name
from moe.plan.hardware import Hardware, device_hardware
from moe.plan.passes import Bytes, PassLoad, Span, expected_experts, most_experts, pass_load
from moe.plan.quantities import quantity
from moe.plan.shape import Shape, shape_of
from moe.profile import Ceilings, measure_ceilings
from moe.serve.engine import Engine, Step


@dataclass(frozen=True)
class Pass:
    """One pass. Experts are means over the layers; seconds are those of the model's pass alone, host_seconds those of
    guessing, planning and sampling."""

    tokens: int
    requests: int
    experts: float  # distinct, that got a token
    experts_expected: float
    experts_most: float
    tokens_per_expert: float  # of those that got one
    busiest: float  # tokens of the busiest expert
    load: PassLoad
    floor: float  # seconds
    predicted: float
    seconds: float
    host_seconds: float

    @property
    def roofline_fraction(self) -> float:
        """1 is as fast as this machine could be."""
        return self.floor / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, float]:
        """Flat, for tables and files."""
        own = {k: v for k, v in vars(self).items() if k != "load"}
        load = {"flop": self.load.flop, "bytes": self.load.bytes, "expert_bytes": self.load.experts}
        return {**own, **load, "kv_bytes": self.load.kv, "roofline_fraction": self.roofline_fraction}


class Roofline:
    """The passes of an engine while `watch` was on."""

    def __init__(self, engine: Engine, machine: Hardware) -> None:
        self.machine, self.name = machine, engine.model.cfg.name
        self.shape = shape_of(engine.model.cfg)
        weight = engine.model.embedding.weight
        self.dtype = DTYPES.get(weight.dtype, str(weight.dtype).removeprefix("torch."))
        self.size = _sizes(engine)
        self._seen: list[tuple[list[Span], int, Tensor, float, float]] = []

    def __call__(self, step: Step) -> None:
        """Takes a step; nothing is counted yet, for that would take time of its own."""
        spans = [(work.start, work.n) for work in step.works]
        wanted = sum(work.n_drafts + 1 for work in step.works if work.samples)
        ids_LTK = torch.stack([ids_TK for ids_TK, _ in step.routing or ()])
        # On CUDA whoever chooses tokens waits for the model.
        seconds = step.forward_s + (step.sample_s if ids_LTK.is_cuda else 0.0)
        host = step.propose_s + step.schedule_s + step.forward_s + step.sample_s - seconds
        self._seen.append((spans, wanted, ids_LTK, seconds, host))

    def passes(self) -> list[Pass]:
        """What was seen so far."""
        peak = self.machine.peak(self.machine.compute_dtype(self.dtype)).to("FLOP/s")
        return [_pass(self.shape, self.size, *one, peak, self.machine.bandwidth.to("B/s")) for one in self._seen]

    def plan_rows(self) -> list[dict[str, Any]]:
        """Rows for `moe plan calibrate`, a pass each."""
        fixed = {"kind": "serve", "name": self.name, "device": self.machine.name, "dtype": self.dtype}
        return [
            {**fixed, "tokens": p.tokens, "flop": p.load.flop, "bytes": p.load.bytes, "seconds": p.seconds}
            for p in self.passes()
        ]


@contextmanager
def watch(engine: Engine, machine: Hardware) -> Iterator[Roofline]:
    """Listens to the engine's steps inside the block."""
    found = Roofline(engine, machine)
    with engine.listening(found):
        yield found


def _pass(
    shape: Shape, size: Bytes, spans: Sequence[Span], wanted: int, ids_LTK: Tensor, seconds: float, host: float,
    peak: float, bandwidth: float,
) -> Pass:  # fmt: skip
    tokens = sum(n for _, n in spans)
    counts_LE = nn.functional.one_hot(ids_LTK.long().flatten(1), shape.n_experts).sum(1)
    distinct_L = (counts_LE > 0).sum(1).tolist()
    expected = expected_experts(shape, tokens)
    load, predicted = (pass_load(shape, spans, wanted, experts, size) for experts in (distinct_L, expected))
    touched = max(1, sum(distinct_L))
    return Pass(
        tokens=tokens,
        requests=len(spans),
        experts=_mean(distinct_L),
        experts_expected=_mean(expected),
        experts_most=_mean(most_experts(shape, tokens)),
        tokens_per_expert=float(counts_LE.sum()) / touched,
        busiest=_mean(counts_LE.amax(1).tolist()),
        load=load,
        floor=load.floor(peak, bandwidth),
        predicted=predicted.floor(peak, bandwidth),
        seconds=seconds,
        host_seconds=host,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# --------------------------------------------------------------------------------------------------------- the machine

# What the planner calls them.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def machine(device: torch.device, dtype: torch.dtype) -> Hardware:
    """What this device is for the planner: its data sheet where it is one that is shipped, else what it reaches now.

    Measured are a large product in the dtype and a large copy, as by `moe profile step`; links and price are none.
    """
    name = device_name(device)
    return device_hardware(name) or _measured(name, measure_ceilings(device, dtype), DTYPES.get(dtype, "fp32"))


def _measured(name: str, ceilings: Ceilings, dtype: str) -> Hardware:
    peaks = {"fp32": quantity(ceilings.product_fp32, "FLOP/s"), dtype: quantity(ceilings.product, "FLOP/s")}
    nothing = quantity(1, "B/s")
    return Hardware(
        name, quantity(1, "GB"), quantity(ceilings.copy, "B/s"), 1, nothing, nothing, quantity(0, "USD/h"), peaks
    )


def _sizes(engine: Engine) -> Bytes:
    """Bytes of an element, as the engine stores them."""
    pool, pages, size = engine.scheduler.pool, engine.runner.pages, engine.model.embedding.weight.element_size()
    cached = sum(layer.attention.cached for layer in shape_of(engine.model.cfg).layers)
    # Scales of keys and values in eight bits are among the bytes; one block more is there for what nobody reads.
    held = sum(kept.nbytes for pair in (*pages.layers, *(pages.scales or ())) for kept in pair)
    kv = held / ((pool.n_blocks + 1) * pool.block_size * cached)
    return Bytes(size, 1 if engine.quantization else size, kv)
