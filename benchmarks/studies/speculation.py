"""Does the controller choose the right number of drafts? Beside every fixed number, on pairs that lose and that gain.

A draft model that knows nothing costs a pass of its own, and experts that only refused tokens needed: the controller
has to come within 2 % of no speculation. One that nearly is the model (the layers that it lacks change little) gains:
the controller has to come within 10 % of the best fixed number. Both at one request and at eight, greedy, in one
process, the sides in turns, by the clock and by the processor's time, which others on the machine disturb less. A
side's engine lives on from round to round, so that what the controller spends on learning is in its first rounds: "all"
has them, "end" is the second half.

Run: python benchmarks/studies/speculation.py [--rounds 10] [--batches 1 8] [--out DIR]
It takes five minutes of one CPU core.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from duel import machine, write_record

from moe.config import load_config
from moe.device import tune_cpu
from moe.io import figures
from moe.model import Transformer
from moe.serve import Engine, SamplingParams

FIXED = (0, 1, 2, 4)
PROMPT, TOKENS, ROUND = 16, 64, 128  # tokens of a prompt, of an answer, and of a request's place in a round
DAMPED = 0.02  # of what the layers that the draft model lacks would add


def pairs(d_model: int, n_layers: int) -> dict[str, tuple[Transformer, Transformer]]:
    """The target and the draft model of each: 16 experts, of which 2 serve a token; the draft model has one layer."""
    cfg = load_config("replica-tiny").scaled(d_model=d_model, n_layers=n_layers)
    small = cfg.with_overrides(["n_layers=1"])
    target, near, far = Transformer(cfg, 0), Transformer(small, 0), Transformer(small, 1)
    with torch.no_grad():
        for name, p in target.named_parameters():
            if (
                name.startswith("blocks.")
                and not name.startswith("blocks.0.")
                and name.endswith(("wo.weight", "w_out_EDF"))
            ):
                p *= DAMPED
    near.load_state_dict({name: target.state_dict()[name] for name in near.state_dict()})
    return {"knows nothing": (target, far), "nearly the model": (target, near)}


def measure(target: Transformer, draft: Transformer, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of each side in each round."""
    sides = {f"{k} drafts": _engine(target, draft, batch, k) for k in FIXED}
    sides["controller"] = _engine(target, draft, batch, None)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    by_cpu: dict[str, list[float]] = {name: [] for name in sides}
    rng, p = random.Random(0), SamplingParams(temperature=0, max_tokens=TOKENS)
    warm = [[rng.randrange(512) for _ in range(PROMPT)] for _ in range(batch)]
    for name, engine in sides.items():
        if name != "controller":  # who has to learn from the first step on
            engine.generate(warm, p)
    for _ in range(rounds):
        prompts = [[rng.randrange(512) for _ in range(PROMPT)] for _ in range(batch * ROUND // TOKENS)]
        for name, engine in sides.items():
            began, cpu = time.perf_counter(), time.process_time()
            engine.generate(prompts, p)
            rates[name].append(len(prompts) * TOKENS / (time.perf_counter() - began))
            by_cpu[name].append(len(prompts) * TOKENS / (time.process_time() - cpu))
    found: dict[str, Any] = {"tokens_per_second": rates, "tokens_per_cpu_second": by_cpu}
    for name, engine in sides.items():
        stats = engine.stats
        drafted = {"drafted": stats.drafted, "accepted": stats.accepted, "new_tokens": stats.new_tokens}
        found.setdefault("stats", {})[name] = drafted
    controller = sides["controller"].controller
    assert controller is not None
    found["report"] = controller.report()
    end = slice(rounds // 2, None)
    found["best"] = max((name for name in sides if name != "controller"), key=lambda name: _median(by_cpu[name][end]))
    for part, rows in (("all", slice(None)), ("end", end)):
        for time_of, values in (("clock", rates), ("processor", by_cpu)):
            ratio = [a / b for a, b in zip(values["controller"][rows], values[found["best"]][rows], strict=True)]
            found[f"controller / best, {time_of}, {part}"] = _median(ratio)
    return found


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _engine(target: Transformer, draft: Transformer, batch: int, k: int | None) -> Engine:
    if k == 0:
        return Engine(target, max_running=batch, prefix_cache=False)
    return Engine(
        target, max_running=batch, prefix_cache=False, speculative=draft, num_drafts=k or max(FIXED), adaptive=k is None
    )


# ------------------------------------------------------------------------------------------------------------ output


def table(record: dict[str, Any]) -> str:
    """In Markdown: tokens per second of the processor's time, medians of the second half of the rounds."""
    names = [*(f"{k} drafts" for k in FIXED), "controller"]
    lines = [
        f"| draft model | requests | {' | '.join(names)} | controller over best: processor, all / end | clock |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in record["rows"]:
        rates = row["tokens_per_cpu_second"]
        cells = [f"{_median(rates[name][len(rates[name]) // 2 :]):.0f}" for name in names]
        ratios = " | ".join(
            " / ".join(f"{row[f'controller / best, {time_of}, {part}']:.3f}" for part in ("all", "end"))
            for time_of in ("processor", "clock")
        )
        lines.append(f"| {row['pair']} | {row['batch']} | {' | '.join(cells)} | {ratios} |")
    reports = [f"{row['pair']}, {row['batch']} requests:\n{row['report']}" for row in record["rows"]]
    return "\n".join([*lines, "", *reports, "", f"{record['machine']}; load {record['load'][0]:.1f}"])


def draw(record: dict[str, Any]) -> Any:
    """Every round of every side, over the median of no speculation."""
    figure, axes = figures.figure(1, len(record["rows"]), width=3.4, height=3.8)
    for axis, row in zip(axes, record["rows"], strict=True):
        rates = row["tokens_per_cpu_second"]
        unit = _median(rates["0 drafts"])
        for x, (name, values) in enumerate(rates.items()):
            colour = figures.COLOURS[1 if name == "controller" else 0]
            axis.plot([x] * len(values), [v / unit for v in values], "o", color=colour, alpha=0.35, markersize=4)
            axis.plot([x - 0.25, x + 0.25], [_median(values) / unit] * 2, color=colour, linewidth=2)
        plural = "" if row["batch"] == 1 else "s"
        figures.title(
            axis, f"The draft {row['pair']}", f"{row['batch']} request{plural}; line: median of rounds", "drafts"
        )
        axis.set_xticks(range(len(rates)), [name.removesuffix(" drafts") for name in rates])
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("tokens per second of the processor, 1 without drafts", color=figures.MUTED)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "studies")
    arguments = parser.parse_args()
    tune_cpu()
    arguments.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"machine": machine(), "load": os.getloadavg(), "rows": []}
    for name, (target, draft) in pairs(arguments.d_model, arguments.layers).items():
        record["target"], record["draft"] = target.cfg.to_toml(), draft.cfg.to_toml()
        for batch in arguments.batches:
            record["rows"].append({"pair": name, "batch": batch, **measure(target, draft, batch, arguments.rounds)})
            record["load_after"] = os.getloadavg()
            write_record(arguments.out / "speculation.json", record)
            print(f"{name}, {batch}: done", flush=True)
    print(table(record))
    print(f"picture: {figures.save(draw(record), arguments.out, 'speculation')}")


if __name__ == "__main__":
    main()
