"""Train replica-1b for some steps on real text and code on this GPU: tokens/s and model FLOPs utilisation.

Run: python benchmarks/replica_1b.py [--steps 200] [--dry-run] [--json FILE]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from duel import machine, stop_without_gpu, write_record


def run(steps: int, dry: bool) -> dict[str, Any]:
    """Prepare data, train, and return the record: medians over the second half of the logged steps."""
    import moe
    from moe.data import prepare
    from moe.train import train

    cfg = moe.load_config("replica-tiny" if dry else "replica-1b")
    changes = {"steps": 2 if dry else steps, "log_every": 1 if dry else 10, "warmup": 1 if dry else 50}
    if dry:
        changes |= {"batch_size": 2, "micro_batch": 2, "seq_len": 32, "eval_tokens": 256}
    else:
        # 64k tokens a step: a run of minutes, with batches as large as those of the real one on each of 8 GPUs.
        changes |= {"batch_size": 32, "micro_batch": 16, "eval_tokens": 65536}
    cfg = cfg.with_overrides(
        [f"train.{k}={v}" for k, v in changes.items()]
        + [f"train.{k}={10 * steps}" for k in ("eval_every", "sample_every", "save_every")]
    )
    with tempfile.TemporaryDirectory() as directory:
        data, out = Path(directory) / "data", Path(directory) / "run"
        # Dry: this library's own files, whose held-out part is evaluated in seconds.
        prepare([Path(__file__).parent.parent / "moe"] if dry else None, data, vocab_size=512 if dry else 8192)
        result = train(cfg, data, out, device="cpu" if dry else "cuda")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if line["kind"] == "train"]
        settled = logged[len(logged) // 2 :]
        record = {
            "machine": machine() if dry else f"{torch.cuda.get_device_name()}; {machine()}",
            "config": cfg.name,
            "steps": result.step,
            "first_loss": logged[0]["loss"],
            "last_loss": logged[-1]["loss"],
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in settled),
            "mfu": statistics.median(line["mfu"] for line in settled),
            "peak_gib": 0.0 if dry else torch.cuda.max_memory_allocated() / 2**30,
        }
    print(json.dumps(record, indent=1))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dry-run", action="store_true", help="replica-tiny for two steps on a CPU")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    stop_without_gpu(arguments.dry_run)
    write_record(arguments.json, run(arguments.steps, arguments.dry_run))


if __name__ == "__main__":
    main()
