"""What the order of training costs: opening, shuffling and resuming from 10^5 to 10^9 tokens, and the share of a step.

Each size is measured in a process of its own: seconds to open prepared data and stand at a random sample, seconds of a
batch, and peak memory. The tokens are holes in sparse files; nothing but their number matters here.
Run: python benchmarks/data.py [--config replica-nano] [--json FILE]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from duel import machine, write_record

SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
SEQ_LEN, BATCH, BATCHES = 256, 16, 200


def make(place: Path, tokens: int) -> None:
    """Prepared data of two sources with so many training tokens in all."""
    from moe.data import prepare
    from moe.data.shards import INDEX_FILE

    texts = place / "texts"
    for source in ("text", "code"):
        (texts / source).mkdir(parents=True)
        for i in range(60):
            (texts / source / f"{i}.txt").write_text(f"document {i} of {source}\n" * 20)
    prepare([texts / "text", texts / "code"], place / "data", vocab_size=280)
    index = json.loads((place / "data" / INDEX_FILE).read_text())
    for source in ("text", "code"):
        entry = index["sources"][source]["train"]
        entry["tokens"], entry["shards"][0]["tokens"] = tokens // 2, tokens // 2
        with (place / "data" / entry["shards"][0]["file"]).open("wb") as file:
            file.truncate(tokens // 2 * np.dtype(index["dtype"]).itemsize)
    (place / "data" / INDEX_FILE).write_text(json.dumps(index))


def measure(data: Path) -> dict[str, float]:
    """In this process: opening, then batches from the middle of the second pass on."""
    from moe.data import Mixture, TokenData

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    mixture = Mixture(TokenData.open(data), SEQ_LEN, seed=0, epochs={"text": 2, "code": 4})
    position = 3 * mixture.windows_per_epoch // 2
    mixture.batch(position, BATCH)
    opened = time.perf_counter() - start
    seconds = []
    for i in range(1, BATCHES + 1):
        start = time.perf_counter()
        mixture.batch(position + i * BATCH, BATCH)
        seconds.append(time.perf_counter() - start)
    # Pages of the files that were read count, but the kernel may take them back at any time.
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"open_ms": opened * 1e3, "batch_ms": statistics.median(seconds) * 1e3, "added_mib": added / 1024}


def share_of_a_step(config: str, batch_ms: float) -> dict[str, Any]:
    """The batch's time over that of a training step on this machine."""
    import torch

    import moe
    from moe import profile
    from moe.device import tune_cpu
    from moe.train.optimizer import build

    tune_cpu()
    cfg = moe.load_config(config)
    model = moe.Transformer(cfg)
    tokens = torch.randint(cfg.vocab_size, (BATCH, SEQ_LEN + 1))
    run = profile.make_run(model, "train", tokens, optimizer=build(model, cfg.train))
    step_ms = profile.profile_step(model, run, rounds=3).plain_seconds * 1e3
    return {"config": config, "step_ms": step_ms, "share": batch_ms / step_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="replica-nano")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    print(machine(), "\n")
    rows = []
    for tokens in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            make(Path(directory), tokens)
            command = [sys.executable, __file__, "--measure", str(Path(directory) / "data")]
            rows.append({"tokens": tokens, **json.loads(subprocess.check_output(command, text=True))})
        row = rows[-1]
        print(f"{tokens:13,} tokens: open and resume {row['open_ms']:5.1f} ms, a batch of {BATCH} x {SEQ_LEN} "
              f"{row['batch_ms']:.2f} ms, {row['added_mib']:.1f} MiB", flush=True)  # fmt: skip
    share = share_of_a_step(arguments.config, rows[-1]["batch_ms"])
    print(f"of a training step of {share['config']} ({share['step_ms']:.0f} ms): {share['share']:.2%}")
    write_record(arguments.json, {"machine": machine(), "rows": rows, "step": share})


if __name__ == "__main__":
    main()
