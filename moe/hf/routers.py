"""What is known of the routers of transformers' models: which modules they are, what they return, how they weigh.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from moe.errors import NotObservable


def is_router(module: nn.Module) -> bool:
    """Whether it is the router of a transformers model, as Mixtral, Qwen3-MoE, OLMoE and gpt-oss have them."""
    return type(module).__name__.endswith("TopKRouter")


def routing_of(module: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, K], weights [T, K] and logits [T, E], detached, from what a router returned.

    Raises:
        NotObservable: it is not (logits, weights, ids).
    """
    if not (isinstance(output, tuple) and len(output) == 3 and output[2].shape == output[1].shape):
        raise NotObservable(f"{type(module).__name__} does not return (logits, weights, ids); transformers 5 does")
    logits, weights, ids = (t.detach().flatten(0, -2) for t in output)
    return ids, weights, logits


# ----------------------------------------------------------------------------- the weights of experts that are given


def _softmax_then_choose(module: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """Mixtral: the softmax over all experts in float32, renormalised over the chosen."""
    weights = torch.softmax(logits.float(), dim=-1).gather(-1, ids)
    return weights / weights.sum(dim=-1, keepdim=True)


def _softmax_then_choose_optionally_normed(module: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """Qwen3-MoE and OLMoE: renormalised where the configuration says so, then in the dtype of the logits."""
    weights = torch.softmax(logits, dtype=torch.float32, dim=-1).gather(-1, ids)
    if module.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def _choose_then_softmax(module: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """gpt-oss: the softmax over the chosen."""
    return torch.softmax(logits.gather(-1, ids), dim=-1)


# By the class of a router: (router, logits, ids) -> weights, as it would have weighed these experts.
WEIGHINGS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "MixtralTopKRouter": _softmax_then_choose,
    "Qwen3MoeTopKRouter": _softmax_then_choose_optionally_normed,
    "OlmoeTopKRouter": _softmax_then_choose_optionally_normed,
    "GptOssTopKRouter": _choose_then_softmax,
}
