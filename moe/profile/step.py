"""One step, component by component: time, FLOP/s, bytes/s, and how much of the machine's roofline that is.

The ceilings are measured in the same process: a large matrix product and a large copy. A floor is the greater of FLOP
over the first and bytes over the second (Williams et al. 2009); FLOP and bytes are those of moe/plan/work.py.

    model = moe.load("runs/demo/final")
    run = profile.make_run(model, "backward", torch.randint(8192, (16, 257)))
    print(profile.profile_step(model, run).rows)
"""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import Config
from moe.model import Transformer
from moe.plan import step_work
from moe.plan.experts import touched
from moe.plan.work import What, Work
from moe.profile.stopwatch import Part, timing
from moe.serve.blocks import BLOCK_SIZE, blocks_for
from moe.serve.pages import Pages, Segment
from moe.serve.runner import Runner


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: FLOP/s of a large product in the step's dtype and in float32, bytes/s of a copy."""

    product: float
    product_fp32: float
    copy: float


@dataclass(frozen=True)
class Row:
    """One component in one phase. Seconds are the median over the measured steps; None where there is no floor."""

    component: str
    phase: str
    calls: int
    seconds: float
    flop: float | None = None
    bytes: float | None = None
    floor: float | None = None  # seconds

    @property
    def roofline_fraction(self) -> float | None:
        """The floor over the time: 1 is as fast as this machine could be."""
        return None if self.floor is None or not self.seconds else self.floor / self.seconds


@dataclass(frozen=True)
class Run:
    """A step that can be repeated, and what it is. Made by `make_run`."""

    call: Callable[[], Any]
    what: What
    batch: int
    seq_len: int
    context: int
    dtype: torch.dtype
    work: dict[Part, Work]


@dataclass(frozen=True)
class StepProfile:
    """What `profile_step` found; `plain_seconds` is the median of the same step with nothing measured inside."""

    config: str
    what: What
    batch: int
    seq_len: int
    context: int
    dtype: str
    device: str
    plain_seconds: float
    seconds: float
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)  # the longest first

    @property
    def floor(self) -> float:
        """The sum of the floors, in seconds."""
        return sum(row.floor or 0.0 for row in self.rows)

    def plan_row(self) -> dict[str, Any]:
        """A row for `moe plan calibrate`: FLOP and bytes of all parts, seconds with nothing measured inside."""
        return {
            "kind": self.what,
            "name": self.config,
            "device": self.device,
            "dtype": self.dtype,
            "tokens": self.batch * self.seq_len,
            "flop": sum(row.flop or 0.0 for row in self.rows),
            "bytes": sum(row.bytes or 0.0 for row in self.rows),
            "seconds": self.plain_seconds,
        }


# ------------------------------------------------------------------------------------------------------- what is run


