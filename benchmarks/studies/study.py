"""What the studies of the experts share: replicas that differ in one thing, trained on the same windows.

A study is a list of variants of `replica.toml`. Every variant is trained once per seed, which sets the initial weights
and the order of the data; the same seed means the same order for all variants. What comes out is the mean over the
seeds with their standard deviation, and each variant's difference to the first one, seed by seed. Runs that are
complete are not run again, and those that studies have in common are made once: an interrupted study, started again,
goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from duel import machine, write_record

from moe import plan
from moe.config import Config, load_config
from moe.data import TokenData, prepare
from moe.io import figures
from moe.train.loop import SUMMARY_FILE
from moe.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
REPLICA = Path(__file__).parent / "replica.toml"
END = 0.2  # of a run, over which the load of the experts is averaged


@dataclass(frozen=True)
class Variant:
    """One side of a study: `settings` are what differs from `replica.toml`, `seeds` how many of the seeds it gets."""

    name: str
    settings: tuple[str, ...] = ()
    seeds: int = 99

    def overrides(self, common: Sequence[str], seed: int) -> list[str]:
        """What one run sets in `replica.toml`."""
        return [*common, *self.settings, f"train.seed={seed}"]

    def config(self, common: Sequence[str]) -> Config:
        """The configuration of the run with seed 0."""
        return load_config(REPLICA).with_overrides(self.overrides(common, 0))

    def run_name(self, seed: int) -> str:
        """Of its directory: by the settings, not by the name, so that studies share what is the same."""
        pairs = [setting.split("=") for setting in self.settings]
        settings = "-".join(key.rpartition(".")[2] + value for key, value in pairs)
        return f"{settings or 'base'}-seed{seed}"


def main(name: str, about: str | None, variants: list[Variant], columns: "list[Column]", draw: "Drawing") -> None:
    """The command of a study: trains what is missing, prints the table, writes NAME.json and NAME.png."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=load_config(REPLICA).train.steps)
    parser.add_argument("--data", type=Path, default=Path("data/studies-1024"), help="prepared on the first run")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--jobs", type=int, default=1, help="replicas to train at the same time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "studies")
    arguments = parser.parse_args()
    if not (arguments.data / "index.json").is_file():
        prepare(None, arguments.data, vocab_size=load_config(REPLICA).vocab_size)
    common = [f"train.steps={arguments.steps}"]
    train_all(variants, arguments.seeds, common, arguments.data, arguments.runs, arguments.jobs)
    record = collect(variants, arguments.seeds, common, arguments.data, arguments.runs)
    print(table(record, columns))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_record(arguments.out / f"{name}.json", record)
    print(f"picture: {figures.save(draw(record), arguments.out, name)}")


# --------------------------------------------------------------------------------------------------------- training


