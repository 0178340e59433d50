"""Two models that learn from the same text, a large and a small one, for the studies of speculative decoding."""

import numpy as np
import torch

from moe.config import Config, load_config
from moe.data import TokenData
from moe.model import Transformer
from moe.train.optimizer import build

TARGET = ("d_model=192", "n_layers=3", "max_seq_len=256")
DRAFT = (
    "d_model=96",
    "n_layers=1",
    "attention.n_heads=3",
    "experts.d_ff=256",
    "experts.n_experts=4",
    "max_seq_len=256",
)
RECIPE = ("optimizer=muon", "lr=3e-3", "muon_lr=0.02", "embedding_lr=5.0", "weight_decay=0.0")
BATCH, LENGTH, WARMUP = 16, 128, 10


def windows(data: TokenData, split: str, rng: np.random.Generator, count: int, length: int) -> torch.Tensor:
    """Pieces of the text, int64 [count, length]."""
    stream = data.tokens(data.sources[0], split)
    starts = rng.integers(len(stream) - length, size=count)
    return torch.from_numpy(np.stack([stream[int(s) : int(s) + length] for s in starts]).astype(np.int64))


def trained(data: TokenData, steps: int, seed: int = 0) -> tuple[Transformer, Transformer]:
    """The target and the draft model, each after so many steps."""
    found = []
    for shape in (TARGET, DRAFT):
        cfg = load_config("replica-tiny").with_overrides(
            [*shape, f"vocab_size={data.vocab_size}", *(f"train.{setting}" for setting in RECIPE)]
        )
        found.append(_train(Transformer(cfg, seed), cfg, data, steps, seed))
    return found[0], found[1]


def _train(model: Transformer, cfg: Config, data: TokenData, steps: int, seed: int) -> Transformer:
    optimizers, rng, loss = build(model, cfg.train), np.random.default_rng(seed), float("nan")
    for step in range(steps):
        optimizers.set_lr(min(1.0, (step + 1) / WARMUP, 2 * (steps - step) / steps))
        text_BS = windows(data, "train", rng, BATCH, LENGTH + 1)
        out = model(text_BS[:, :-1], text_BS[:, 1:])
        assert out.loss is not None
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        loss = out.losses["lm"].item()
    print(f"{cfg.d_model} x {cfg.n_layers}: {loss:.2f} nats per token after {steps} steps", flush=True)
    return model.requires_grad_(False)
