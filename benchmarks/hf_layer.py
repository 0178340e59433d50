"""One layer of experts inside a transformers Mixtral: `experts_implementation="gpt4_moe"` against their own.

The same module, weights, tokens and router; forward, and forward + backward; outputs and all gradients are compared
before anything is timed. The sides take turns, round by round; figures are medians.
Run: python benchmarks/hf_layer.py [--quick] [--dry-run] [--json FILE]
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import stop_without_gpu
from measure import FLUSHED, Report, difference, emptied, failure, head, lacking, medians
from torch import Tensor

MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
TOY = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
IMPLEMENTATIONS = ("gpt4_moe", "grouped_mm", "eager")
TOLERANCE = 2e-2  # relative norm of the difference from eager, in bfloat16


class Layer:
    """Mixtral's block of router and experts with random weights, whose experts run as they are told call by call."""

    def __init__(self, settings: dict[str, int], device: str, dtype: torch.dtype) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        # The public way to choose, set_experts_implementation, is a whole model's.
        self.config: Any = MixtralConfig(**settings)  # type: ignore[arg-type]
        self.config._experts_implementation = "eager"
        with torch.device(device):
            self.block: Any = MixtralSparseMoeBlock(self.config).to(dtype)
            with torch.no_grad():
                for p in self.block.parameters():
                    p.normal_(0, p.shape[-1] ** -0.5)

    def forward(self, name: str, x_BSD: Tensor) -> Tensor:
        self.config._experts_implementation = name
        y = self.block(x_BSD)
        return y if isinstance(y, Tensor) else y[0]

    def step(self, name: str, x_BSD: Tensor, dy_BSD: Tensor) -> tuple[Tensor, ...]:
        """y, dx and the gradients of the weights."""
        y = self.forward(name, x_BSD)
        return y, *torch.autograd.grad(y, [x_BSD, *self.block.parameters()], dy_BSD)


def peak_bytes(settings: dict[str, int], tokens: int, itemsize: int) -> int:
    """Of the most wasteful side while it is compared: eager's backward makes a gradient of a whole stack for one expert
    after another and adds it to the sum, beside the weights and the gradients to compare with."""
    D, F, E, K = settings.values()
    copies_of_weights, weights = 4, E * 3 * D * F
    row = (
        4 * F + 4 * D
    )  # sorted, pre-activations, activation, product and output, with what of their gradients is there
    return itemsize * (copies_of_weights * weights + tokens * K * row) + FLUSHED


def compared(layer: Layer, x_BSD: Tensor, dy_BSD: Tensor, report: Report) -> list[str]:
    """The sides that run here and agree with eager; says why of the others."""
    want, names, tokens = layer.step("eager", x_BSD, dy_BSD), [], x_BSD.shape[1]
    for name in IMPLEMENTATIONS:
        try:
            worst = difference(layer.step(name, x_BSD, dy_BSD), want)
        except Exception as error:
            report.note(failure(error), tokens=tokens, side=name)
            continue
        if worst < TOLERANCE:
            names.append(name)
        else:
            report.note(f"WRONG, differs from eager by {worst:.1e}; not timed", tokens=tokens, side=name)
    return names


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    what = f"T {row['tokens']:5} {row['kind']:18} {row['side']:12}"
    return f"  {what} {row['ms']:9.3f} ms  {row['ratio']:.2f}x our time"


def run(quick: bool, dry: bool, written: Path | None) -> list[dict[str, Any]]:
    """Print the table; returns its rows, each of which is written when it is there."""
    from moe.hf.experts import register_experts

    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    report = Report(written, head(device), line)
    register_experts("triton")
    settings, sizes = TOY if dry else MIXTRAL, []
    for tokens in (24,) if dry else (512, 8192):
        problem = lacking(peak_bytes(settings, tokens, dtype.itemsize), device)
        if problem:
            report.note(f"T {tokens} {problem}", tokens=tokens)
        else:
            sizes.append(tokens)
    if not sizes:
        return []
    torch.manual_seed(0)
    layer = Layer(settings, device, dtype)
    for tokens in sizes:
        x_BSD = torch.randn(1, tokens, settings["hidden_size"], device=device, dtype=dtype, requires_grad=True)
        dy_BSD = torch.randn_like(x_BSD)
        names = compared(layer, x_BSD, dy_BSD, report)
        emptied(device)
        kinds: dict[str, Callable[[str], Any]] = {
            "forward": lambda name, x=x_BSD: layer.forward(name, x.detach()),
            "forward + backward": lambda name, x=x_BSD, dy=dy_BSD: layer.step(name, x, dy),
        }
        for kind, call in kinds.items():
            problems: dict[str, str] = {}
            calls = {name: lambda name=name, call=call: call(name) for name in names}
            with torch.set_grad_enabled(kind != "forward"):
                found = medians(calls, 1 if dry else 5 if quick else 11, device, problems)
            for name, problem in problems.items():
                report.note(problem, tokens=tokens, kind=kind, side=name)
            for name, seconds in found.items():
                ratio = seconds / found.get("gpt4_moe", float("nan"))
                report.row({"tokens": tokens, "kind": kind, "side": name, "ms": seconds * 1e3, "ratio": ratio})
        emptied(device)
    report.ended()
    return report.record["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the record here, row by row")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    rows = run(arguments.quick, arguments.dry_run, arguments.json)
    if not rows or not all(row["ratio"] > 0 for row in rows):
        raise SystemExit("gpt4_moe did not run, or was wrong, at some size; see above")


if __name__ == "__main__":
    main()
