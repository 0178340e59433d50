"""How fast is the fused expert MLP on this GPU, against every peer that is here and against the hardware?

For each shape and routing (even, Zipf's, and what a trained router chose): forward, and forward + backward; time,
TFLOP/s, the fraction of a large cuBLAS product measured in the same run; memory kept for the backward and peak; and the
time of routing + gather + combine apart.
Results are compared before anything is timed. The sides take turns, round by round; figures are medians.
Run: python benchmarks/expert_mlp.py [--shape gpt4 ...] [--quick] [--dry-run] [--json FILE]

--dry-run goes through all of it on a CPU, at toy sizes, in Triton's interpreter: for checking the script, no figures.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from duel import machine, stop_without_gpu, write_record
from peers import Layer, cublas_loop, importable, ours
from torch import Tensor

from moe.profile import Trace


class Shape(NamedTuple):
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    tokens: tuple[int, ...]


SHAPES = {
    "gpt4": Shape(10752, 28672, 16, 2, (8192, 16384)),
    "gpt4-tp8": Shape(10752, 3584, 16, 2, (8192, 16384)),
    "mixtral": Shape(4096, 14336, 8, 2, (8192,)),
    "replica-1b": Shape(768, 2048, 16, 2, (8192, 32768)),
    "fine-grained": Shape(2048, 768, 128, 8, (8192,)),
    "gpt4 few": Shape(10752, 28672, 16, 2, (1, 8, 64, 512)),
    "mixtral few": Shape(4096, 14336, 8, 2, (1, 8, 64, 512)),
}
DRY = {"toy": Shape(64, 32, 16, 2, (8,)), "toy few": Shape(64, 32, 16, 2, (1,))}
TRACE = Path(__file__).parent / "traces" / "replica-nano"  # 8,192 held-out tokens of a trained router
FEW = ("gpt4 few", "mixtral few", "toy few")  # forward only: what decoding does


class Inputs(NamedTuple):
    x: Tensor
    w_in: Tensor
    w_out: Tensor
    weights: Tensor
    ids: Tensor


def make(shape: Shape, tokens: int, routing: str, device: str, dtype: torch.dtype, trace: Trace | None) -> Inputs:
    """Random inputs. "zipf": expert e is chosen with a probability that falls as 1 / (e + 1). "trace": as it says."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(0, std, generator=g)

    D, F, E, K = shape[:4]
    if routing == "balanced":
        from moe.kernels import ops
        from moe.kernels.experts import triton_routes as router

        ids = router.balanced_ids(tokens, E, K, device)[torch.randperm(tokens, generator=g, device=device)]
        weights = ops.topk_gate(torch.randn(tokens, K, device=device, generator=g), K)[0]
    elif trace is not None:
        ids = torch.from_numpy(traced_ids(trace, tokens)).to(device)
        weights = torch.rand(tokens, K, device=device, generator=g).softmax(-1)
    else:
        share = 1 / torch.arange(1, E + 1, device=device, dtype=torch.float32)
        ids = torch.multinomial(share.expand(tokens, E), K, generator=g)
        weights = torch.rand(tokens, K, device=device, generator=g).softmax(-1)
    return Inputs(normal(tokens, D), normal(E, 2, F, D, std=D**-0.5), normal(E, D, F, std=F**-0.5), weights, ids)


def traced_ids(trace: Trace, tokens: int) -> np.ndarray:
    """The experts [tokens, K] of the trace's most uneven layer; a shorter trace is gone through again."""
    ids_TLK = trace.ids_TLK(tokens)
    loads = [np.bincount(ids_TLK[:, layer].ravel(), minlength=trace.n_experts).max() for layer in range(trace.n_layers)]
    return np.resize(ids_TLK[:, int(np.argmax(loads))], (tokens, trace.top_k))


