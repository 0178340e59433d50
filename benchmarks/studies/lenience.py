"""What does lenient acceptance cost, and what does it give? Divergence of the tokens' distribution against speed.

A draft d, drawn from q, is accepted with probability min(1, p(d) / (L q(d))): L = 1 is exact; the smaller L, the more
drafts are accepted, and the more of the draft model is in the answer. Two models that learnt from the same text are
asked in contexts of held-out text. What comes out at one position is known exactly there: min(q, p / L), and where
nothing was accepted, the positive part of p - q. Then the engine answers with each L, in turns: tokens per pass, time,
and how likely the target model finds what was written.

Run: python benchmarks/studies/lenience.py [--steps 300] [--rounds 5] [--data DIR] [--out DIR]
It takes two minutes of one CPU core; the data, prepared on the first run, half a minute more.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from duel import machine, write_record

from benchmarks.studies import english, pair
from moe.device import tune_cpu
from moe.io import figures
from moe.model import Transformer
from moe.serve import Engine, SamplingParams

LENIENCES = (1.0, 0.9, 0.75, 0.5, 0.35, 0.2, 0.1)
CONTEXTS, NUM_DRAFTS, REQUESTS, TOKENS = 16, 4, 8, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training, of each model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("data/passkey-512"), help="prepared on the first run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "studies")
    arguments = parser.parse_args()
    tune_cpu()
    data = english.text(arguments.data)
    target, draft = pair.trained(data, arguments.steps)
    contexts_BS = pair.windows(data, "val", np.random.default_rng(1), CONTEXTS, pair.LENGTH)
    record = {
        "machine": machine(),
        "load": os.getloadavg(),
        "data": data.fingerprint,
        "target": target.cfg.to_toml(),
        "draft": draft.cfg.to_toml(),
        "steps": arguments.steps,
        "num_drafts": NUM_DRAFTS,
        "rows": study(target, draft, contexts_BS, arguments.rounds),
    }
    print(table(record))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_record(arguments.out / "lenience.json", record)
    print(f"picture: {figures.save(draw(record), arguments.out, 'lenience')}")


# ------------------------------------------------------------------------------------------------------------- study


def outcome(p_NV: Tensor, q_NV: Tensor, lenience: float) -> Tensor:
    """What a token is distributed as, [N, V], where the first draft, drawn from q, is verified against p."""
    kept_NV = torch.minimum(q_NV, p_NV / lenience)
    rest_NV = (p_NV - q_NV).clamp_min(0)
    refused_N1 = 1 - kept_NV.sum(-1, keepdim=True)
    return kept_NV + refused_N1 * rest_NV / rest_NV.sum(-1, keepdim=True).clamp_min(1e-300)


def study(target: Transformer, draft: Transformer, contexts_BS: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row for each lenience, and one for no speculation, which is first."""
    with torch.no_grad():
        p_NV, q_NV = (one(contexts_BS).logits_BSV.flatten(0, 1).double().softmax(-1) for one in (target, draft))
    prompts = contexts_BS[:REQUESTS, :32].tolist()
    rows: list[dict[str, Any]] = [{"lenience": None}]
    for lenience in LENIENCES:
        o_NV = outcome(p_NV, q_NV, lenience)
        rows.append(
            {
                "lenience": lenience,
                "accepted": torch.minimum(q_NV, p_NV / lenience).sum(-1).mean().item(),
                "total_variation": (o_NV - p_NV).abs().sum(-1).mean().item() / 2,
                "kl": (o_NV.clamp_min(1e-300).log() - p_NV.log()).mul(o_NV).sum(-1).mean().item(),
            }
        )
    engines = [
        Engine(target, max_running=REQUESTS, speculative=draft, num_drafts=NUM_DRAFTS, adaptive=False, lenience=x)
        if (x := row["lenience"])
        else Engine(target, max_running=REQUESTS)
        for row in rows
    ]
    for row in rows:
        row.update(seconds=[], nats=[])
    for number in range(rounds + 1):  # the first one warms up
        settings = [SamplingParams(max_tokens=TOKENS, seed=number * REQUESTS + i) for i in range(REQUESTS)]
        for row, engine in zip(rows, engines, strict=True):
            began = time.perf_counter()
            outputs = engine.generate(prompts, settings)
            if number:
                row["seconds"].append(time.perf_counter() - began)
                row["nats"].append(_surprise(target, [o.prompt_token_ids + o.token_ids for o in outputs]))
    for row, engine in zip(rows, engines, strict=True):
        stats = engine.stats
        row["tokens_per_pass"] = stats.new_tokens / (stats.new_tokens - stats.accepted)
        row["speed"] = statistics.median(a / b for a, b in zip(rows[0]["seconds"], row["seconds"], strict=True))
    return rows


@torch.no_grad()
def _surprise(model: Transformer, texts: list[list[int]]) -> float:
    """Nats per token of the answers, under the target model."""
    text_BS = torch.tensor(texts)
    logprobs_BSV = model(text_BS[:, :-1]).logits_BSV.double().log_softmax(-1)
    return -logprobs_BSV.gather(2, text_BS[:, 1:, None])[:, -TOKENS:].mean().item()


# ------------------------------------------------------------------------------------------------------------ output


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| lenience | first drafts accepted | total variation | KL, nats | tokens per pass | speed | nats per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        nats = statistics.mean(row["nats"])
        end = f"{row['tokens_per_pass']:.2f} | {row['speed']:.2f}x | {nats:.2f} |"
        if row["lenience"] is None:
            lines.append(f"| no drafts | | 0 | 0 | {end}")
        else:
            exact = f"{row['accepted']:.1%} | {row['total_variation']:.3f} | {row['kl']:.4f}"
            lines.append(f"| {row['lenience']} | {exact} | {end}")
    lines.append(f"\n{record['machine']}; load {record['load'][0]:.1f}")
    return "\n".join(lines)


def draw(record: dict[str, Any]) -> Any:
    """Divergence against tokens per pass and time."""
    figure, (length, speed) = figures.figure(1, 2, width=4.6, height=4.2)
    plain, *rows = record["rows"]
    for axis, key, name, about in (
        (length, "tokens_per_pass", "Longer steps", "tokens per pass and request"),
        (speed, "speed", "Time", "speed, 1 without drafts"),
    ):
        x, y = [row[key] for row in rows], [row["total_variation"] for row in rows]
        axis.plot(x, y, color=figures.COLOURS[0], marker="o")
        axis.plot([plain[key]], [0], color=figures.COLOURS[1], marker="s", linestyle="none")
        for row in rows:
            place = (row[key], row["total_variation"])
            axis.annotate(
                f"{row['lenience']:g}", place, xytext=(6, -10), textcoords="offset points", fontsize=9,
                color=figures.MUTED,
            )  # fmt: skip
        figures.title(axis, name, "each point a lenience; the square: no drafts", about)
    length.set_ylabel("total variation from the model's own distribution", color=figures.MUTED)
    return figure


if __name__ == "__main__":
    main()