def train_all(variants: list[Variant], seeds: int, common: Sequence[str], data: Path, runs: Path, jobs: int) -> None:
    """Trains every variant with every seed, in processes of their own, `jobs` at a time."""
    # All variants of a seed before the next seed: what is there after an interruption can be compared already.
    wanted = [(variant, seed) for seed in range(seeds) for variant in variants if seed < variant.seeds]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}

    def one(variant: Variant, seed: int) -> None:
        place = runs / variant.run_name(seed)
        command = [sys.executable, "-m", "moe", "train", str(REPLICA), "--data", str(data), "--out", str(place)]
        done = subprocess.run(
            [*command, "--set", *variant.overrides(common, seed)], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{variant.name}, seed {seed}, ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        print(f"{variant.name}, seed {seed}: {place}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, variant, seed) for variant, seed in wanted]:
            future.result()


def collect(variants: list[Variant], seeds: int, common: Sequence[str], data: Path, runs: Path) -> dict[str, Any]:
    """What the runs measured: everything that a study's record holds."""
    prepared = TokenData.open(data)
    found: dict[str, Any] = {}
    for variant in variants:
        cfg = variant.config(common)
        counts = plan.params(cfg)
        found[variant.name] = {
            "settings": list(variant.settings),
            "parameters": counts.total,
            "active_parameters": counts.active["output"],
            "runs": [_measured(runs / variant.run_name(seed)) for seed in range(min(seeds, variant.seeds))],
        }
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "data": prepared.fingerprint,
        "config": variants[0].config(common).to_toml(),
        "variants": found,
    }


def _measured(run_dir: Path) -> dict[str, Any]:
    """One run: its score on all held-out files, its curve, and how evenly its experts were used at the end."""
    summary = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    records = read_metrics(run_dir)
    train = [r for r in records if r["kind"] == "train" and r["tokens"] > (1 - END) * summary["tokens"]]
    evals = [r for r in records if r["kind"] == "eval"]
    layers = len(train[-1]["load"])

    def mean(name: str) -> float:
        return statistics.mean(r[f"{name}_by_layer"][f"{i:02d}"] for r in train for i in range(layers))

    return {
        "bits_per_byte": summary["bits_per_byte"],
        "tokens": summary["tokens"],
        "train_seconds": summary["train_seconds"],
        "curve": [[r["tokens"], r["bits_per_byte"]["total"]] for r in evals],
        "load_entropy": mean("load_entropy"),
        "load_max_over_mean": mean("load_max_over_mean"),
        "dead_experts": statistics.mean(r["dead_experts"] for r in train),
    }


# ----------------------------------------------------------------------------------------------------------- output


@dataclass(frozen=True)
class Column:
    """A column of a study's table: the mean over the seeds of what `value` takes from a run, with its deviation."""

    title: str
    value: Callable[[dict[str, Any]], float]
    digits: int = 3


Drawing = Callable[[dict[str, Any]], Any]
BITS = Column("bits/byte, held out", lambda run: run["bits_per_byte"]["total"])
LOAD = (
    Column("load entropy", lambda run: run["load_entropy"]),
    Column("busiest / mean", lambda run: run["load_max_over_mean"], 2),
    Column("dead experts", lambda run: run["dead_experts"], 1),
)


def table(record: dict[str, Any], columns: list[Column]) -> str:
    """In Markdown: of each variant its size, the columns, and the difference of its bits per byte to the first's."""
    titles = ["", "parameters", "used per token", "seeds", *(c.title for c in columns), "against the first"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, variant in record["variants"].items():
        sizes = [f"{variant['parameters'] / 1e6:.2f}M", f"{variant['active_parameters'] / 1e6:.2f}M"]
        cells = [_spread([c.value(run) for run in variant["runs"]], c.digits) for c in columns]
        cells = [name, *sizes, str(len(variant["runs"])), *cells, _difference(record, name)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _difference(record: dict[str, Any], name: str) -> str:
    """Of bits per byte, seed by seed: both sides saw the same text in the same order."""
    first, *others = record["variants"]
    if name not in others:
        return ""
    pairs = zip(record["variants"][name]["runs"], record["variants"][first]["runs"], strict=False)
    return _spread([one["bits_per_byte"]["total"] - other["bits_per_byte"]["total"] for one, other in pairs], 3)


def draw_losses(record: dict[str, Any]) -> Any:
    """Two panels: the curves, and the score of each run."""
    figure, (curves, runs) = figures.figure(1, 2, width=6.2, height=4.2)
    draw_curves(curves, record, "bits per byte of held-out text; thin: each seed, thick: their mean")
    draw_runs(runs, record, BITS, "At the end", "bits per byte of all held-out files, a dot for each seed")
    return figure


def draw_curves(axis: Any, record: dict[str, Any], subtitle: str) -> None:
    """Held-out bits per byte over training tokens: a thin line for each seed, a thick one for their mean."""
    labels, ends = [], []
    for i, (name, variant) in enumerate(record["variants"].items()):
        colour = figures.COLOURS[i % len(figures.COLOURS)]
        curves = [list(zip(*run["curve"], strict=True)) for run in variant["runs"]]
        x = [tokens / 1e6 for tokens in curves[0][0]]
        for _, y in curves:
            axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
        mean = [statistics.mean(values) for values in zip(*(y for _, y in curves), strict=True)]
        axis.plot(x, mean, color=colour, linewidth=2)
        labels.append((mean[-1], name, colour))
        ends += mean[1:] or mean  # the first is far above what is to be seen
    margin = 0.08 * (max(ends) - min(ends))
    axis.set_ylim(min(ends) - margin, max(ends) + margin)
    figures.title(axis, "While it trains", subtitle, "tokens (millions)")
    figures.label_ends(axis, x[-1], labels)


def draw_runs(axis: Any, record: dict[str, Any], column: Column, heading: str, subtitle: str) -> None:
    """A dot for each run, a line for the mean of each variant."""
    names = list(record["variants"])
    for i, variant in enumerate(record["variants"].values()):
        values = [column.value(run) for run in variant["runs"]]
        colour = figures.COLOURS[i % len(figures.COLOURS)]
        axis.plot([i] * len(values), values, "o", color=colour, markersize=6, alpha=0.7, clip_on=False)
        axis.plot([i - 0.25, i + 0.25], [statistics.mean(values)] * 2, color=colour, linewidth=2)
    axis.set_xlim(-0.6, len(names) - 0.4)
    figures.title(axis, heading, subtitle, "")
    axis.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=8, color=figures.INK)
