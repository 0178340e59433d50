"""Which way of computing the expert MLP is fastest on this CPU, from one token to thousands?

Float32, forward and forward + backward, in turns: the op as the model trains with it and, forward, as it decodes with
it; the body behind `grouped` (which the op takes here) without the op and autograd around it; and `reference`, which
serves the dtypes and widths that torch's grouped product refuses. Prints medians in ms and each one's time relative to
the op's. Run: python benchmarks/expert_cpu.py [--rounds 15] [--json FILE]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from duel import machine, write_record
from expert_mlp import medians

from moe.device import tune_cpu
from moe.kernels import ops
from moe.kernels.experts import grouped

SHAPES = {"replica-nano": (192, 512), "replica-small": (384, 1024)}  # D, F
N_EXPERTS, TOP_K = 16, 2
SIZES = (1, 8, 64, 512, 4096)  # tokens

Calls = tuple[Callable[[], Any], Callable[[], Any] | None]


def contestants(d_model: int, d_ff: int, tokens: int) -> dict[str, Calls]:
    """Name -> (forward, forward + backward) on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d_model, generator=generator)
    w_in = torch.randn(N_EXPERTS, 2, d_ff, d_model, generator=generator) / d_model**0.5
    w_out = torch.randn(N_EXPERTS, d_model, d_ff, generator=generator) / d_ff**0.5
    weights, ids = ops.topk_gate(torch.randn(tokens, N_EXPERTS, generator=generator), TOP_K)
    dy = torch.randn(tokens, d_model, generator=generator)
    inputs = (x, w_in, w_out, weights)

    def through_op(impl: str | None) -> Calls:
        leaves = [t.clone().requires_grad_() for t in inputs]
        a, b, c, d = leaves

        def both() -> None:
            torch.autograd.grad(ops.expert_mlp(a, b, c, d, ids, "swiglu", impl), leaves, dy)

        return lambda: ops.expert_mlp(*inputs, ids, "swiglu", impl), both

    def body() -> None:
        grouped.backward(dy, *inputs, *grouped.forward(*inputs, ids, "swiglu")[1:], "swiglu")

    return {
        "op": through_op(None),
        "op, decoding": (lambda: ops.expert_mlp_inference(*inputs, ids, "swiglu"), None),
        "grouped": (lambda: grouped.forward(*inputs, ids, "swiglu"), body),
        "reference": through_op("reference"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    tune_cpu()
    print(machine(), "\n")
    rows = []
    for config, (d_model, d_ff) in SHAPES.items():
        for tokens in SIZES:
            sides = contestants(d_model, d_ff, tokens)
            for index, kind in enumerate(("forward", "forward + backward")):
                calls = {n: both[index] for n, both in sides.items()}
                seconds = medians({n: call for n, call in calls.items() if call}, arguments.rounds, "cpu")
                result = {n: s * 1e3 for n, s in seconds.items()}
                row = "  ".join(f"{n} {ms:8.2f} ({ms / result['op']:4.2f}x)" for n, ms in result.items())
                print(f"{config:14} T {tokens:5} {kind:18}  {row}")
                rows.append({"config": config, "tokens": tokens, "kind": kind, "ms": result})
    write_record(arguments.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