def random_model(cfg: Config, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """A model with random weights, made where and as they are stored: no second copy, even for a moment."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Transformer(cfg)
    finally:
        torch.set_default_dtype(before)


def make_run(
    model: Transformer,
    what: What,
    tokens_BS: Tensor,
    *,
    dtype: torch.dtype | None = None,
    optimizer: Any = None,
    context: int = 0,
) -> Run:
    """A step of `model`, ready to be repeated.

    Args:
        what: "forward" gives the logits of all positions, "backward" adds the loss and its gradients, "train" an
            optimizer step; "decode" one more token after `context` cached positions.
        tokens_BS: int64 ids, [B, S + 1] for steps with a loss, [B, S] for "forward", [B, 1] for "decode".
        dtype: of the products; another than that of the weights means autocast.
        optimizer: for "train": has step() and zero_grad().
        context: positions in the cache, for "decode".

    Raises:
        ValueError: "train" without an optimizer, or decoding beyond the model's context.
    """
    weight = model.embedding.weight
    dtype = dtype or weight.dtype
    device = tokens_BS.device.type

    def autocast() -> torch.autocast:
        return torch.autocast(device, dtype=dtype, enabled=dtype != weight.dtype)

    def forward() -> None:
        with torch.no_grad(), autocast():
            model(tokens_BS)

    def backward() -> None:
        with autocast():
            loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:]).loss
        loss.backward()
        if what == "train":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad()

    if what == "train" and optimizer is None:
        raise ValueError('what = "train" needs an optimizer; "backward" does without')
    batch, length = tokens_BS.shape[0], tokens_BS.shape[1] - (what in ("backward", "train"))
    call: Callable[[], Any] = forward if what == "forward" else backward
    if what == "decode":
        call = _decode(model, tokens_BS[:, -1], context)
        length = 1
    work = step_work(
        model.cfg,
        batch,
        length,
        what,
        activation_bytes=dtype.itemsize,
        weight_bytes=weight.dtype.itemsize,
        context=context,
        # Of even, independent choices: what a floor can count on without looking.
        experts=touched(model.cfg.experts.n_experts, model.cfg.experts.top_k, batch * length),
        gathered=_rows_are_copied(model, batch * length, dtype),
    )
    return Run(call, what, batch, length, context, dtype, work)


def _decode(model: Transformer, tokens_B: Tensor, context: int) -> Callable[[], Any]:
    if not 0 <= context < model.cfg.max_seq_len:
        raise ValueError(f"context = {context}: must be at least 0 and less than max_seq_len = {model.cfg.max_seq_len}")
    weight = model.embedding.weight
    each = blocks_for(context + 1)
    pages = Pages(model.cfg, len(tokens_B) * each, BLOCK_SIZE, weight.dtype, weight.device)
    for layer in pages.layers:
        for stored in layer:
            stored.normal_()
    runner, tokens = Runner(model, pages), tokens_B.tolist()
    segments = [Segment([token], context, range(i * each, (i + 1) * each)) for i, token in enumerate(tokens)]
    return lambda: runner(segments, range(len(segments)))


def _rows_are_copied(model: Transformer, tokens: int, dtype: torch.dtype) -> bool:
    """Whether the expert op copies its rows into order, rather than gather them inside the product."""
    moe: Any = model.blocks[-1].moe
    if moe.experts.w_in_EGFD.device.type != "cuda":
        return True
    from moe.kernels.experts import triton_mlp

    x_TD = torch.empty(tokens, model.cfg.d_model, dtype=dtype, device=moe.experts.w_in_EGFD.device)
    experts = triton_mlp.Experts(moe.experts.w_in_EGFD.to(dtype), moe.experts.w_out_EDF.to(dtype), None, None)
    return triton_mlp.copies_rows(x_TD, experts, tokens * moe.router.top_k)


# ---------------------------------------------------------------------------------------------------------- measuring


def profile_step(model: Transformer, run: Run, *, rounds: int = 5) -> StepProfile:
    """Measures `run`: two steps that do not count, then `rounds` plain and measured ones and the ceilings, in turns.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: must be at least 1")
    device = model.embedding.weight.device
    measure_ceilings = _CeilingMeter(device, run.dtype)
    plain: list[float] = []
    whole: list[float] = []
    parts: dict[Part, list[float]] = defaultdict(list)
    calls: dict[Part, int] = {}
    ceilings = measure_ceilings()
    for n in range(rounds + 2):
        seconds = _seconds(run.call, device)
        with timing(model) as t:
            run.call()
        ceilings = measure_ceilings()
        if n < 2:
            continue
        plain.append(seconds)
        whole.append(t.total)
        for part, value in t.seconds.items():
            parts[part].append(value)
            calls[part] = t.calls[part]
    rows = [_row(part, calls[part], values, rounds, run.work.get(part), ceilings) for part, values in parts.items()]
    return StepProfile(
        config=model.cfg.name,
        what=run.what,
        batch=run.batch,
        seq_len=run.seq_len,
        context=run.context,
        dtype=str(run.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        plain_seconds=statistics.median(plain),
        seconds=statistics.median(whole),
        ceilings=ceilings,
        rows=sorted(rows, key=lambda row: -row.seconds),
    )


def _row(part: Part, calls: int, values: list[float], rounds: int, work: Work | None, ceilings: Ceilings) -> Row:
    # A part that some steps do not have took no time in those.
    seconds = statistics.median([*values, *[0.0] * (rounds - len(values))])
    if work is None:
        return Row(*part, calls, seconds)
    peak = ceilings.product_fp32 if work.wide else ceilings.product
    return Row(*part, calls, seconds, work.flop, work.bytes, max(work.flop / peak, work.bytes / ceilings.copy))


def measure_ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 3) -> Ceilings:
    """The ceilings of a device, the best of some samples."""
    meter = _CeilingMeter(device, dtype)
    return [meter() for _ in range(rounds)][-1]


class _CeilingMeter:
    """Takes a sample of each ceiling per call; returns the best so far."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.products = [self._product(8192 if cuda else 1024, torch.float32)]
        if dtype != torch.float32:
            self.products.append(self._product(8192 if cuda else 512, dtype))
        source = torch.ones(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
        self.copied = source, torch.empty_like(source)
        self.best = Ceilings(0.0, 0.0, 0.0)

    def _product(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a = torch.randn(n, n, device=self.device, dtype=dtype)
        return a, torch.empty_like(a)

    def __call__(self) -> Ceilings:
        rates = [2 * len(a) ** 3 / _best(lambda a=a, c=c: torch.mm(a, a, out=c), self.device) for a, c in self.products]
        source, target = self.copied
        copy = 2 * source.numel() / _best(lambda: target.copy_(source), self.device)
        best = self.best
        self.best = Ceilings(max(best.product, rates[-1]), max(best.product_fp32, rates[0]), max(best.copy, copy))
        return self.best


def _best(call: Callable[[], Any], device: torch.device) -> float:
    return min(_seconds(call, device) for _ in range(3))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


# -------------------------------------------------------------------------------------------------------------- trace


@dataclass(frozen=True)
class Memory:
    """Allocated bytes over a step: seconds since its beginning, bytes, and the phase at that moment.

    On CUDA all that is allocated; on a CPU what the step adds to what was there.
    """

    seconds: list[float]
    bytes: list[int]
    phases: list[str]


def trace_step(model: Transformer, run: Run, path: Path | None = None) -> Memory:
    """Runs the step once under torch.profiler; writes a Chrome trace with the components in it where a path is given.

    On CUDA the components are also NVTX ranges, for Nsight Systems.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr when it starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.embedding.weight.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
        timing(model, annotate=True),
    ):
        run.call()
    with tempfile.TemporaryDirectory() as directory:
        target = path or Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(target))
        events = json.loads(target.read_text(encoding="utf-8"))["traceEvents"]
    return _memory(events, device_type=1 if model.embedding.weight.is_cuda else 0)


