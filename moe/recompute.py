"""Activation checkpointing: what a block keeps for its backward, and what the backward computes again.

Per token, in elements, for the article's ratios (query width 2 D, two experts of d_ff = 8/3 D, SwiGLU); FLOP without
the attention scores, of 120 D^2 that a block's forward and backward take:

| mode | kept | FLOP computed again |
|---|---|---|
| none | 18.7 D: input and normed input, queries 2 D, attention 2 D, sum and normed sum, pre-activations 10.7 D | 0 |
| selective | 7 D: input, queries 2 D, attention 2 D, its projection, the experts' output | 21 D^2: up |
| full | D: input | 40 D^2: all |

Selective keeps the outputs of matrix products and of attention, and computes norms, rotations and the router's choice
again. But the pre-activations of the experts are more than half of everything, and one of the experts' two products
makes them: the expert op keeps none and makes them again itself (`Experts.recompute`), and its own output is kept, so
that the rest of it, the other product, the activation and the movement of rows, is not repeated.

It is a policy over operations (torch's selective checkpointing) and not a set of regions: a region that ends in a
product saves what went into the product, which is what should be computed again, and runs the product again, which
should be kept. Nothing here draws random numbers, so no generator's state is kept. Under either, what a router hook
sees inside a backward is a repetition (moe/profile/observe.py), and the routing that the model returns is that of the
forward: nothing is counted twice. A replay's routes come back with the pass that took them (moe/profile/override.py).
Under "selective" a graph can be used for one backward only.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe.kernels import ops  # noqa: F401 - registers expert_mlp
from moe.kernels.arguments import transformed
from moe.layers import Attend

MODES = ("none", "selective", "full")

# Attention as torch dispatches it. None is a public name: one that a torch lacks is computed again, which is right too.
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    *(getattr(_aten, name).default for name in _ATTENTION if hasattr(_aten, name)),
    torch.ops.gpt4_moe.expert_mlp.default,
}


def run_block(block: nn.Module, x_BSD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, mode: str) -> Any:
    """The block of `x_BSD` with the checkpointing of `mode`; without gradients, or with those of torch.func, whose
    transforms know no checkpointing, as it is."""
    if mode == "none" or not torch.is_grad_enabled() or transformed():
        return block(x_BSD, rope, attend)
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, x_BSD, rope, attend, **how)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
