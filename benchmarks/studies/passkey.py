"""Does context extension make a model use positions beyond its training context? A passkey test, from 256 to 1024.

A replica learns to retrieve a random key from real text at up to 256 positions, next to predicting that text. Then the
same weights are asked at up to 1024 positions: as they are (max_seq_len raised, nothing else), with RoPE scaled and no
training, and with RoPE scaled and a short fine-tuning at 256 and 1024. Prints a table, writes a JSON record and a
picture.

Run: python benchmarks/studies/passkey.py [--scaling yarn] [--seed 0] [--quick] [--data DIR] [--out DIR]
It takes five minutes of one CPU core; the data, prepared on the first run, half a minute more.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from duel import machine, write_record

from benchmarks.studies import english
from benchmarks.studies.passkey_task import Passkey, retrieve
from moe import evaluate
from moe.config import Config, RopeConfig, load_config
from moe.data import TokenData
from moe.device import pick_device, tune_cpu
from moe.io import figures
from moe.model import Transformer
from moe.train.optimizer import build

ORIGINAL, EXTENDED = 256, 1024
FACTOR = EXTENDED / ORIGINAL
LENGTHS = (128, 256, 512, 1024)
DEPTHS = 8  # bins
TOKENS = 4096  # of passkey examples in a step; a quarter as many of plain text
TEXT_WEIGHT = 0.1  # of the plain text's loss; the key's is 1
SOLVED = 0.05  # nats per token of a key, as a running mean, at which a length counts as learnt
# With theta 324 the slowest of a head's 32 pairs turns as far within 256 positions, 0.95 radians, as the slowest of the
# full shape's 64, with theta 10,000, within 8,192. At theta 10,000 it would hardly turn, and 1,024 positions would be
# little news to the model.
SHAPE = ("experts.n_experts=8", "experts.d_ff=256", "attention.rope.theta=324.0", "max_seq_len=256")
RECIPE = ("optimizer=muon", "lr=3e-3", "muon_lr=0.02", "embedding_lr=5.0", "weight_decay=0.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaling", choices=("linear", "yarn"), default="yarn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer examples in the evaluation, and no picture")
    parser.add_argument("--data", type=Path, default=Path("data/passkey-512"), help="prepared on the first run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "passkey")
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    tune_cpu()
    device = pick_device(arguments.device)
    data = english.text(arguments.data)
    record = study(data, device, arguments.scaling, arguments.seed, examples=6 if arguments.quick else 12)
    print(table(record))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_record(arguments.out / "passkey.json", record)
    if not arguments.quick:
        print(f"picture: {draw(record, arguments.out)}")


# ------------------------------------------------------------------------------------------------------------ study


def study(data: TokenData, device: torch.device, scaling: str, seed: int, examples: int) -> dict[str, Any]:
    """Trains, extends, evaluates: everything that the record holds."""
    cfg = load_config("replica-tiny").with_overrides(
        [*SHAPE, f"vocab_size={data.vocab_size}", *(f"train.{setting}" for setting in RECIPE)]
    )
    learner = Learner(data, seed, device)
    started, cpu = time.perf_counter(), time.process_time()
    with device:
        model = Transformer(cfg, seed)
    # From no more than a few tokens of filler on: at 64 positions at once, hundreds of steps teach it nothing.
    first = learner.task.overhead + 6
    curriculum = [first, *(n for n in (64, 96, 128, 192, ORIGINAL) if n > first)]
    phases = {"pre-training": learner.learn(model, curriculum, max_steps=600, warmup=10)}
    scaled = extend(model, scaling)
    subjects = {"unextended": with_context(model, cfg), f"{scaling}, not fine-tuned": scaled}
    found = {name: learner.evaluate(subject, examples) for name, subject in subjects.items()}
    tuned = extend(model, scaling)
    phases["fine-tuning"] = learner.learn(tuned, [ORIGINAL, EXTENDED], max_steps=80, warmup=5, rate=0.3)
    found[f"{scaling}, fine-tuned"] = learner.evaluate(tuned, examples)
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "data": data.fingerprint,
        "seed": seed,
        "scaling": {"rope": scaling, "factor": FACTOR, "original_max_seq_len": ORIGINAL, "max_seq_len": EXTENDED},
        "config": cfg.to_toml(),
        "key_tokens": learner.task.key_tokens,
        "chance": learner.task.chance,
        "examples_per_cell": examples,
        "lengths": LENGTHS,
        "depth_bins": DEPTHS,
        "phases": phases,
        "models": found,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }


def with_context(model: Transformer, cfg: Config) -> Transformer:
    """The same weights under another context, `EXTENDED` positions."""
    cfg = dataclasses.replace(cfg, max_seq_len=EXTENDED)
    with model.embedding.weight.device:
        longer = Transformer(cfg)
    longer.load_state_dict(model.state_dict())
    return longer


def extend(model: Transformer, scaling: Any) -> Transformer:
    """The same weights with RoPE scaled to `EXTENDED` positions."""
    rope = model.cfg.attention.rope
    rope = RopeConfig(theta=rope.theta, scaling=scaling, factor=FACTOR, original_max_seq_len=ORIGINAL)
    attention = dataclasses.replace(model.cfg.attention, rope=rope)
    return with_context(model, dataclasses.replace(model.cfg, attention=attention))


class Learner:
    """The task on training text to learn from, on held-out text to be asked."""

    def __init__(self, data: TokenData, seed: int, device: torch.device) -> None:
        source, tokenizer = data.sources[0] if "text" not in data.sources else "text", data.tokenizer()
        self.data, self.device = data, device
        self.stream = data.tokens(source, "train")
        self.task = Passkey(tokenizer, self.stream)
        self.held_out = Passkey(tokenizer, data.tokens(source, "val"))
        self.lengths = evaluate.byte_lengths(tokenizer)
        self.rng = np.random.default_rng(seed)

    def learn(
        self, model: Transformer, lengths: list[int], *, max_steps: int, warmup: int, rate: float = 1.0
    ) -> dict[str, Any]:
        """Trains at each length until it is solved, from the first to the last."""
        started, tokens, step, mean = time.perf_counter(), 0, 0, float("nan")
        optimizers = build(model, model.cfg.train)
        for length in lengths:
            mean = 1.0
            while mean > SOLVED and step < max_steps:
                optimizers.set_lr(rate * min(1.0, (step + 1) / warmup))
                loss = self._step(model, length)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizers.step()
                optimizers.zero_grad()
                mean, step, tokens = 0.8 * mean + 0.2 * loss, step + 1, tokens + TOKENS + TOKENS // 4
            print(f"{length} positions: {mean:.3f} nats per token of the key after step {step}", flush=True)
        seconds = time.perf_counter() - started
        return {"steps": step, "tokens": tokens, "key_loss": mean, "solved": mean <= SOLVED, "seconds": seconds}

    def _step(self, model: Transformer, length: int) -> float:
        """Gradients of one batch of keys and of text; the key's loss in nats per token."""
        inputs_BS, targets_BS = self.task.examples(self.rng, max(1, TOKENS // length), length).batch(slice(None))
        out = model(inputs_BS.to(self.device), targets_BS.to(self.device))
        assert out.loss is not None
        out.loss.backward()
        text_BS = torch.from_numpy(self._text(max(1, TOKENS // 4 // length), length)).to(self.device)
        (TEXT_WEIGHT * model(text_BS[:, :-1], text_BS[:, 1:]).losses["lm"]).backward()
        return out.losses["lm"].item()

    def _text(self, count: int, length: int) -> np.ndarray:
        starts = self.rng.integers(len(self.stream) - length, size=count)
        return np.stack([self.stream[int(s) : int(s) + length + 1] for s in starts]).astype(np.int64)

    def evaluate(self, model: Transformer, examples: int) -> dict[str, Any]:
        """Accuracy and log-probability by length and depth, in all within and beyond `ORIGINAL`, and bits per byte."""
        cells, correct, logprob, distance = [], [], [], []
        for length, low, high in _cells():
            made = self.held_out.examples(np.random.default_rng(length), examples, length, (low, high))
            answer = retrieve(model, made, batch=max(1, TOKENS * 2 // length))
            cells.append(
                {"length": length, "depth": [low, high], "accuracy": answer.accuracy, "logprob": answer.logprob}
            )
            correct.append(answer.correct_B)
            logprob.append(answer.logprob_B)
            distance.append(made.distance_B)
        beyond = np.concatenate(distance) > ORIGINAL
        found: dict[str, Any] = {"cells": cells}
        for name, chosen in (("within", ~beyond), ("beyond", beyond)):
            found[name] = {
                "examples": int(chosen.sum()),
                "accuracy": float(np.concatenate(correct)[chosen].mean()),
                "logprob": float(np.concatenate(logprob)[chosen].mean()),
            }
        windows = evaluate.some_windows(self.data, EXTENDED, 2 * TOKENS)
        found["bits_per_byte"] = evaluate.total(evaluate.evaluate(model, windows, self.lengths, batch=4)).bits_per_byte
        return found


def _cells() -> Iterator[tuple[int, float, float]]:
    for length in LENGTHS:
        for i in range(DEPTHS):
            yield length, i / DEPTHS, (i + 1) / DEPTHS


# ----------------------------------------------------------------------------------------------------------- output


def table(record: dict[str, Any]) -> str:
    """In Markdown: each model's accuracy and log-probability, within and beyond the original context."""
    lines = [
        f"keys of {record['key_tokens']} digits, chance {record['chance']:.2%} (log-probability "
        f"{np.log(record['chance']):.1f}); texts of {LENGTHS[0]} to {LENGTHS[-1]} tokens",
        "",
        f"| | key up to {ORIGINAL} tokens back | log-probability | further back | log-probability "
        f"| text at {EXTENDED}, bits/byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in record["models"].items():
        cells = [f"{f['accuracy']:.1%} | {f['logprob']:.2f}" for f in (found["within"], found["beyond"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['bits_per_byte']:.3f} |")
    lines += ["", "accuracy by length, all depths:", "", "| | " + " | ".join(str(n) for n in LENGTHS) + " |"]
    lines.append("|---|" + "---|" * len(LENGTHS))
    for name, found in record["models"].items():
        lines.append(f"| {name} | " + " | ".join(f"{m:.0%}" for m in _grid(found).mean(0)) + " |")
    lines.append("")
    for name, phase in record["phases"].items():
        end = "solved" if phase["solved"] else "NOT SOLVED: the figures say nothing about the context"
        lines.append(f"{name}: {phase['steps']} steps, {phase['tokens']:,} tokens, {end}")
    lines.append(f"{record['seconds']:.0f} s, {record['cpu_seconds']:.0f} s of CPU time")
    return "\n".join(lines)


def _grid(found: dict[str, Any]) -> np.ndarray:
    """Accuracy [depth, length]."""
    return np.array([cell["accuracy"] for cell in found["cells"]]).reshape(len(LENGTHS), DEPTHS).T


def draw(record: dict[str, Any], place: Path) -> Path:
    """Draws accuracy over depth and length of each model into the directory; returns passkey.png."""
    figure, axes = figures.figure(1, len(record["models"]), width=3.9, height=4.2)
    image = None
    for axis, (name, found) in zip(axes, record["models"].items(), strict=True):
        grid = _grid(found)
        image = axis.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        for depth, row in enumerate(grid):
            for x, value in enumerate(row):
                colour = "white" if value > 0.6 else figures.INK
                axis.text(x, depth, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
        beyond = found["beyond"]["accuracy"]
        figures.title(axis, name[0].upper() + name[1:], f"keys beyond {ORIGINAL}: {beyond:.0%}", "tokens", grid=False)
        axis.set_xticks(range(len(LENGTHS)), [f"{n:,}" for n in LENGTHS])
        axis.set_yticks([-0.5, (DEPTHS - 1) / 2, DEPTHS - 0.5], ["0%", "50%", "100%"])
        axis.plot(*_boundary(), color=figures.COLOURS[1], linewidth=2)
    axes[0].set_ylabel("depth of the key in the text", color=figures.MUTED)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], aspect=24, pad=0.02)
    bar.ax.set_yticklabels(["0%", "50%", "100%"], color=figures.INK)
    bar.outline.set_visible(False)
    return figures.save(figure, place, "passkey")


def _boundary() -> tuple[list[float], list[float]]:
    """The line above which keys are further back than `ORIGINAL`, in the coordinates of the image."""
    x, y = [], []
    for i, length in enumerate(LENGTHS):
        depth = max(0.0, 1 - ORIGINAL / length) * DEPTHS - 0.5
        x += [i - 0.5, i + 0.5]
        y += [depth, depth]
    return x, y


if __name__ == "__main__":
    main()
