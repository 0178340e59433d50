"""One layer of experts inside a transformers Mixtral: `experts_implementation="gpt4_moe"` against their own.

The same module, weights, tokens and router; forward, and forward + backward; outputs compared before timing.
Run: python benchmarks/hf_layer.py [--quick] [--dry-run] [--json FILE]
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import machine, stop_without_gpu, write_record
from expert_mlp import difference, medians

MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
TOY = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
IMPLEMENTATIONS = ("gpt4_moe", "grouped_mm", "eager")


def run(quick: bool, dry: bool) -> dict[str, Any]:
    """Print the table; returns the record."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from moe.hf.experts import register_experts

    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    register_experts("triton")
    settings: dict[str, Any] = TOY if dry else MIXTRAL
    config = MixtralConfig(**settings)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    with torch.device(device):
        block: Any = MixtralSparseMoeBlock(config).to(dtype)
        with torch.no_grad():
            for p in block.parameters():
                p.normal_(0, p.shape[-1] ** -0.5)
    rows = []
    for tokens in (24,) if dry else (512, 8192):
        x = torch.randn(1, tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn_like(x)

        def forward(name: str, x: torch.Tensor = x) -> torch.Tensor:
            config._experts_implementation = name
            y = block(x)
            return y if isinstance(y, torch.Tensor) else y[0]

        def step(name: str, x: torch.Tensor = x, dy: torch.Tensor = dy) -> tuple[torch.Tensor, ...]:
            y = forward(name)
            return y, *torch.autograd.grad(y, [x, *block.parameters()], dy)

        names, want = [], step("eager")
        for name in IMPLEMENTATIONS:
            try:
                worst = difference(step(name), want)
            except Exception as error:
                print(f"  {name}: does not run here: {type(error).__name__}: {str(error)[:200]}")
                continue
            if worst < 3e-2:
                names.append(name)
            else:
                print(f"  {name}: differs from eager by {worst:.1e}; not timed")
        del want
        rounds = 1 if dry else 5 if quick else 11
        for kind, call in (("forward", forward), ("forward + backward", step)):
            found = medians({n: lambda n=n, call=call: call(n) for n in names}, rounds, device)
            for name, seconds in found.items():
                ratio = seconds / found.get("gpt4_moe", float("nan"))
                print(f"  T {tokens:5} {kind:18} {name:12} {seconds * 1e3:9.3f} ms  {ratio:.2f}x our time")
                rows.append({"tokens": tokens, "kind": kind, "side": name, "ms": seconds * 1e3, "ratio": ratio})
    return {"machine": machine(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    record = run(arguments.quick, arguments.dry_run)
    write_record(arguments.json, record)
    if not all(row["ratio"] > 0 for row in record["rows"]):
        raise SystemExit("gpt4_moe did not run, or was wrong, at some size; see above")


if __name__ == "__main__":
    main()