# ---------------------------------------------------------------------------------------------------------- measuring


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call on the device."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    # The GPU's second-level cache is emptied, as it would be by the rest of a model.
    _flush(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


_flusher: dict[str, Tensor] = {}


def _flush(device: str) -> None:
    if device not in _flusher:
        _flusher[device] = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    _flusher[device].zero_()


def medians(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call: two rounds that do not count, then `rounds`, the sides in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            seconds = timed(call, device)
            if round_ >= 2:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


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


def grad_leaves(inputs: Inputs) -> Inputs:
    x, w_in, w_out, weights = (t.detach().requires_grad_() for t in inputs[:4])
    return Inputs(x, w_in, w_out, weights, inputs.ids)


def step(layer: Layer, leaves: Inputs, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: y and the gradients."""
    y = layer(*leaves)
    return y, *torch.autograd.grad(y, leaves[:4], dy)


def difference(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest relative norm of differences, expert by expert where a tensor is large."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        parts = zip(a, b, strict=True) if a.ndim > 2 else [(a, b)]
        error = scale = 0.0
        for p, q in parts:
            error += (p.float() - q.float()).square().sum().item()
            scale += q.float().square().sum().item()
        worst = max(worst, (error / max(scale, 1e-30)) ** 0.5)
    return worst


def ceilings(device: str) -> tuple[float, float]:
    """TFLOP/s of a large cuBLAS product in bfloat16, and GB/s of a large copy (read + written)."""
    n = 8192 if device != "cpu" else 512
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    source = torch.empty(2**30 if device != "cpu" else 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    found = medians(calls, 20, device)
    return 2 * n**3 / found["product"] / 1e12, 2 * source.numel() / found["copy"] / 1e9


# ------------------------------------------------------------------------------------------------------------ the runs


def compare(
    name: str,
    shape: Shape,
    tokens: int,
    routing: str,
    rounds: int,
    device: str,
    dtype: torch.dtype,
    peak_tflops: float,
    trace: Trace,
) -> list[dict[str, Any]]:
    """Print and return the rows of one shape, size and routing."""
    inputs = make(shape, tokens, routing, device, dtype, trace if routing == "trace" else None)
    dy = torch.randn(inputs.x.shape, device=device, generator=torch.Generator(device).manual_seed(1)).to(dtype)
    few = name in FEW
    sides: dict[str, Layer] = {"gpt4-moe": ours("triton"), **importable(device)}
    if not few:
        sides["gpt4-moe, recompute"] = ours("triton", recompute=True)
    leaves = grad_leaves(inputs)
    want = step(ours("reference"), leaves, dy)
    tolerance = 3e-2
    for side, layer in list(sides.items()):
        try:
            worst = difference(step(layer, leaves, dy), want)
        except Exception as error:
            print(f"  {side}: does not run here: {type(error).__name__}: {str(error)[:200]}")
            del sides[side]
            continue
        if not worst < tolerance:
            print(f"  {side}: WRONG, differs by {worst:.1e}; not timed")
            del sides[side]
    del want
    counts = torch.bincount(inputs.ids.flatten(), minlength=shape.n_experts).tolist()
    loop_forward, loop_backward = cublas_loop(inputs.w_in, inputs.w_out, counts)
    x_RD = inputs.x.repeat_interleave(shape.top_k, 0)

    def no_grad(layer: Layer) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                layer(*inputs)

        return call

    forwards = {side: no_grad(layer) for side, layer in sides.items() if "recompute" not in side}
    forwards["cuBLAS loop, pre-sorted"] = lambda: loop_forward(x_RD)
    flop = 2 * tokens * shape.top_k * 3 * shape.d_model * shape.d_ff
    rows = _rows(name, tokens, routing, "forward", medians(forwards, rounds, device), flop, peak_tflops)
    if not few:
        both: dict[str, Callable[[], Any]] = {
            side: lambda layer=layer: step(layer, leaves, dy) for side, layer in sides.items()
        }
        both["cuBLAS loop, pre-sorted"] = lambda: (loop_forward(x_RD), loop_backward(x_RD))
        found = _rows(name, tokens, routing, "forward + backward", medians(both, rounds, device), 3 * flop, peak_tflops)
        for row in found:
            if row["side"] in sides:
                row["kept_gib"], row["peak_gib"] = memory_kept(sides[row["side"]], inputs, dy, device)
        rows += found
        if "gpt4-moe" in sides:
            rows.append(_overhead(name, tokens, routing, inputs, rounds, device, rows[0]["ms"]))
    for row in rows:
        print(_line(row), flush=True)
    return rows


def _rows(
    name: str, tokens: int, routing: str, kind: str, seconds: dict[str, float], flop: float, peak: float
) -> list[dict[str, Any]]:
    mine = seconds.get("gpt4-moe", float("nan"))
    return [
        {
            "shape": name,
            "tokens": tokens,
            "routing": routing,
            "kind": kind,
            "side": side,
            "ms": s * 1e3,
            "tflops": flop / s / 1e12,
            "of_cublas_peak": flop / s / 1e12 / peak,
            "ours_is_faster_by": s / mine,
        }
        for side, s in seconds.items()
    ]


def _overhead(
    name: str, tokens: int, routing: str, inputs: Inputs, rounds: int, device: str, forward_ms: float
) -> dict[str, Any]:
    """Routing, gather and combine of a forward, alone."""
    from moe.kernels.experts import triton_routes as router
    from moe.kernels.experts import triton_rows

    rows_RD = inputs.x.repeat_interleave(inputs.ids.shape[1], 0)

    def call() -> None:
        routes = router.cut(*router.place(inputs.ids, len(inputs.w_in)), 128)
        triton_rows.gather(inputs.x, routes, inputs.ids.shape[1])
        triton_rows.combine(rows_RD, inputs.weights, routes, inputs.ids.shape)

    ms = medians({"all": call}, rounds, device)["all"] * 1e3
    return {
        "shape": name,
        "tokens": tokens,
        "routing": routing,
        "kind": "routing + gather + combine",
        "side": "gpt4-moe",
        "ms": ms,
        "of_forward": ms / forward_ms,
    }


def _line(row: dict[str, Any]) -> str:
    text = f"  {row['kind']:27} {row['side']:34} {row['ms']:9.3f} ms"
    if "tflops" in row:
        text += f" {row['tflops']:6.0f} TFLOP/s {row['of_cublas_peak']:5.0%} of cuBLAS; {row['ours_is_faster_by']:.2f}x"
    if "kept_gib" in row:
        text += f"; keeps {row['kept_gib']:.2f} GiB, peak {row['peak_gib']:.2f}"
    if "of_forward" in row:
        text += f" = {row['of_forward']:.1%} of the forward"
    return text


def routings(name: str, shape: Shape, first: bool, trace: Trace) -> list[str]:
    """What a shape is measured with: real skew at its first size, where the trace has as many experts."""
    if name in FEW:
        return ["balanced"]
    fits = (trace.n_experts, trace.top_k) == (shape.n_experts, shape.top_k)
    return ["balanced", "zipf", *["trace"] * (fits and first)]


def run(names: list[str], quick: bool, dry: bool, written: Path | None, trace: Trace) -> list[dict[str, Any]]:
    """The whole benchmark; returns its rows. The record is written after every shape: a run cut short leaves those."""
    device = "cpu" if dry else "cuda"
    dtype = torch.float32 if dry else torch.bfloat16
    shapes = DRY if dry else {name: SHAPES[name] for name in names}
    rounds = 1 if dry else 5 if quick else 11
    where = machine() if dry else f"{torch.cuda.get_device_name()}; {machine()}"
    print(where)
    product, copy = ceilings(device)
    print(f"ceilings: {product:.0f} TFLOP/s (cuBLAS, 8192^3), {copy:.0f} GB/s (copy)\n")
    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        for tokens in shape.tokens[:1] if quick and name not in FEW else shape.tokens:
            for routing in routings(name, shape, tokens == shape.tokens[0], trace):
                print(f"{name}: d {shape.d_model}, {shape.n_experts} x {shape.d_ff}, T {tokens}, {routing}")
                try:
                    rows += compare(name, shape, tokens, routing, rounds, device, dtype, product, trace)
                except torch.OutOfMemoryError as error:
                    print(f"  out of memory: {str(error)[:120]}")
                if not dry:
                    torch.cuda.empty_cache()
                write_record(written, {"machine": where, "product_tflops": product, "copy_gbs": copy, "rows": rows})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, the smaller size of each shape")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument("--trace", type=Path, default=TRACE, help="real skew: what moe profile routing --trace wrote")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    trace = Trace.open(arguments.trace)
    rows = run(arguments.shape, arguments.quick, arguments.dry_run, arguments.json, trace)
    if any(math.isnan(row.get("ours_is_faster_by", 1.0)) for row in rows):
        raise SystemExit("gpt4-moe did not run, or was wrong, at some shape; see above")


if __name__ == "__main__":
    main()
