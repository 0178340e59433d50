"""How fast is the fused expert MLP on this GPU, against every peer that is here and against the hardware?

For each shape and routing (even, Zipf's, what a trained router chose, and at one shape every workload of routings.py):
forward, and forward + backward; time, TFLOP/s, the fraction of a large cuBLAS product measured in the same run; memory
kept for the backward and peak; and the time of routing + gather + combine apart. The nanochat layer, with its router
and shared expert, stands beside a dense MLP of the same FLOP.
Results are compared before anything is timed. The sides take turns, round by round; figures are medians.
What a shape holds at its peak is computed (shapes.py) and must fit the card before it is started; what does not fit, or
runs out of memory all the same, is said to, and takes nothing else with it.
Run: python benchmarks/expert_mlp.py [--shape gpt4 ...] [--quick] [--seconds N] [--dry-run] [--json FILE]

--dry-run goes through all of it on a CPU, at toy sizes, in Triton's interpreter: for checking the script, no figures.
"""

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    # Sides that hold gigabytes in different pieces take turns: blocks that cannot grow would be freed while timed.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import dense
import torch
from duel import stop_without_gpu
from measure import (
    Report,
    ceilings,
    difference,
    emptied,
    failure,
    head,
    lacking,
    medians,
    out_of_memory,
    planned_rounds,
)
from peers import CublasLoop, Layer, importable, ours
from routings import ROUTINGS, WORKLOADS, traced
from shapes import COMPARED, DRY, FEW, IMBALANCED, SHAPES, Shape, peak_bytes
from torch import Tensor

from moe.profile import Trace

TRACE = Path(__file__).parent / "traces" / "replica-nano"  # 8,192 held-out tokens of a trained router
OURS, RECOMPUTE, LOOP = "gpt4-moe", "gpt4-moe, recompute", "cuBLAS loop, pre-sorted"
KINDS = {OURS: "ours", RECOMPUTE: "recompute", "torch grouped_mm (our `grouped`)": "grouped"}  # of shapes.side_bytes
TOLERANCE = 3e-2
SECONDS, QUICK_SECONDS = 160, 70
QUICK = ("gpt4-quarter", "nanochat", "mixtral", "gpt4", "gpt4-tp8", "gpt4 few")


class Inputs(NamedTuple):
    x: Tensor
    w_in: Tensor
    w_out: Tensor
    weights: Tensor
    ids: Tensor


class Case(NamedTuple):
    name: str
    shape: Shape
    tokens: int
    routing: str

    @property
    def few(self) -> bool:
        return self.name in FEW

    @property
    def has_layer(self) -> bool:
        """Whether the whole layer is measured too, beside a dense MLP."""
        return self.name in ("nanochat", "toy") and self.routing == "balanced"

    @property
    def what(self) -> dict[str, Any]:
        """The first columns of a row."""
        return {"shape": self.name, "tokens": self.tokens, "routing": self.routing}


class Bench(NamedTuple):
    """What all cases share."""

    device: str
    dtype: torch.dtype
    rounds: int
    product_tflops: float
    peers: dict[str, Layer]
    report: Report


def make(case: Case, ids_TK: Tensor, device: str, dtype: torch.dtype) -> Inputs:
    """Random normal inputs."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(0, std, generator=g)

    D, F, E, K = case.shape[:4]
    weights = torch.randn(case.tokens, K, device=device, generator=g).softmax(-1)
    x, w_in, w_out = normal(case.tokens, D), normal(E, 2, F, D, std=D**-0.5), normal(E, D, F, std=F**-0.5)
    return Inputs(x, w_in, w_out, weights, ids_TK.to(device))


# ---------------------------------------------------------------------------------------------------------- measuring


def grad_leaves(inputs: Inputs) -> Inputs:
    x, w_in, w_out, weights = (t.detach().requires_grad_() for t in inputs[:4])
    return Inputs(x, w_in, w_out, weights, inputs.ids)


def step(layer: Layer, leaves: Inputs, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: y and the gradients."""
    y = layer(*leaves)
    return y, *torch.autograd.grad(y, leaves[:4], dy)


