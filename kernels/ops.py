"""The public ops of this folder, each a torch custom op that picks its implementation. Look here first.

They have fakes, autograd and autocast, and work under `torch.compile(fullgraph=True)` and activation checkpointing. A
folder per op holds its specification (reference.py), the op (op.py) and its fast implementations.
"""

from moe.kernels.attention.op import paged_attention
from moe.kernels.experts.op import (
    ACTIVATIONS,
    IMPLEMENTATIONS,
    expert_mlp,
    expert_mlp_forward,
    expert_mlp_gradients,
    expert_mlp_inference,
    expert_mlp_quantized,
)
from moe.kernels.experts.quantized import QuantizedExperts, quantize_experts
from moe.kernels.experts.reference import activate
from moe.kernels.gate.op import topk_gate
from moe.kernels.loss import IGNORE_INDEX
from moe.kernels.loss.op import linear_cross_entropy
from moe.kernels.quantization import quantize
from moe.kernels.tiles import HAS_TRITON

__all__ = [
    "ACTIVATIONS",
    "HAS_TRITON",
    "IGNORE_INDEX",
    "IMPLEMENTATIONS",
    "QuantizedExperts",
    "activate",
    "expert_mlp",
    "expert_mlp_forward",
    "expert_mlp_gradients",
    "expert_mlp_inference",
    "expert_mlp_quantized",
    "linear_cross_entropy",
    "paged_attention",
    "quantize",
    "quantize_experts",
    "topk_gate",
]
