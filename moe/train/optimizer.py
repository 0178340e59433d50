"""Which parameter is updated how, and one handle on the optimizers that do it."""

from typing import Any

import torch
import torch.nn as nn

from moe.config import TrainConfig
from moe.train.muon import Muon
from moe.weights import kind_of

# Kinds of parameters (moe.weights.kind_of). Muon is for the matrices inside a block; the router is a classifier over
# experts, like the output layer, and stays with AdamW.
MUON_KINDS = {"matrix", "residual matrix"}
DECAYED = {*MUON_KINDS, "router", "head", "adapter"}


class Optimizers:
    """One or two torch optimizers behind one `step`; all their rates move by one factor."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        for part in parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]

    def set_lr(self, scale: float) -> None:
        """Sets every group's rate to `scale` times its peak (see `schedule.lr_scale`)."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * scale

    def step(self) -> None:
        """One update."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of the parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build(model: nn.Module, cfg: TrainConfig) -> Optimizers:
    """The optimizers of `cfg.optimizer` for the model's parameters; frozen ones (LoRA) are left out.

    Weight decay (decoupled, Loshchilov and Hutter 2019) pulls on matrices only: norms and the embedding go without.

    Raises:
        ValueError: a parameter of a kind that nobody has said how to update.
    """
    muon, decay, no_decay, embedding = [], [], [], []
    for name, parameter in model.named_parameters():
        kind = kind_of(name)
        if not parameter.requires_grad:
            continue
        if cfg.optimizer == "muon" and kind in MUON_KINDS:
            muon.append(parameter)
        elif kind == "embedding":
            embedding.append(parameter)
        else:
            (decay if kind in DECAYED else no_decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": cfg.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
        {"params": embedding, "weight_decay": 0.0, "lr": cfg.lr * cfg.embedding_lr},
    ]
    groups = [group for group in groups if group["params"]]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)]
    if muon:
        parts.append(Muon(muon, lr=cfg.muon_lr, momentum=cfg.muon_momentum, weight_decay=cfg.weight_decay))
    return Optimizers(parts)