def forward(layer: Layer, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return layer(*inputs)


def compared(layer: Layer, leaves: Inputs, dy: Tensor, experts: list[int], few: bool) -> list[Tensor]:
    """What sides are compared by: y; and dx, dweights and dw of the experts named, so that no dw need be kept."""
    if few:
        return [forward(layer, leaves)]
    y, dx, dw_in, dw_out, dweights = step(layer, leaves, dy)
    return [y.detach(), dx, dweights, *(dw[e] for e in experts for dw in (dw_in, dw_out))]


def right_sides(case: Case, sides: dict[str, Layer], leaves: Inputs, dy: Tensor, bench: Bench) -> dict[str, Layer]:
    """The sides whose results are those of the reference; notes why the others are not among them."""
    # The busiest expert and the idlest, which may have no row: its gradient must be zeros.
    loads = torch.bincount(leaves.ids.flatten(), minlength=case.shape.n_experts)
    experts = loads.argsort(descending=True)[[0, -1]].tolist()[:COMPARED]
    want = [t.clone() for t in compared(ours("reference"), leaves, dy, experts, case.few)]
    right = {}
    for side, layer in sides.items():
        emptied(bench.device)
        try:
            worst = difference(compared(layer, leaves, dy, experts, case.few), want)
        except Exception as error:
            problem = failure(error)
        else:
            problem = "" if worst < TOLERANCE else f"WRONG, differs by {worst:.1e}; not timed"
        if problem:
            bench.report.note(problem, **case.what, side=side)
        else:
            right[side] = layer
    return right


def memory_kept(layer: Layer, inputs: Inputs, dy: Tensor, device: str) -> tuple[float, float]:
    """GiB that a forward leaves for its backward (its output not counted), and the peak above what was there."""
    if device == "cpu":
        return 0.0, 0.0
    leaves = grad_leaves(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(*leaves)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    y.backward(dy)
    peak = torch.cuda.max_memory_allocated() - before
    return kept / 2**30, peak / 2**30


# ------------------------------------------------------------------------------------------------------------ the runs


def compare(case: Case, ids_TK: Tensor, bench: Bench) -> None:
    """Report the rows of one shape, size and routing."""
    shape, few, device, report = case.shape, case.few, bench.device, bench.report
    itemsize, loads = bench.dtype.itemsize, torch.bincount(ids_TK.flatten(), minlength=shape.n_experts).tolist()
    sides: dict[str, Layer] = {OURS: ours("triton"), **bench.peers}
    if not few:
        sides[RECOMPUTE] = ours("triton", recompute=True)

    def short(kind: str) -> str | None:
        return lacking(peak_bytes(shape, case.tokens, kind, few, itemsize, max(loads))["all"], device)

    if problem := short("reference") or short("ours"):
        return report.note(problem, **case.what)
    for side in list(sides):
        if problem := short(KINDS.get(side, "a peer")):
            report.note(problem, **case.what, side=side)
            del sides[side]
    inputs = make(case, ids_TK, device, bench.dtype)
    dy = torch.randn(inputs.x.shape, device=device, generator=torch.Generator(device).manual_seed(1)).to(bench.dtype)
    leaves = grad_leaves(inputs)
    sides = right_sides(case, sides, leaves, dy, bench)
    emptied(device)
    forwards: dict[str, Callable[[], Any]] = {
        side: lambda layer=layer: forward(layer, inputs) for side, layer in sides.items() if side != RECOMPUTE
    }
    both: dict[str, Callable[[], Any]] = {
        side: lambda layer=layer: step(layer, leaves, dy) for side, layer in sides.items()
    }
    try:
        loop, x_RD = CublasLoop(inputs.w_in, inputs.w_out, loads, not few), inputs.x.repeat_interleave(shape.top_k, 0)
        forwards[LOOP] = lambda: loop.forward(x_RD)
        both[LOOP] = lambda: (loop.forward(x_RD), loop.backward(x_RD))
    except torch.OutOfMemoryError as error:
        report.note(failure(error), **case.what, side=LOOP)
    flop = shape.flop(case.tokens)
    mine = timed_rows(case, "forward", forwards, flop, bench)
    if few:
        return

    def memory(side: str) -> dict[str, float]:
        if side not in sides:
            return {}
        kept, peak = memory_kept(sides[side], inputs, dy, device)
        return {"kept_gib": kept, "peak_gib": peak}

    timed_rows(case, "forward + backward", both, 3 * flop, bench, memory)
    if not math.isnan(mine):
        report.row(_overhead(case, inputs, bench, mine * 1e3))


def timed_rows(
    case: Case,
    kind: str,
    calls: dict[str, Callable[[], Any]],
    flop: float,
    bench: Bench,
    more: Callable[[str], dict[str, float]] = lambda side: {},
) -> float:
    """Time the sides and report a row of each; returns the seconds of ours, NaN where it has none."""
    problems: dict[str, str] = {}
    seconds = medians(calls, bench.rounds, bench.device, problems)
    for side, problem in problems.items():
        bench.report.note(f"{problem} ({kind})", **case.what, side=side)
    mine = seconds.get(OURS, math.nan)
    for side, s in seconds.items():
        row = {
            **case.what, "kind": kind, "side": side, "ms": s * 1e3, "tflops": flop / s / 1e12,
            "of_cublas_peak": flop / s / 1e12 / bench.product_tflops, "ours_is_faster_by": s / mine,
        }  # fmt: skip
        try:
            row |= more(side)
        except Exception as error:
            bench.report.note(f"{failure(error)} (its memory)", **case.what, side=side)
        bench.report.row(row)
    return mine


def _overhead(case: Case, inputs: Inputs, bench: Bench, forward_ms: float) -> dict[str, Any]:
    """Routing, gather and combine of a forward, alone."""
    from moe.kernels.experts import triton_routes as router
    from moe.kernels.experts import triton_rows

    rows_RD = inputs.x.repeat_interleave(inputs.ids.shape[1], 0)

    def call() -> None:
        routes, _ = router.route(inputs.ids, len(inputs.w_in), 128)
        triton_rows.gather(inputs.x, routes, inputs.ids.shape[1])
        triton_rows.combine(rows_RD, inputs.weights, routes, inputs.ids.shape)

    ms = medians({"all": call}, bench.rounds, bench.device)["all"] * 1e3
    kind = "routing + gather + combine"
    return {**case.what, "kind": kind, "side": OURS, "ms": ms, "of_forward": ms / forward_ms}


def line(row: dict[str, Any]) -> str:
    text = f"  {row['kind']:27} {row['side']:34} {row['ms']:9.3f} ms"
    if "tflops" in row:
        text += f" {row['tflops']:6.0f} TFLOP/s {row['of_cublas_peak']:5.0%} of cuBLAS; {row['ours_is_faster_by']:.2f}x"
    if "kept_gib" in row:
        text += f"; keeps {row['kept_gib']:.2f} GiB, peak {row['peak_gib']:.2f}"
    if "of_forward" in row:
        text += f" = {row['of_forward']:.1%} of the forward"
    return text


# ------------------------------------------------------------------------------------------------------------ the plan


def routings(name: str, shape: Shape, first: bool, quick: bool, trace: Trace) -> list[str]:
    """What a shape is measured with; real skew and every workload at its first size, where they fit it."""
    if name in FEW:
        return ["balanced"]
    if quick:
        return ["balanced", "zipf"]
    fits = (trace.n_experts, trace.top_k) == (shape.n_experts, shape.top_k)
    rest = list(WORKLOADS)[1:] if name in IMBALANCED and first else []
    return ["balanced", *["zipf"] * first, *["trace"] * (fits and first), *rest]


def cases(names: list[str], quick: bool, dry: bool, trace: Trace) -> list[Case]:
    shapes = DRY if dry else {name: SHAPES[name] for name in names}
    return [
        Case(name, shape, tokens, routing)
        for name, shape in shapes.items()
        for tokens in (shape.tokens[:1] if quick and name not in FEW else shape.tokens)
        for routing in routings(name, shape, tokens == shape.tokens[0], quick, trace)
    ]


def round_seconds(case: Case, n_peers: int, product_tflops: float, copy_gbs: float) -> float:
    """About how long one round of all sides takes, each at two thirds of a large product, or of the memory's speed."""
    weights = case.shape.weights() * min(1, case.tokens * case.shape.top_k / case.shape.n_experts)
    one = 1.5 * max(case.shape.flop(case.tokens) / product_tflops / 1e12, weights / copy_gbs / 1e9)
    return one * (n_peers + 2) if case.few else one * (n_peers + 2 + 3 * (n_peers + 3))


def routed(case: Case, trace: Trace) -> Tensor:
    """The ids [T, K] of its routing."""
    if case.routing == "trace":
        return traced(trace, case.tokens)
    return ROUTINGS[case.routing](case.tokens, case.shape.n_experts, case.shape.top_k, 0)


def attempt(case: Case, bench: Bench, measure: Callable[[], None]) -> None:
    """What fails of a case is noted, and the next one is measured."""
    try:
        measure()
    except Exception as error:
        bench.report.note(failure(error), **case.what)
        if not out_of_memory(error):
            traceback.print_exc()
    emptied(bench.device)


def plan(
    todo: list[Case], n_peers: int, product_tflops: float, copy_gbs: float, limit_s: float, wanted: int
) -> tuple[int, float]:
    """Rounds that fit the seconds left, and the seconds that they take.

    With two peers an H100 (600 TFLOP/s, 2,600 GB/s) takes about 11 s a round for all shapes, 5 s for those of --quick.
    Random weights and compilation are put at 2 s a shape, comparison at half a second a routing.
    """
    round_s = sum(round_seconds(case, n_peers, product_tflops, copy_gbs) for case in todo)
    return planned_rounds(round_s, 2.0 * len({case.name for case in todo}) + 0.5 * len(todo), limit_s, wanted)


def run(names: list[str], quick: bool, dry: bool, limit_s: float, written: Path | None, trace: Trace) -> dict[str, Any]:
    """The whole benchmark; returns its record, which is written after every row."""
    started, device = time.perf_counter(), "cpu" if dry else "cuda"
    first = head(device)
    product, copy = ceilings(device)
    print(f"ceilings: {product:.0f} TFLOP/s (cuBLAS, 8192^3), {copy:.0f} GB/s (copy)")
    report = Report(written, {**first, "product_tflops": product, "copy_gbs": copy}, line)
    peers, todo = importable(device), cases(names, quick, dry, trace)
    left_s, wanted = limit_s - (time.perf_counter() - started), 5 if quick else 11
    rounds, planned = (1, 0.0) if dry else plan(todo, len(peers), product, copy, left_s, wanted)
    print(f"plan: {len(todo)} cases, {rounds} rounds, about {planned:.0f} s of {limit_s:.0f}\n")
    dtype = torch.float32 if dry else torch.bfloat16
    bench = Bench(device, dtype, rounds, product, peers, report)
    for case in todo:
        shape = case.shape
        print(f"{case.name}: d {shape.d_model}, {shape.n_experts} x {shape.d_ff}, T {case.tokens}, {case.routing}")
        if time.perf_counter() - started > limit_s and not dry:
            report.note(f"left out: {limit_s:.0f} s have passed", **case.what)
            continue
        attempt(case, bench, lambda case=case: compare(case, routed(case, trace), bench))
        if case.has_layer:
            attempt(case, bench, lambda case=case: dense.compare(case.what, case.shape, case.tokens, bench, False))
    for case in todo:
        if case.has_layer and not quick and not dry:  # last, as it compiles for half a minute
            attempt(case, bench, lambda case=case: dense.compare(case.what, case.shape, case.tokens, bench, True))
    report.ended()
    return report.record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: all; the first six with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shapes, the smaller size of each")
    parser.add_argument("--seconds", type=float, help=f"rounds are planned for it: {SECONDS}, {QUICK_SECONDS} if quick")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument("--trace", type=Path, default=TRACE, help="real skew: what moe profile routing --trace wrote")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    quick, trace = arguments.quick, Trace.open(arguments.trace)
    names = arguments.shape or list(QUICK if quick else SHAPES)
    limit_s = arguments.seconds or (QUICK_SECONDS if quick else SECONDS)
    record = run(names, quick, arguments.dry_run, limit_s, arguments.json, trace)
    rows, broken = record["rows"], any("does not run" in n["problem"] and "side" not in n for n in record["notes"])
    if not rows or broken or any(math.isnan(row.get("ours_is_faster_by", 1.0)) for row in rows):
        raise SystemExit("gpt4-moe did not run, or was wrong, at some shape; see above")


if __name__ == "__main__":
    main()
