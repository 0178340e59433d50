"""How fast is every product of the expert MLP by itself, beside cuBLAS on the same product?

Apart: the products up, down, down_backward, dw_out, dw_in, dx, and what goes around them: route, gather, combine, gate.
Sides: the shipped kernel, the other path (tiles read through TMA, or through pointers) with its shipped tile, with
--neighbours N the first N tiles that `moe.kernels.tune` would try; a loop of torch.mm over the experts' rows, already
sorted (cuBLAS; of up and down_backward the product alone, without activation, h and dh), and torch's grouped_mm. Rows
say path, tile, registers, spills, shared memory, and the seconds of a cold compilation. Then the whole forward at
T = 1, 8, 64: the host's time to enqueue it, and what a CUDA graph of it takes.

TFLOP/s count the 2 MNK of the product, GB/s what it must read or write once (bfloat16: 2 bytes; R = T*K rows):

    up             4 R D F    rows of x, w_in -> h, act       R D + 2 E D F + 3 R F numbers
    down           2 R D F    act, w_out -> y                 R F + E D F + R D
    down_backward  2 R D F    rows of dy, w_out, h -> dh, act R D + E D F + 5 R F, and dweights
    dw_out         2 R D F    rows of dy, act -> dw_out       R D + R F + E D F
    dw_in          4 R D F    dh, rows of x -> dw_in          2 R F + R D + 2 E D F
    dx             4 R D F    dh, w_in -> dx of the rows      2 R F + 2 E D F + R D
    route          0          ids -> order, inverse           16 bytes a row
    gather         0          x -> rows                       T D + R D
    combine        2 R D      rows -> y                       R D + T D
    gate           0          logits -> weights, ids          T (4 E + 12 K) bytes

Every input is random; every result is compared with the reference, in float32 on two experts, before it is timed.
Run: python benchmarks/products.py [--shape gpt4-quarter ...] [--quick] [--neighbours N] [--json FILE] [--dry-run]

--once launches every shipped product once and times nothing, for
    ncu --clock-control none --profile-from-start off python benchmarks/products.py --once
--dry-run goes through all of it on a CPU, at a toy size, in Triton's interpreter: for checking the script, no figures.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import stop_without_gpu
from measure import Report, ceilings, difference, emptied, failure, head, lacking, medians, planned_rounds
from product_calls import (
    CUBLAS,
    GROUPED,
    MODULES,
    OURS,
    TORCH,
    Call,
    Data,
    around_calls,
    cublas_call,
    grouped_call,
    our_call,
    prepare,
    shipped,
    tile_of,
    variants,
    worst_difference,
)
from shapes import AROUND, DRY, PRODUCTS, SHAPES, Shape, product_work, products_bytes
from torch import Tensor

from moe.kernels import ops
from moe.kernels.tiles import Tiles

LIMIT = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative norms of differences
SECONDS, QUICK_SECONDS = 90, 35


class Run(NamedTuple):
    """What all products share."""

    device: str
    rounds: int
    neighbours: int
    report: Report
    used: dict[Any, dict[str, Any]]  # what a kernel needs, by path, product and tiles


# ------------------------------------------------------------------------------------------------ what was compiled


def compiled() -> dict[int, Any]:
    """Every kernel that Triton holds compiled, by identity; none in the interpreter."""
    found = {}
    for module in MODULES:
        for kernel in vars(module).values():
            for cache in getattr(kernel, "device_caches", {}).values():
                found |= {id(k): k for k in cache[0].values()}
    return found


def resources(before: dict[int, Any], seconds: float) -> dict[str, Any]:
    """Registers, spills and shared memory of the largest kernel that came since, and how long its compilation took."""
    new = [k for key, k in compiled().items() if key not in before and hasattr(k, "metadata")]
    if not new:
        return {}
    kernel = max(new, key=lambda k: k.metadata.shared)
    return {
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "compile_s": round(seconds, 2),
    }


# -------------------------------------------------------------------------------------------------------- the runs


def first_call(call: Call, device: str) -> tuple[Any, dict[str, Any]]:
    """The result of a call, and of what had to be compiled for it."""
    before, start = compiled(), time.perf_counter()
    found = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return found, resources(before, time.perf_counter() - start)


def compare(part: str, data: Data, what: dict[str, Any], run: "Run") -> None:
    """Report the rows of one product, or of one part around them."""
    device, tokens = run.device, len(data.x_TD)
    calls: dict[str, Call] = {}
    about: dict[str, dict[str, Any]] = {}
    if part in PRODUCTS:
        for v in variants(data, run.neighbours, part):
            calls[v.side] = our_call(part, data, v)
            about[v.side] = {"path": v.path, "tile": tile_text(v.sizes, part), "key": (v.path, tile_of(part), v.sizes)}
        calls |= {CUBLAS: cublas_call(part, data), GROUPED: grouped_call(part, data)}
    else:
        calls = around_calls(part, data)
    ready = dict(calls)
    # What only moves rows is held against torch.
    moved = None if part in PRODUCTS else calls[TORCH]()
    for side, call in calls.items():
        try:
            found, used = first_call(call, device)
            worst = worst_difference(part, data, found) if moved is None else difference(found, moved)
        except Exception as error:
            problem = failure(error)
        else:
            problem = "" if worst < LIMIT[data.x_TD.dtype] else f"WRONG, differs by {worst:.1e}; not timed"
            # dw_in and dw_out are one kernel, compiled once.
            key = about.setdefault(side, {}).pop("key", (part, side))
            about[side] |= run.used.setdefault(key, used) if used or key in run.used else {}
            del found
        if problem:
            run.report.note(problem, **what, product=part, side=side)
            del ready[side]
        emptied(device)
    problems: dict[str, str] = {}
    seconds = medians(ready, run.rounds, device, problems)
    for side, problem in problems.items():
        run.report.note(problem, **what, product=part, side=side)
    flop, moved_bytes = product_work(part, data.shape, tokens)
    for side, s in seconds.items():
        rival = seconds.get(CUBLAS)
        run.report.row(
            {
                **what, "product": part, "side": side, "ms": s * 1e3, "tflops": flop / s / 1e12,
                "gbs": moved_bytes / s / 1e9, "of_cublas": rival / s if rival else None, **about.get(side, {}),
            }
        )  # fmt: skip


def tile_text(sizes: Tiles, product: str) -> str:
    t = getattr(sizes, tile_of(product))
    text = f"{t.rows or sizes.rows}x{t.columns}x{t.depth}, {t.warps} warps, {t.stages} stages, groups of {t.group}"
    return text + (f", split {t.split}" if t.split > 1 else "")


def line(row: dict[str, Any]) -> str:
    text = f"  {row['product']:14} {row['side']:26} {row['ms']:9.3f} ms"
    text += f" {row['tflops']:6.0f} TFLOP/s {row['gbs']:6.0f} GB/s"
    if row["of_cublas"]:
        text += f" {row['of_cublas']:.2f}x cuBLAS"
    if "tile" in row:
        text += f"; {row['path']} {row['tile']}"
    if row.get("registers") is not None:
        text += f"; {row['registers']} registers, {row['spills']} spills, {row['shared']:,} B, {row['compile_s']} s"
    return text


def host_rows(data: Data, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Of the whole forward at few tokens: microseconds to enqueue it, to run it, and to replay a graph of it."""
    calls = {"ops.expert_mlp": ops.expert_mlp, "expert_mlp_inference": ops.expert_mlp_inference}
    few = [n for n in (1, 8, 64) if n <= len(data.x_TD)]
    for tokens in few:
        w = data.experts
        inputs = (data.x_TD[:tokens], w.w_in_EGFD, w.w_out_EDF, data.weights_TK[:tokens], data.ids_TK[:tokens])
        for name, op in calls.items():

            def call(op: Any = op, inputs: tuple[Tensor, ...] = inputs) -> None:
                with torch.no_grad():
                    op(*inputs, "swiglu")

            call()
            times = []
            for _ in range(3 if device == "cpu" else 50):
                if device != "cpu":
                    torch.cuda.synchronize()  # else a full queue would be waited for
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            yield {"tokens": tokens, "what": f"enqueue {name}", "us": statistics.median(times) * 1e6}
        if device == "cpu":
            continue
        yield {"tokens": tokens, "what": "run", "us": medians({"": call}, rounds, device)[""] * 1e6}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        yield {"tokens": tokens, "what": "graph replay", "us": medians({"": graph.replay}, rounds, device)[""] * 1e6}


