"""What the routing profile costs: time of a training step with and without it, and memory over millions of tokens.

The two kinds of step take turns in one process, on the same model. Run: python benchmarks/profile_routing.py
[--config replica-nano] [--rounds 15] [--routed 10000000] [--json FILE]
"""

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from duel import machine, write_record

import moe
from moe import profile
from moe.device import tune_cpu
from moe.profile import Pass, RoutingProfile
from moe.train.predicted import memory_peak

BATCH, SEQ_LEN = 16, 256


def overhead(config: str, rounds: int) -> dict[str, Any]:
    """Medians in ms of a step without and with the profile, and the median of the differences within a round."""
    model = moe.Transformer(moe.load_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.cfg.vocab_size, (BATCH, SEQ_LEN + 1))

    def step() -> float:
        start = time.perf_counter()
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (time.perf_counter() - start) * 1e3

    plain, profiled = [], []
    for n in range(rounds + 2):
        # Each goes first as often as the other: a step leaves the next one's memory warm.
        for watched in (n % 2 == 0, n % 2 == 1):
            with profile.routing(model, model.cfg.vocab_size) if watched else contextlib.nullcontext():
                ms = step()
            if n >= 2:
                (profiled if watched else plain).append(ms)
    gaps = [b / a - 1 for a, b in zip(plain, profiled, strict=True)]
    found = {
        "config": config,
        "plain_ms": statistics.median(plain),
        "profiled_ms": statistics.median(profiled),
        "overhead": statistics.median(gaps),
    }
    print(
        f"{config}, {BATCH} x {SEQ_LEN}: step {found['plain_ms']:.0f} ms, profiled {found['profiled_ms']:.0f} ms; "
        f"overhead {found['overhead']:+.1%} (median of {rounds} pairs)"
    )
    return found


def memory(routed: int) -> dict[str, Any]:
    """Peak memory after a tenth and after all of `routed` routed tokens."""
    L, E, K, V, T = 4, 16, 2, 8192, BATCH * SEQ_LEN
    p = RoutingProfile(E, V)
    total = routed // (L * K)
    marks: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, total, T):
        logits = torch.randn(L, T, E, generator=generator)
        weights, ids = logits.topk(K)
        p.source = "text" if begin % (2 * T) else "code"
        tokens = torch.randint(V, (T,), generator=generator)
        p.update(Pass(ids, weights.softmax(-1), logits, (BATCH, SEQ_LEN), tokens))
        if begin <= total // 10 < begin + T:
            marks["tenth_mib"] = memory_peak(torch.device("cpu")) / 2**20
    marks["all_mib"] = memory_peak(torch.device("cpu")) / 2**20
    print(
        f"{p.tokens * L * K:,} routed tokens: peak {marks['tenth_mib']:.0f} MiB after a tenth of them, "
        f"{marks['all_mib']:.0f} MiB after all"
    )
    return {"routed": p.tokens * L * K, **marks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="replica-nano")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--routed", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    tune_cpu()
    print(machine(), "\n")
    # Memory first: the peak is of the whole process.
    record = {"machine": machine(), "memory": memory(arguments.routed)}
    record["overhead"] = overhead(arguments.config, arguments.rounds)
    write_record(arguments.json, record)


if __name__ == "__main__":
    main()
