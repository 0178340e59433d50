"""Which way of computing the expert MLP is fastest on this CPU, from one token to thousands?

`reference`, `grouped` (our loop over experts, what the model uses on CPU) and torch's `grouped_mm` in the same
forward and backward, in turns, for float32. Prints medians in ms and each one's time relative to `grouped`. The last
is called without the op and autograd around it, which the first two pay for.
Run: python benchmarks/expert_cpu.py [--rounds 15]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from duel import machine

from moe.kernels import grouped, ops, reference
from moe.train.cpu import tune_cpu

SHAPES = {"replica-nano": (192, 512), "replica-small": (384, 1024)}  # D, F
N_EXPERTS, TOP_K = 16, 2
SIZES = (1, 8, 64, 512, 4096)  # tokens


def contestants(d_model: int, d_ff: int, tokens: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name -> (forward, forward + backward) on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d_model, generator=generator)
    w_in = torch.randn(N_EXPERTS, 2, d_ff, d_model, generator=generator) / d_model**0.5
    w_out = torch.randn(N_EXPERTS, d_model, d_ff, generator=generator) / d_ff**0.5
    weights, ids = reference.topk_gate(torch.randn(tokens, N_EXPERTS, generator=generator), TOP_K)
    dy = torch.randn(tokens, d_model, generator=generator)
    inputs = (x, w_in, w_out, weights)

    def through_op(impl: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        a, b, c, d = leaves

        def both() -> None:
            torch.autograd.grad(ops.expert_mlp(a, b, c, d, ids, "swiglu", impl), leaves, dy)

        return lambda: ops.expert_mlp(*inputs, ids, "swiglu", impl), both

    def torch_both() -> None:
        saved = grouped.grouped_mm_forward(*inputs, ids, "swiglu")[1:]
        grouped.grouped_mm_backward(dy, *inputs, *saved, "swiglu")

    return {
        "reference": through_op("reference"),
        "grouped": through_op("grouped"),
        "grouped_mm": (lambda: grouped.grouped_mm_forward(*inputs, ids, "swiglu"), torch_both),
    }


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median ms of each call, run in turns after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    tune_cpu()
    print(machine(), "\n")
    for config, (d_model, d_ff) in SHAPES.items():
        for tokens in SIZES:
            sides = contestants(d_model, d_ff, tokens)
            for kind, index in (("forward", 0), ("forward + backward", 1)):
                result = medians({name: calls[index] for name, calls in sides.items()}, rounds)
                row = "  ".join(f"{n} {ms:8.2f} ({ms / result['grouped']:4.2f}x)" for n, ms in result.items())
                print(f"{config:14} T {tokens:5} {kind:18}  {row}")


if __name__ == "__main__":
    main()
