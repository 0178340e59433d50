"""Duplicate experts: how alike the weights of a layer's experts are.

Two experts are compared number by number, hidden unit for hidden unit, so that copies are found (of upcycling, of a
merge, of an initialisation that repeats itself), but not two that compute the same with their hidden units reordered.

Shape suffixes: E experts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from moe.experts import Experts

_SLICE = 2**24  # numbers of all experts that are converted at a time


@dataclass(frozen=True)
class ClosestPair:
    """The two experts of a layer with the most similar weights, as cosines."""

    layer: int
    one: int
    other: int
    cosine: float
    median: float  # of all the layer's pairs
    by_chance: float  # about the highest among as many pairs of independent random weights


def expert_weights(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Each layer's expert matrices, [E, ...] each: ours, and those that transformers stacks."""
    for module in model.modules():
        if isinstance(module, Experts):
            yield module.w_in_EGFD, module.w_out_EDF
        elif type(module).__name__.endswith("Experts"):
            stacks = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
            if all(isinstance(stack, Tensor) and stack.ndim == 3 for stack in stacks):
                yield stacks  # type: ignore[misc]


def expert_bytes(model: nn.Module) -> float:
    """Bytes of one expert in all layers, as the model holds them; 0 where its matrices are not known here."""
    return sum(w.nbytes / len(w) for weights in expert_weights(model) for w in weights)


def expert_similarity(*weights_E: Tensor) -> Tensor:
    """Cosine similarity of the experts' weights [E, ...], all of them together -> [E, E] float64; copies have 1."""
    n_experts = len(weights_E[0])
    products_EE = torch.zeros(n_experts, n_experts, dtype=torch.float64)
    for weights in weights_E:
        for part in weights.detach().flatten(1).split(max(1, _SLICE // n_experts), dim=1):
            wide = part.to(torch.float32)
            products_EE += (wide @ wide.T).double().cpu()
    norm_E = products_EE.diagonal().sqrt().clamp(min=1e-30)
    return products_EE / (norm_E[:, None] * norm_E)


def closest_pairs(model: nn.Module) -> list[ClosestPair]:
    """The closest pair of every layer; empty where the experts' matrices are not known here, or there is one expert."""
    found = []
    for layer, weights in enumerate(expert_weights(model)):
        similarity_EE = expert_similarity(*weights)
        rows, columns = torch.triu_indices(*similarity_EE.shape, offset=1)
        if not len(rows):
            continue
        cosines = similarity_EE[rows, columns]
        best = int(cosines.argmax())
        # The cosine of two independent vectors of n numbers is about normal with variance 1/n, and the highest of P
        # such is about sqrt(2 ln P) standard deviations.
        n = sum(w[0].numel() for w in weights)
        chance = math.sqrt(2 * math.log(max(2, len(cosines))) / n)
        pair = int(rows[best]), int(columns[best])
        found.append(ClosestPair(layer, *pair, float(cosines[best]), float(cosines.median()), chance))
    return found