def once(data: Data) -> None:
    """Every shipped product, launched once, between the marks that a profiler may wait for."""
    v = shipped(data)
    calls = {product: our_call(product, data, v) for product in PRODUCTS}
    cuda = data.x_TD.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for product, call in calls.items():
        call()
        print(f"  {product}: {v.path}, {tile_text(v.sizes, product)}")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def measure(data: Data, what: dict[str, Any], run: Run) -> None:
    for part in (*PRODUCTS, *AROUND):
        compare(part, data, what, run)
        emptied(run.device)
    if "host" not in run.report.record:
        host = run.report.record["host"] = []
        try:
            for row in host_rows(data, run.device, run.rounds):
                host.append(row)
                print(f"  T {row['tokens']:3} {row['what']:30} {row['us']:9.1f} us", flush=True)
        except Exception as error:
            run.report.note(failure(error), **what, side="the whole forward")


def planned(shapes: dict[str, Shape], neighbours: int, quick: bool, limit_s: float, rates: tuple[float, float]) -> int:
    """Rounds that fit: every product on 4 sides and its neighbours at two thirds of a large product's speed.

    At gpt4-quarter and 600 TFLOP/s a round is about 0.25 s; compiling 15 kernels, random weights and comparisons in
    float32 take 20 s more.
    """
    round_s = 0.0
    for shape in shapes.values():
        for part in (*PRODUCTS, *AROUND):
            flop, moved = product_work(part, shape, shape.tokens[0])
            sides = 4 + neighbours if part in PRODUCTS else 2
            round_s += sides * (1.5 * max(flop / rates[0] / 1e12, moved / rates[1] / 1e9) + 1e-3)
    fixed = 20.0 * len(shapes) + 6 * neighbours
    rounds, seconds = planned_rounds(round_s, fixed, limit_s, wanted=5 if quick else 15)
    print(f"plan: {rounds} rounds, about {seconds:.0f} s of {limit_s:.0f}")
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, help="default: gpt4-quarter, and without --quick nanochat"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one shape")
    parser.add_argument("--neighbours", type=int, default=0, metavar="N", help="other tiles to try of each product")
    parser.add_argument("--seconds", type=float, help=f"rounds are planned for it: {SECONDS}, {QUICK_SECONDS} if quick")
    parser.add_argument("--once", action="store_true", help="launch every shipped product once, for a profiler")
    parser.add_argument("--dry-run", action="store_true", help="a toy size on a CPU, in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    dry, quick = arguments.dry_run, arguments.quick
    stop_without_gpu(dry)
    device, dtype = ("cpu", torch.float16) if dry else ("cuda", torch.bfloat16)
    names = arguments.shape or (["gpt4-quarter"] if quick or arguments.once else ["gpt4-quarter", "nanochat"])
    shapes = {"toy": DRY["toy"]} if dry else {name: SHAPES[name] for name in names}
    if arguments.once:
        for shape in shapes.values():
            once(prepare(shape, shape.tokens[0], device, dtype))
        return
    first = head(device)
    product, copy = ceilings(device)
    limit_s = arguments.seconds or (QUICK_SECONDS if quick else SECONDS)
    rounds = 1 if dry else planned(shapes, arguments.neighbours, quick, limit_s, (product, copy))
    report = Report(arguments.json, {**first, "product_tflops": product, "copy_gbs": copy}, line)
    run = Run(device, rounds, arguments.neighbours, report, {})
    # Compiled in a folder of its own: seconds of compilation are those of a first run.
    with tempfile.TemporaryDirectory() as cold:
        if not dry:
            os.environ["TRITON_CACHE_DIR"] = cold
        for name, shape in shapes.items():
            tokens, what = shape.tokens[0], {"shape": name, "tokens": shape.tokens[0]}
            print(f"{name}: d {shape.d_model}, {shape.n_experts} x {shape.d_ff}, T {tokens}")
            if problem := lacking(products_bytes(shape, tokens), device):
                report.note(problem, **what)
                continue
            measure(prepare(shape, tokens, device, dtype), what, run)
            emptied(device)
    report.ended()
    done = {row["product"] for row in report.record["rows"] if row["side"] == OURS}
    if done != {*PRODUCTS, *AROUND}:
        raise SystemExit(f"not measured: {', '.join(sorted({*PRODUCTS, *AROUND} - done))}; see above")


if __name__ == "__main__":
    main()
