"""How fast are the output layer and its loss on this GPU, and how much memory do they take, against every peer here?

Forward and backward of the summed loss at the widths and vocabularies of our configurations, bfloat16: ours in Triton
and in torch, F.linear + F.cross_entropy, torch's own chunked F.linear_cross_entropy (its defaults, and summing in
float32 as ours does), and Liger's fused one (likewise). Loss and gradients are compared before anything is timed. The
sides take turns; figures are medians; FLOP are the 6 TDV of the algorithm.
Run: python benchmarks/linear_cross_entropy.py [--quick] [--dry-run] [--json FILE]

--dry-run goes through all of it on a CPU, at toy sizes, in Triton's interpreter: for checking the script, no figures.
"""

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from duel import stop_without_gpu
from measure import Report, ceilings, difference, emptied, failure, head, lacking, medians
from peers import available
from shapes import FLUSHED, SLACK
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "gpt4-moe"


class Shape(NamedTuple):
    tokens: int
    d_model: int
    vocab_size: int


SHAPES = {
    "replica-1b": Shape(32768, 768, 32768),
    "mixtral": Shape(8192, 4096, 32000),
    "odd vocabulary": Shape(16384, 768, 50257),
    "gpt4": Shape(8192, 10752, 100352),
}
DRY = {"toy": Shape(24, 16, 50)}


def ours(impl: str) -> Loss:
    from moe.kernels import ops

    return lambda x, w, targets: ops.linear_cross_entropy(x, w, targets, impl)


def plain(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), targets, reduction="sum")


def torch_chunked(acc_dtype: torch.dtype | None) -> Loss:
    """torch's own, from 2.13 on."""
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    function: Any = F.linear_cross_entropy  # type: ignore[attr-defined]
    chosen = options() if acc_dtype is None else options(acc_dtype=acc_dtype)
    return lambda x, w, targets: function(x, w, targets, reduction="sum", options=chosen)


def liger(acc_dtype: torch.dtype | None) -> Loss:
    module: Any = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=acc_dtype)
    return lambda x, w, targets: loss(w, x, targets)


SIDES: dict[str, Callable[[], Loss]] = {
    OURS: lambda: ours("triton"),
    "gpt4-moe, torch": lambda: ours("torch"),
    "F.linear + F.cross_entropy": lambda: plain,
    "torch, chunked": lambda: torch_chunked(None),
    "torch, chunked, float32 sums": lambda: torch_chunked(torch.float32),
    "Liger": lambda: liger(None),
    "Liger, float32 sums": lambda: liger(torch.float32),
}


def make(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x and w as a trained model might have them, and targets, one in ten of them to be ignored."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.tokens, shape.d_model, generator=g, device=device).to(dtype)
    w = torch.empty(shape.vocab_size, shape.d_model, device=device, dtype=dtype)
    w.normal_(0, 2 * shape.d_model**-0.5, generator=g)
    targets = torch.randint(shape.vocab_size, (shape.tokens,), generator=g, device=device)
    dropped = torch.rand(shape.tokens, generator=g, device=device) < 0.1
    return x, w, targets.masked_fill(dropped, -100)


def step(loss: Loss, x: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of x and w; the upstream gradient is that of a mean."""
    total = loss(x, w, targets)
    return total.detach(), *torch.autograd.grad(total / len(x), (x, w))


def peak_gib(call: Callable[[], Any], device: str) -> float:
    """Memory at the peak above what was there, the results included."""
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def peak_bytes(shape: Shape, itemsize: int = 2) -> int:
    """What a shape holds at most: of x and w themselves, gradients, and gradients kept for comparison; sums of dw in
    float32; and on the side that makes all logits, those, their softmax and the gradients of both."""
    T, D, V = shape
    return (T + V) * D * 3 * itemsize + V * D * 4 + 4 * T * V * itemsize + SLACK + FLUSHED


def compare(name: str, shape: Shape, losses: dict[str, Loss], rounds: int, device: str, report: Report) -> None:
    """Report the rows of one shape."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    what = {"shape": name, **shape._asdict()}
    if problem := lacking(peak_bytes(shape, dtype.itemsize), device):
        return report.note(problem, **what)
    x, w, targets = make(shape, device, dtype)
    x.requires_grad_()
    w.requires_grad_()
    want = step(losses["gpt4-moe, torch"], x, w, targets)
    calls: dict[str, Callable[[], Any]] = {}
    for side, loss in losses.items():
        try:
            worst = difference(step(loss, x, w, targets), want)
        except Exception as error:
            worst, problem = math.inf, failure(error)
        else:
            narrow = "WRONG, not timed" if side == OURS else "its sums are narrow"
            problem = "" if worst < 3e-2 else f"differs by {worst:.1e}; {narrow}"
            if not problem or side != OURS:
                calls[side] = lambda loss=loss: step(loss, x, w, targets)
        if problem:
            report.note(problem, **what, side=side)
            emptied(device)
    del want
    flop = 6 * shape.tokens * shape.d_model * shape.vocab_size
    problems: dict[str, str] = {}
    seconds = medians(calls, rounds, device, problems)
    for side, problem in problems.items():
        report.note(problem, **what, side=side)
    mine, peak = seconds.get(OURS, math.nan), report.record["product_tflops"]
    for side, s in seconds.items():
        report.row(
            {
                **what, "side": side, "ms": s * 1e3, "tflops": flop / s / 1e12,
                "of_cublas_peak": flop / s / 1e12 / peak, "ours_is_faster_by": s / mine,
                "peak_gib": peak_gib(calls[side], device),
            }
        )  # fmt: skip


def line(row: dict[str, Any]) -> str:
    return (
        f"  {row['side']:30} {row['ms']:9.3f} ms {row['tflops']:6.0f} TFLOP/s {row['of_cublas_peak']:5.0%} of cuBLAS; "
        f"{row['ours_is_faster_by']:.2f}x; peak {row['peak_gib']:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    device = "cpu" if arguments.dry_run else "cuda"
    rounds = 1 if arguments.dry_run else 3 if arguments.quick else 9
    first = head(device)
    losses = available(SIDES, device)
    product, copy = ceilings(device)
    report = Report(arguments.json, {**first, "product_tflops": product, "copy_gbs": copy}, line)
    for name, shape in (DRY if arguments.dry_run else SHAPES).items():
        print(f"{name}: T {shape.tokens}, d {shape.d_model}, V {shape.vocab_size}")
        try:
            compare(name, shape, losses, rounds, device, report)
        except torch.OutOfMemoryError as error:
            report.note(failure(error), shape=name, **shape._asdict())
        emptied(device)
    report.ended()
    rows = report.record["rows"]
    if not rows or any(math.isnan(row["ours_is_faster_by"]) for row in rows):
        raise SystemExit("gpt4-moe did not run, or was wrong, at some shape; see above")


if __name__ == "__main__":
    main()
