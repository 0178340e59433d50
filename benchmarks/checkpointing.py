"""What does activation checkpointing save, and what does it cost, on this CPU?

A training step (fused AdamW) of a replica under each mode, in turns: median seconds, of the clock and of the process's
threads (one thread's tell the cost on a machine that does other work too); and from a traced step the memory it adds to
weights and optimizer state: at its peak, and at the end of the forward, when all activations are held.
Run: python benchmarks/checkpointing.py [--config replica-nano] [--rounds 5] [--threads N] [--json FILE]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from duel import machine, write_record

import moe
from moe import profile
from moe.device import tune_cpu
from moe.recompute import MODES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="replica-nano")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    tune_cpu()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = moe.Transformer(moe.load_config(arguments.config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.vocab_size, (arguments.batch, arguments.seq_len + 1), generator=g)
    run = profile.make_run(model, "train", tokens, optimizer=optimizer)
    run.call()
    wall: dict[str, list[float]] = {mode: [] for mode in MODES}
    cpu: dict[str, list[float]] = {mode: [] for mode in MODES}
    rows = []
    for _ in range(arguments.rounds):
        for mode in MODES:
            model.activation_checkpointing = mode
            start = time.perf_counter(), time.process_time()
            run.call()
            wall[mode].append(time.perf_counter() - start[0])
            cpu[mode].append(time.process_time() - start[1])
    print(f"{machine()}\n{arguments.config}, {arguments.batch} x {arguments.seq_len}")
    for mode in MODES:
        model.activation_checkpointing = mode
        memory = profile.trace_step(model, run)
        held = [b for b, phase in zip(memory.bytes, memory.phases, strict=True) if phase == "forward"][-1]
        row = {
            "mode": mode,
            "ms": statistics.median(wall[mode]) * 1e3,
            "cpu_ms": statistics.median(cpu[mode]) * 1e3,
            "peak_mib": max(memory.bytes) / 2**20,
            "held_mib": held / 2**20,
        }
        row["cpu_time_of_none"] = statistics.median(cpu[mode]) / statistics.median(cpu["none"])
        rows.append(row)
        print(
            f"  {mode:10} {row['ms']:7.0f} ms, {row['cpu_ms']:7.0f} of the processor ({row['cpu_time_of_none']:.2f}x)  "
            f"peak {row['peak_mib']:6.0f} MiB  after the forward {row['held_mib']:6.0f} MiB",
            flush=True,
        )
    size = {
        "threads": torch.get_num_threads(),
        "config": arguments.config,
        "batch": arguments.batch,
        "seq_len": arguments.seq_len,
    }
    write_record(arguments.json, {"machine": machine(), **size, "rows": rows})


if __name__ == "__main__":
    main()
