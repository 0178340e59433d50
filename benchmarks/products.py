"""How fast is every product of the expert MLP by itself, beside cuBLAS on the same product?

Apart: the products up, down, down_backward, dw_out, dw_in, dx, and what goes around them: route, gather, combine, gate.
Sides: the shipped kernel, the other path (tiles read through TMA, or through pointers) with its shipped tile; a loop of
torch.mm over the experts' rows, already sorted (cuBLAS; of up and down_backward the product alone, without activation,
h and dh), and torch's grouped_mm. Other tiles are `moe.kernels.tune`'s. Rows say path, tile, registers, spills, shared
memory, and the seconds of a cold compilation. Then the whole forward at T = 1, 8, 64: the host's time to enqueue it,
and what a CUDA graph of it takes.

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
Run: python benchmarks/products.py [--shape gpt4-quarter ...] [--quick] [--json FILE] [--dry-run]

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import stop_without_gpu
from measure import Report, ceilings, difference, emptied, failure, head, lacking, medians, planned_rounds
from product_calls import (
    CUBLAS,
    GROUPED,
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
from triton.runtime import driver

from moe.kernels import ops, tiles
from moe.kernels.tiles import Tiles

LIMIT = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative norms of differences
SECONDS, QUICK_SECONDS = 90, 35
DEFAULT = ("gpt4-quarter", "nanochat")


class Run(NamedTuple):
    """What all products share."""

    device: str
    rounds: int
    report: Report
    used: dict[Any, dict[str, Any]]  # what a kernel needs, by path, product and tiles


# ------------------------------------------------------------------------------------------------ what was compiled


@contextmanager
def noting(found: list[dict[str, Any]]) -> Iterator[None]:
    """Inside, what each kernel needs that Triton loads is added to `found`. Nothing is in the interpreter."""
    if tiles.INTERPRETED:
        yield
        return
    active: Any = driver.active
    load = active.utils.load_binary

    def noted(name: str, binary: bytes, shared: int, device: int) -> Any:
        loaded = load(name, binary, shared, device)
        _, _, registers, spills, *_ = loaded
        found.append({"kernel": name, "registers": registers, "spills": spills, "shared": shared})
        return loaded

    with patch.object(active.utils, "load_binary", noted):
        yield


# -------------------------------------------------------------------------------------------------------- the runs


def first_call(call: Call, device: str) -> tuple[Any, dict[str, Any]]:
    """The result of a call, and what the kernel needs that had to be compiled for it, with the seconds that took."""
    kernels: list[dict[str, Any]] = []
    start = time.perf_counter()
    with noting(kernels):
        found = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = round(time.perf_counter() - start, 2)
    # A product's is the one with the most shared memory.
    return found, max(kernels, key=lambda k: k["shared"]) | {"compile_s": seconds} if kernels else {}


class Side(NamedTuple):
    call: Call
    about: dict[str, Any]  # path and tile, then what its kernel needs
    known: tuple[Any, ...] = ()  # by which a kernel that is compiled already is found in `Run.used`


def sides_of(part: str, data: Data) -> dict[str, Side]:
    """Ours and the rivals, of a product or of a part around them."""
    if part not in PRODUCTS:
        return {name: Side(call, {}) for name, call in around_calls(part, data).items()}
    sides = {}
    for v in variants(data, part):
        # Both weights' gradients are often one kernel.
        known = tuple((v.path, name, v.sizes) for name in (part, tile_of(part)))
        about = {"path": v.path, "tile": tile_text(v.sizes, part)}
        sides[v.side] = Side(our_call(part, data, v), about, known)
    return sides | {CUBLAS: Side(cublas_call(part, data), {}), GROUPED: Side(grouped_call(part, data), {})}


def problem_of(part: str, data: Data, side: Side, run: Run) -> str:
    """Why a side is not timed, "" where its result is right; its first call says what its kernel needs."""
    try:
        found, used = first_call(side.call, run.device)
        if part in PRODUCTS:
            worst = worst_difference(part, data, found)
        else:
            worst = difference(found, around_calls(part, data)[TORCH]())  # what only moves rows is held against torch
    except Exception as error:
        return failure(error)
    for key in side.known if used else ():
        run.used.setdefault(key, used)
    side.about.update(used or next((run.used[key] for key in side.known if key in run.used), {}))
    return "" if worst < LIMIT[data.x_TD.dtype] else f"WRONG, differs by {worst:.1e}; not timed"


def compare(part: str, data: Data, what: dict[str, Any], run: Run) -> None:
    """Report the rows of one product, or of one part around them."""
    sides, problems = sides_of(part, data), {}
    for name, side in list(sides.items()):
        if problem := problem_of(part, data, side, run):
            problems[name] = problem
            del sides[name]
        emptied(run.device)
    seconds = medians({name: side.call for name, side in sides.items()}, run.rounds, run.device, problems)
    for name, problem in problems.items():
        run.report.note(problem, **what, product=part, side=name)
    flop, moved = product_work(part, data.shape, len(data.x_TD))
    for name, s in seconds.items():
        of_cublas = {"of_cublas": seconds[CUBLAS] / s} if CUBLAS in seconds else {}
        row = {"ms": s * 1e3, "tflops": flop / s / 1e12, "gbs": moved / s / 1e9, **of_cublas, **sides[name].about}
        run.report.row({**what, "product": part, "side": name, **row})


def tile_text(sizes: Tiles, product: str) -> str:
    t = getattr(sizes, tile_of(product))
    text = f"{t.rows or sizes.rows}x{t.columns}x{t.depth}, {t.warps} warps, {t.stages} stages, groups of {t.group}"
    return text + (f", split {t.split}" if t.split > 1 else "")


def line(row: dict[str, Any]) -> str:
    text = f"  {row['product']:14} {row['side']:26} {row['ms']:9.3f} ms"
    text += f" {row['tflops']:6.0f} TFLOP/s {row['gbs']:6.0f} GB/s"
    if "of_cublas" in row:
        text += f" {row['of_cublas']:.2f}x cuBLAS"
    if "tile" in row:
        text += f"; {row['path']} {row['tile']}"
    if "registers" in row:
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
        yield {"tokens": tokens, "what": f"run {name}", "us": medians({"": call}, rounds, device)[""] * 1e6}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        yield {
            "tokens": tokens,
            "what": f"graph replay {name}",
            "us": medians({"": graph.replay}, rounds, device)[""] * 1e6,
        }


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


def planned(shapes: dict[str, Shape], quick: bool, limit_s: float, rates: tuple[float, float]) -> int:
    """Rounds that fit: every product on 4 sides, each at two thirds of a large product's speed.

    At gpt4-quarter and 600 TFLOP/s a round is about 0.25 s; compiling 12 kernels takes some 20 s, random
    weights and comparisons in float32 up to 10 s a shape.
    """
    round_s = 0.0
    for shape in shapes.values():
        for part in (*PRODUCTS, *AROUND):
            flop, moved = product_work(part, shape, shape.tokens[0])
            sides = 4 if part in PRODUCTS else 2
            round_s += sides * (1.5 * max(flop / rates[0] / 1e12, moved / rates[1] / 1e9) + 1e-3)
    rounds, seconds = planned_rounds(round_s, 20.0 + 10.0 * len(shapes), limit_s, wanted=5 if quick else 21)
    print(f"plan: {rounds} rounds, about {seconds:.0f} s of {limit_s:.0f}")
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, help="default: gpt4-quarter, and without --quick nanochat"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one shape")
    parser.add_argument("--seconds", type=float, help=f"rounds are planned for it: {SECONDS}, {QUICK_SECONDS} if quick")
    parser.add_argument("--once", action="store_true", help="launch every shipped product once, for a profiler")
    parser.add_argument("--dry-run", action="store_true", help="a toy size on a CPU, in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    dry, quick = arguments.dry_run, arguments.quick
    stop_without_gpu(dry)
    device, dtype = ("cpu", torch.float16) if dry else ("cuda", torch.bfloat16)
    names = arguments.shape or DEFAULT[: 1 if quick or arguments.once else None]
    shapes = {"toy": DRY["toy"]} if dry else {name: SHAPES[name] for name in names}
    if arguments.once:
        for shape in shapes.values():
            once(prepare(shape, shape.tokens[0], device, dtype))
        return
    first = head(device)
    product, copy = ceilings(device)
    limit_s = arguments.seconds or (QUICK_SECONDS if quick else SECONDS)
    rounds = 1 if dry else planned(shapes, quick, limit_s, (product, copy))
    report = Report(arguments.json, {**first, "product_tflops": product, "copy_gbs": copy}, line)
    run = Run(device, rounds, report, {})
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
