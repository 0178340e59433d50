"""Tiny models of the MoE families of transformers, with random weights in every part."""

from typing import Any

import pytest
import torch

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "Olmoe": {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 4},
    "GptOss": {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2},
}


def build(name: str, **changes: Any) -> Any:
    """The model for causal language modelling, of random weights, in training mode."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name], **changes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # gpt-oss leaves biases empty or zero; here every part matters
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim < 2 else p.shape[-1] ** -0.5))
    return model.train()
