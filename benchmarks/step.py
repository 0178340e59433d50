"""Where the time of a step goes on this GPU: a whole layer of the full GPT-4 width, and a training step of replica-1b.

Per component: time, FLOP/s, bytes/s, and the share of the roofline measured in the same run (moe.profile). The layer
has its 14.8 billion expert weights and the output layer in bfloat16; with gradients it takes some 77 GiB. A card with
less gets the same layer with four experts and a quarter of the tokens, so that each expert has as many.
Run: python benchmarks/step.py [--quick] [--dry-run] [--json FILE] [--pictures DIR]
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import stop_without_gpu
from measure import Report, emptied, failure, head, lacking, out_of_memory

import moe
from moe import plan, profile
from moe.config import Config
from moe.plan.device import device_memory
from moe.train.optimizer import build

LAYER = ["n_layers=1"]
FEWER = [*LAYER, "experts.n_experts=4"]


class Case(NamedTuple):
    """A step to be measured; `length`: tokens of each sequence, for decoding those in the cache."""

    name: str
    cfg: Config
    what: Any
    batch: int
    length: int

    @property
    def title(self) -> str:
        return f"{self.name}, {self.what}, {self.batch} x {self.length}"


def cases(dry: bool) -> list[list[Case]]:
    """What is measured, each as a list of which the first that fits is taken."""
    if dry:
        tiny = moe.load_config("replica-tiny").with_overrides([*LAYER, "experts.d_ff=64"])
        backward, decode = Case("layer", tiny, "backward", 1, 16), Case("layer", tiny, "decode", 2, 16)
        return [[backward], [decode], [Case("replica", tiny, "train", 1, 16)]]
    full, fewer = (moe.load_config("gpt4-8k").with_overrides(changes) for changes in (LAYER, FEWER))
    name, less = "one layer of gpt4-8k", "one layer of gpt4-8k, 4 experts"
    replica = moe.load_config("replica-1b")
    return [
        [Case(name, full, "backward", 1, 8192), Case(less, fewer, "backward", 1, 2048)],
        [Case(name, full, "decode", 64, 8192), Case(less, fewer, "decode", 64, 8192)],
        [Case("replica-1b", replica, "train", batch, 2048) for batch in (8, 4, 2)],
    ]


def peak_bytes(case: Case) -> float:
    """What a case needs at its peak, with what measures the ceilings: two matrices in each dtype, and a copy."""
    cfg, batch, length = case.cfg, case.batch, case.length
    sheet = device_memory(cfg, micro_batch=batch, seq_len=length, dtype="bf16")
    ceilings = 2 * 8192**2 * (4 + 2) + 2 * 2**30
    if case.what == "train":
        return sheet["device.peak"].to("B") + ceilings
    weights = 2 * plan.params(cfg).total  # in bfloat16, as they are multiplied, and no optimizer
    if case.what == "decode":
        head = cfg.attention
        cache = 2 * 2 * cfg.n_layers * batch * length * head.n_kv_heads * head.head_dim
        return weights + cache + 4 * batch * cfg.vocab_size + ceilings
    passing = sum(sheet[f"device.{part}"].to("B") for part in ("activations", "working"))
    return 2 * weights + passing + ceilings


def measure(case: Case, rounds: int, device: str) -> tuple[Any, Any]:
    """The profile of one step, and its memory."""
    cfg, what, batch, length = case.cfg, case.what, case.batch, case.length
    # As in training: weights in float32 under autocast; else as they are multiplied.
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    model = profile.random_model(cfg, torch.float32 if what == "train" else compute, device)
    columns = 1 if what == "decode" else length + 1
    tokens = torch.randint(cfg.vocab_size, (batch, columns), device=device)
    optimizer = build(model, cfg.train) if what == "train" else None
    context = length - 1 if what == "decode" else 0
    run = profile.make_run(model, what, tokens, dtype=compute, optimizer=optimizer, context=context)
    return profile.profile_step(model, run, rounds=rounds), profile.trace_step(model, run)


def first_that_fits(ladder: list[Case], rounds: int, device: str, report: Report) -> tuple[Case, Any, Any] | None:
    """The first case that its arithmetic and then the device let through, measured; says why of those before it."""
    for case in ladder:
        print(case.title, flush=True)
        problem = lacking(peak_bytes(case), device)
        if problem is None:
            try:
                return case, *measure(case, rounds, device)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                problem = failure(error)
            finally:
                emptied(device)
        report.note(problem, name=case.name, what=case.what)
    return None


def text(row: dict[str, Any]) -> str:
    """A step as it is printed, with the parts that take a hundredth of it or more."""
    ms, plain, floor = (row[key] * 1e3 for key in ("seconds", "plain_seconds", "floor_seconds"))
    peaks = f"peak {row['peak_gib']:.1f} GiB of {row['computed_peak_gib']:.1f} computed"
    lines = [f"  {ms:.2f} ms ({plain:.2f} unmeasured); floor {floor:.2f}; {peaks}"]
    for part in row["rows"]:
        seconds = part["seconds"]
        if seconds >= 0.01 * row["seconds"]:
            share = f"{seconds * 1e3:9.3f} ms {seconds / row['seconds']:6.1%}"
            rates = ""
            if part["flop"]:
                rates = f"{part['flop'] / seconds / 1e12:7.1f} TFLOP/s {part['bytes'] / seconds / 1e9:7.0f} GB/s"
            roofline = "" if part["floor"] is None else f"{part['floor'] / seconds:5.0%} of the roofline"
            lines.append(f"  {part['component']:12} {part['phase']:10} {share} {rates} {roofline}")
    return "\n".join(lines)


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
    report = Report(arguments.json, head(device), text)
    failed = []
    for ladder in cases(arguments.dry_run):
        measured = first_that_fits(ladder, rounds, device, report)
        if measured is None:
            failed.append(ladder[0].title)
            continue
        case, found, memory = measured
        peaks = {"peak_gib": max(memory.bytes, default=0) / 2**30, "computed_peak_gib": peak_bytes(case) / 2**30}
        report.row({"name": case.name, "floor_seconds": found.floor, **peaks, **dataclasses.asdict(found)})
        if arguments.pictures:
            draw(found, memory, arguments.pictures / file_name(case))
    report.ended()
    if failed:
        raise SystemExit(f"not measured: {'; '.join(failed)}")


def file_name(case: Case) -> str:
    """Of its pictures: letters, digits and hyphens."""
    return "-".join(f"{case.name} {case.what}".replace(",", "").split())


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
