"""Train replica-1b on real text and code on this GPU: tokens/s and model FLOPs utilisation.

The data are files that every Python has, prepared here (a quarter of a minute of one core); nothing is downloaded. The
run ends after so many steps or seconds of training, whichever comes first, and saves and evaluates nothing: it is there
to be timed. Run: python benchmarks/replica_1b.py [--steps 200] [--seconds 30] [--quick] [--dry-run] [--json FILE]
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import stop_without_gpu
from measure import Report, head, lacking

import moe
from moe.config import Config
from moe.plan.device import device_memory
from moe.train.console import Lines

FIGURES = ("step", "loss", "tokens_per_second", "mfu", "load_max_over_mean")


class Enough(Exception):
    """The run has been timed for long enough."""


class Stopwatch(Lines):
    """Keeps the figures of a run, and ends it after so many steps or seconds."""

    def __init__(self, report: Report, steps: int, seconds: float, device: str) -> None:
        super().__init__()
        self.report, self.limits, self.device = report, (steps, seconds), device
        self.began = time.perf_counter()

    def step(self, step: int) -> None:
        if step == 1:  # with all that is made and compiled before it ends
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.report.record["first_step_s"] = time.perf_counter() - self.began
            self.began = time.perf_counter()

    def train(self, record: dict[str, Any], seconds_per_step: float) -> None:
        figures, steps, seconds = self.report.record, *self.limits
        rows = [*figures["rows"], record]
        settled = rows[len(rows) // 2 :]
        figures |= {
            "steps": record["step"],
            "first_loss": rows[0]["loss"],
            "last_loss": record["loss"],
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in settled),
            "mfu": statistics.median(row["mfu"] for row in settled),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0,
        }
        self.report.row({name: record[name] for name in FIGURES})
        if record["step"] >= steps or time.perf_counter() - self.began >= seconds:
            raise Enough


def line(row: dict[str, Any]) -> str:
    """A log point as it is printed."""
    return (
        f"step {row['step']:4}: loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}"
    )


def configuration(steps: int, dry: bool, device: str) -> tuple[Config, float]:
    """The run, with the largest micro-batch that fits the card, and the bytes that it needs at its peak.

    64k tokens a step: a run of a minute, with batches as large as those of the real one on each of 8 GPUs.
    """
    cfg = moe.load_config("replica-tiny" if dry else "replica-1b")
    changes: dict[str, Any] = {"steps": steps, "log_every": 1 if dry else 5, "warmup": 1 if dry else 20}
    changes |= {"batch_size": 2, "seq_len": 32} if dry else {"batch_size": 32}
    changes |= dict.fromkeys(("eval_every", "sample_every", "save_every"), 10 * steps)
    for micro_batch in (2,) if dry else (16, 8, 4, 2, 1):
        now = changes | {"micro_batch": micro_batch}
        tried = cfg.with_overrides([f"train.{name}={value}" for name, value in now.items()])
        peak = device_memory(tried, dtype="bf16")["device.peak"].to("B")
        problem = lacking(peak, device)
        if problem is None:
            return tried, peak
        print(f"  micro_batch {micro_batch} {problem}")
    raise SystemExit(f"{cfg.name} does not fit this GPU")


def run(steps: int, seconds: float, dry: bool, written: Path | None) -> dict[str, Any]:
    """Prepare data, train, and return the record, which is written at every log point.

    Figures are medians over the second half of the log points.
    """
    from moe.data import prepare
    from moe.train import train

    device = "cpu" if dry else "cuda"
    report = Report(written, head(device), line)
    cfg, peak = configuration(steps, dry, device)
    with tempfile.TemporaryDirectory() as directory:
        data, started = Path(directory) / "data", time.perf_counter()
        # Dry: a few of this library's own files.
        sources = [Path(__file__).parent.parent / "moe" / "data"] if dry else None
        found = prepare(sources, data, vocab_size=512 if dry else 8192)
        report.record |= {
            "config": cfg.name,
            "micro_batch": cfg.train.micro_batch,
            "computed_peak_gib": peak / 2**30,
            "data": {name: split["train"].tokens for name, split in found.splits.items()},
            "prepare_s": time.perf_counter() - started,
        }
        print(f"prepared in {report.record['prepare_s']:.1f} s: {report.record['data']}", flush=True)
        watch = Stopwatch(report, steps, seconds, device)
        with contextlib.suppress(Enough):
            train(cfg, data, Path(directory) / "run", device=device, reporter=watch)
    report.ended()
    return report.record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="at most")
    parser.add_argument("--seconds", type=float, help="of training, at most: 30 unless given")
    parser.add_argument("--quick", action="store_true", help="12 seconds of training")
    parser.add_argument("--dry-run", action="store_true", help="replica-tiny for two steps on a CPU")
    parser.add_argument("--json", type=Path, help="also write the record here, at every log point")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    seconds = arguments.seconds or (12 if arguments.quick else 30)
    record = run(2 if arguments.dry_run else arguments.steps, seconds, arguments.dry_run, arguments.json)
    print({name: value for name, value in record.items() if name != "rows"})


if __name__ == "__main__":
    main()
