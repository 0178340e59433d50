"""Where the time of a step goes on this GPU: a whole layer of the full GPT-4 width, and a training step of replica-1b.

Per component: time, FLOP/s, bytes/s, and the share of the roofline measured in the same run (moe.profile). The layer
has its 14.8 billion expert weights and the output layer in bfloat16, with gradients some 72 GiB.
Run: python benchmarks/step.py [--quick] [--dry-run] [--json FILE] [--pictures DIR]
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import machine, stop_without_gpu, write_record

import moe
from moe import profile
from moe.config import Config
from moe.train.optimizer import build

LAYER = ["n_layers=1"]


def cases(dry: bool) -> list[tuple[str, Config, str, int, int]]:
    """(name, configuration, what, batch, tokens of each sequence: for decoding those in the cache)."""
    if dry:
        tiny = moe.load_config("replica-tiny").with_overrides([*LAYER, "experts.d_ff=64"])
        return [("layer", tiny, "backward", 1, 16), ("layer", tiny, "decode", 2, 16), ("replica", tiny, "train", 1, 16)]
    layer = moe.load_config("gpt4-8k").with_overrides(LAYER)
    return [
        ("one layer of gpt4-8k", layer, "backward", 1, 8192),
        ("one layer of gpt4-8k", layer, "decode", 64, 8192),
        ("replica-1b", moe.load_config("replica-1b"), "train", 8, 2048),
    ]


def measure(cfg: Config, what: Any, batch: int, length: int, rounds: int, device: str) -> tuple[Any, Any]:
    """The profile of one step, and its memory."""
    # As in training: weights in float32 under autocast; else as they are multiplied.
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    model = profile.random_model(cfg, torch.float32 if what == "train" else compute, device)
    columns = 1 if what == "decode" else length + 1
    tokens = torch.randint(cfg.vocab_size, (batch, columns), device=device)
    optimizer = build(model, cfg.train) if what == "train" else None
    context = length - 1 if what == "decode" else 0
    run = profile.make_run(model, what, tokens, dtype=compute, optimizer=optimizer, context=context)
    return profile.profile_step(model, run, rounds=rounds), profile.trace_step(model, run)


def show(found: Any) -> None:
    """The rows that take a hundredth of the step or more."""
    print(f"  {found.seconds * 1e3:.2f} ms ({found.plain_seconds * 1e3:.2f} unmeasured); floor {found.floor * 1e3:.2f}")
    for r in found.rows:
        if r.seconds >= 0.01 * found.seconds:
            rate = f"{r.flop / r.seconds / 1e12:7.1f} TFLOP/s {r.bytes / r.seconds / 1e9:7.0f} GB/s" if r.flop else ""
            part = "" if r.roofline_fraction is None else f"{r.roofline_fraction:5.0%} of the roofline"
            share = r.seconds / found.seconds
            print(f"  {r.component:12} {r.phase:10} {r.seconds * 1e3:9.3f} ms {share:6.1%} {rate} {part}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument("--pictures", type=Path, help="draw into this directory, where matplotlib is installed")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    device = "cpu" if arguments.dry_run else "cuda"
    rounds = 1 if arguments.dry_run else 3 if arguments.quick else 7
    where = machine() if arguments.dry_run else f"{torch.cuda.get_device_name()}; {machine()}"
    print(where)
    rows: list[dict[str, Any]] = []
    failed = []
    for name, cfg, what, batch, length in cases(arguments.dry_run):
        print(f"{name}, {what}, {batch} x {length}", flush=True)
        try:
            found, memory = measure(cfg, what, batch, length, rounds, device)
        except torch.OutOfMemoryError as error:
            print(f"  out of memory: {str(error)[:120]}")
            failed.append(f"{name}, {what}")
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        show(found)
        rows.append({"name": name, "peak_gib": max(memory.bytes) / 2**30, **dataclasses.asdict(found)})
        write_record(arguments.json, {"machine": where, "rows": rows})
        if arguments.pictures:
            draw(found, memory, arguments.pictures / f"{name} {what}".replace(" ", "-"))
    if failed:
        raise SystemExit(f"not measured: {'; '.join(failed)}")


def draw(found: Any, memory: Any, place: Path) -> None:
    """Time, roofline and memory, where matplotlib is installed."""
    from moe.profile.step_pictures import draw_memory, draw_step

    try:
        draw_step(found, place)
        draw_memory(memory, place)
    except ImportError as error:
        print(f"  no pictures: {error}")


if __name__ == "__main__":
    main()
