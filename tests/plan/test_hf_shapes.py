"""What a config.json says layer by layer: which have experts, what each token sees, and families without experts.

The rules are those of transformers' modeling code, written out as the layers that come out of them.
"""

import json
from typing import Any

import pytest

from moe import plan
from moe.errors import ConfigError
from moe.plan.hf_shapes import load_hf, shape_from_hf

SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 96,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}  # fmt: skip


def routed(**changes: Any) -> list[int]:
    """The layers that have experts."""
    shape = shape_from_hf(SMALL | changes)
    return [i for i, layer in enumerate(shape.layers) if layer.mlp.n_experts]


def windows(**changes: Any) -> list[int]:
    return [layer.attention.window for layer in shape_from_hf(SMALL | {"sliding_window": 16} | changes).layers]


LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32}


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "mixtral"}, [0, 1, 2, 3, 4, 5]),
        ({"model_type": "llama"}, []),
        ({"model_type": "glm4_moe"}, [0, 1, 2, 3, 4, 5]),
        ({"model_type": "glm4_moe", "first_k_dense_replace": 0}, [0, 1, 2, 3, 4, 5]),
        ({"model_type": "glm4_moe", "first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ({"model_type": "deepseek_v2", **LATENT, "first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ({"model_type": "deepseek_v2", **LATENT, "n_routed_experts": None}, []),
        ({"model_type": "qwen3_moe"}, [0, 1, 2, 3, 4, 5]),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, [1, 3, 5]),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"model_type": "llama4"}, [0, 1, 2, 3, 4, 5]),
        ({"model_type": "llama4", "interleave_moe_layer_step": 3}, [2, 5]),
        ({"model_type": "llama4", "moe_layers": [0, 4]}, [0, 4]),
    ],
)
def test_layers_with_experts(config: dict, layers: list[int]) -> None:
    assert routed(**config) == layers


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        ({"model_type": "mixtral"}, [16] * 6),
        ({"model_type": "mixtral", "sliding_window": None}, [0] * 6),
        ({"model_type": "gpt_oss"}, [16, 0, 16, 0, 16, 0]),
        ({"model_type": "qwen3"}, [0] * 6),
        ({"model_type": "qwen3", "use_sliding_window": True}, [16] * 6),
        ({"model_type": "llama", "layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, [0] * 5 + [16]),
        ({"model_type": "llama4", "attention_chunk_size": 16}, [16, 16, 16, 0, 16, 16]),
        ({"model_type": "llama4", "attention_chunk_size": 16, "no_rope_layer_interval": 2}, [16, 0] * 3),
        ({"model_type": "llama4", "attention_chunk_size": 16, "no_rope_layers": [0, 1, 1, 1, 1, 0]}, [0, *[16] * 4, 0]),
    ],
)
def test_windows(config: dict, seen: list[int]) -> None:
    assert windows(**config) == seen


def test_layer_types_of_another_depth() -> None:
    with pytest.raises(ConfigError, match=r"layer_types = .*: has 2 entries for num_hidden_layers = 6"):
        windows(model_type="llama", layer_types=["full_attention"] * 2)


@pytest.mark.parametrize(
    ("config", "biases", "norms"),
    [
        ({"model_type": "llama"}, 0, 0),
        ({"model_type": "llama", "attention_bias": True}, 3 * 64 + 64, 0),
        ({"model_type": "qwen2", "num_key_value_heads": 2}, 64 + 2 * 32, 0),
        ({"model_type": "qwen2", "qkv_bias": False}, 0, 0),
        ({"model_type": "glm4_moe", "attention_bias": True}, 3 * 64, 0),
        ({"model_type": "glm4_moe", "use_qk_norm": True}, 0, 2 * 16),
        ({"model_type": "qwen3", "num_key_value_heads": 2}, 0, 2 * 16),
        ({"model_type": "olmoe", "num_key_value_heads": 2}, 0, 64 + 32),
        ({"model_type": "gpt_oss"}, 3 * 64 + 64 + 4, 0),
    ],
)
def test_biases_and_norms_of_attention(config: dict, biases: int, norms: int) -> None:
    attention = shape_from_hf(SMALL | config).main.attention
    assert (attention.biases, attention.norms) == (biases, norms)


def test_biases_of_a_dense_mlp() -> None:
    """gate, up and down: intermediate_size twice, hidden_size once."""
    assert shape_from_hf(SMALL | {"model_type": "llama", "mlp_bias": True}).main.mlp.biases == 96 + 96 + 64


def test_gpt2_has_its_published_124_million() -> None:
    """124,439,808 is the sum over the checkpoint of openai-community/gpt2."""
    content = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}
    assert plan.params(shape_from_hf(content)).total == 124_439_808


def test_mpt_with_and_without_biases() -> None:
    content = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 100, "max_seq_len": 32}
    d, f = 64, 256
    plain = 2 * (4 * d * d + 2 * d * f + 2 * d) + 100 * d + d
    positions = 32 * d
    biases = 2 * (4 * d + f + d + 2 * d) + d  # projections, MLP, LayerNorms; and the last norm's
    assert plan.params(shape_from_hf(content)).total == plain + positions + biases
    assert plan.params(shape_from_hf(content | {"no_bias": True})).total == plain + positions
    alibi = {"no_bias": True, "attn_config": {"alibi": True, "attn_type": "multiquery_attention"}}
    assert plan.params(shape_from_hf(content | alibi)).total == plain - 2 * 2 * d * (d - 16)
    assert plan.params(shape_from_hf(content | {"no_bias": True, "tie_word_embeddings": False})).head == 100 * d


def test_files_that_are_none(tmp_path) -> None:
    place = tmp_path / "config.json"
    for text, message in (("[]", "must hold an object"), ("{", "not a JSON file")):
        place.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_hf(place)
    place.write_text(json.dumps(SMALL | {"model_type": "mixtral", "hidden_size": 64.0}))
    assert load_hf(tmp_path).d_model == 64
    assert load_hf(place).name == tmp_path.name
    for key, value, message in (
        ("tie_word_embeddings", 1, "must be true or false"), ("model_type", 3, "must be a string"),
        ("layer_types", "all", "must be a list"), ("vocab_size", 0, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{key} = {value!r}.*{message}"):
            shape_from_hf(SMALL | {"model_type": "llama", key: value})