def _memory(events: list[dict[str, Any]], device_type: int) -> Memory:
    """From a Chrome trace: its "[memory]" instants, in the phases that the annotations around them name."""
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"].rpartition(" ")[2])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].endswith(("forward", "backward", "recompute", "update"))
    )
    instants = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == device_type]
    instants.sort(key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in instants] if device_type else _added(e["args"] for e in instants)
    times = [e["ts"] for e in instants]
    start = min([ts for ts, *_ in ranges] + times, default=0.0)
    phases, phase, i = [], "", 0
    for ts in times:
        while i < len(ranges) and ranges[i][0] <= ts:
            phase = ranges[i][2]
            i += 1
        phases.append(phase)
    return Memory([(ts - start) / 1e6 for ts in times], totals, phases)


def _added(changes: Iterable[dict[str, Any]]) -> list[int]:
    """The bytes allocated within the trace and not yet freed, after each of these changes on a CPU.

    The profiler's own total goes on from the last trace of the process, and never learns what was freed in between.
    """
    live: dict[int, int] = {}  # address -> bytes
    total, totals = 0, []
    for change in changes:
        total -= live.pop(change["Addr"], 0)
        if change["Bytes"] > 0:
            live[change["Addr"]] = change["Bytes"]
            total += change["Bytes"]
        totals.append(total)
    return totals
