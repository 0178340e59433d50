"""Hugging Face's Mixtral, read and written: the same decoder under other names, with equal logits.

Neither way needs the transformers library. Two layouts of the experts are read, the one on disk with a matrix per
expert (`experts.3.w1.weight`) and the one in memory with all experts stacked (`experts.gate_up_proj`); the first is
written, which transformers of any version reads. Tensors move one at a time, through views of our stacks.

Shape suffixes: E experts, D model width, G gate/up, F expert hidden width.
"""

import json
import math
import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint import (
    TOKENIZER_FILE,
    cannot_write,
    check_as_configured,
    check_model,
    check_replaceable,
    check_vocabulary,
    put_tensors,
    stored_state,
)
from moe.config import AttentionConfig, Config, ExpertsConfig, RopeConfig, RouterConfig
from moe.errors import CheckpointError, ConfigError, HFError
from moe.io.files import atomic_directory
from moe.io.tensorfiles import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    StoredTensor,
    check_tensors,
    copy_tensors,
    list_tensors,
    write_tensors,
)
from moe.model import Transformer
from moe.tokenizer import END_OF_TEXT, Tokenizer

CONFIG_FILE = "config.json"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_OWN_FILES = {CONFIG_FILE, INDEX_FILE, TOKENIZER_FILE, _TOKENIZER_CONFIG_FILE, "generation_config.json"}

# What a key missing from a Mixtral config.json means: the defaults of transformers' MixtralConfig.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
}


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    directory_or_model: Any, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Reads a Mixtral: a directory with `config.json` and safetensors (sharded or not), or a live `MixtralForCausalLM`.

    Args:
        directory_or_model: the weights of a live model are copied.
        device: where the weights go.
        dtype: of the weights; None keeps what is stored.

    Raises:
        HFError: not a Mixtral, or a setting that this program has no counterpart for.
        CheckpointError: a file is missing or cut short, names or shapes do not fit `config.json`.
    """
    source: Mapping[str, StoredTensor | Tensor]
    if isinstance(directory_or_model, str | os.PathLike):
        place = str(directory_or_model)
        cfg, source = config_from_hf(read_config(Path(place))), list_tensors(place)
    elif hasattr(directory_or_model, "state_dict") and hasattr(directory_or_model, "config"):
        place = type(directory_or_model).__name__
        cfg, source = config_from_hf(directory_or_model.config.to_dict()), directory_or_model.state_dict()
    else:
        raise HFError(f"cannot load from a {type(directory_or_model).__name__}: give a directory or MixtralForCausalLM")
    found = _in_memory_names(source)
    if cfg.tie_embeddings:
        _drop_tied_head(place, found)
    with torch.device("meta"):
        model = Transformer(cfg)
    fused = any(name.endswith("experts.gate_up_proj") for name in found)
    expected = hf_views(stored_state(model), fused=fused)
    check_tensors(place, found, {name: tuple(view.shape) for name, view in expected.items()})
    targets = _allocate(model, found, fused, device, dtype)
    _copy(found, hf_views(targets, fused=fused))
    put_tensors(model, targets)
    return model


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `config.json`. Raises HFError where there is none, or it is no configuration."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        ours = (directory / "config.toml").is_file()
        remedy = "it was written by moe.save, use moe.load" if ours else "give a Hugging Face model's directory"
        raise HFError(f"{file}: no such file; {remedy}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HFError(f"{file} is not complete JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise HFError(f"{file} is JSON but not a configuration: copy it again")
    return content


def _in_memory_names(source: Mapping[str, StoredTensor | Tensor]) -> dict[str, StoredTensor | Tensor]:
    """Tensors under transformers 5's in-memory names; old files' rotary tables, which are computed, left out."""
    return {
        name.replace(".block_sparse_moe.", ".mlp."): tensor
        for name, tensor in source.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def _drop_tied_head(place: str, found: dict[str, StoredTensor | Tensor]) -> None:
    """Some files hold tied weights twice; the second is left out, if it is the same."""
    head, embedding = found.pop("lm_head.weight", None), found.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    pair = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in (("head", head), ("embedding", embedding))}
    _copy({"head": head, "embedding": embedding}, pair)
    if not torch.equal(pair["head"], pair["embedding"]):
        raise HFError(
            f"{place}: tie_word_embeddings = true, but lm_head.weight differs from model.embed_tokens.weight; "
            "set tie_word_embeddings to false in config.json to keep both"
        )


def _allocate(
    model: Transformer,
    found: Mapping[str, StoredTensor | Tensor],
    fused: bool,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Empty tensors for all of the model's, in `dtype` or what holds the pieces they are read from."""
    targets = {}
    for name, tensor in stored_state(model).items():
        dtypes = {piece: found[piece].dtype for piece in hf_views({name: tensor}, fused=fused)}
        for piece, kept in dtypes.items():
            if not kept.is_floating_point:
                raise HFError(f"{piece} is stored as {kept}: convert quantised weights to bfloat16 or float32 first")
        widest = reduce(torch.promote_types, dtypes.values())
        targets[name] = torch.empty(tensor.shape, dtype=dtype or widest, device=device)
    return targets


def _copy(found: Mapping[str, StoredTensor | Tensor], views: Mapping[str, Tensor]) -> None:
    """Fills each view from the tensor of its name, on disk or live."""
    on_disk = {name: t for name, t in found.items() if isinstance(t, StoredTensor) and name in views}
    copy_tensors(on_disk, {name: views[name] for name in on_disk})
    with torch.no_grad():
        for name, view in views.items():
            live = found[name]
            if isinstance(live, Tensor):
                view.copy_(live)


# ----------------------------------------------------------------------------------------------------------- saving


def save(
    model: Transformer,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a directory that `MixtralForCausalLM.from_pretrained` reads; an older one there is replaced at once.

    Args:
        tokenizer: a trained one, which `AutoTokenizer` then reads; its end of text becomes the model's.
        dtype: of the weights; None keeps what they are.
        max_shard_bytes: above this many bytes of weights there are several files and an index.

    Raises:
        HFError: a setting that Mixtral has no counterpart for, or GPT-4's own tokenizer.
        CheckpointError: `directory` holds anything else, the tokenizer has more ids than the model, the weights are not
            those that its configuration describes, the disk is full.
    """
    check_model(model)
    config = config_to_hf(model.cfg)
    config["dtype"] = str(dtype or model.embedding.weight.dtype).removeprefix("torch.")
    config["eos_token_id"] = tokenizer.eot_id if tokenizer is not None else None
    check_vocabulary(model.cfg, tokenizer)
    check_replaceable(directory, _OWN_FILES, CONFIG_FILE)
    views = hf_views(stored_state(model))
    check_as_configured(model)
    views = {name.replace(".mlp.", ".block_sparse_moe."): view for name, view in views.items()}
    try:
        with atomic_directory(directory) as temporary:
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                _write_tokenizer(temporary, tokenizer, model.cfg)
            write_tensors(temporary, views, dtype=dtype, max_shard_bytes=max_shard_bytes)
    except OSError as error:
        raise CheckpointError(cannot_write(directory, error)) from error


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, cfg: Config) -> None:
    file = tokenizer.save(directory / TOKENIZER_FILE)
    if "model" not in json.loads(file.read_bytes()):
        raise HFError(
            f"tokenizer {tokenizer.name} is stored by name only, which Hugging Face's libraries do not read: "
            "leave tokenizer out and pair the model with a Hugging Face copy of that tokenizer"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": cfg.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (directory / _TOKENIZER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ names


def hf_views(state: Mapping[str, Tensor], *, fused: bool = False) -> dict[str, Tensor]:
    """Our tensors under Mixtral's in-memory names, as views: writing to a view fills our tensor.

    | ours | Mixtral's, fused | Mixtral's, per expert e |
    |---|---|---|
    | w_in_EGFD | gate_up_proj [E, 2F, D] | e.w1 (gate), e.w3 (up) [F, D] |
    | w_out_EDF | down_proj [E, D, F] | e.w2 [D, F] |

    Args:
        state: as `moe.checkpoint.stored_state` gives it; any part of it.
        fused: all experts in one tensor, or one matrix per expert.

    Raises:
        HFError: a tensor that Mixtral has no counterpart for.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in state.items():
        hf_name = _hf_name(name)
        if name.endswith(".w_in_EGFD"):
            if fused:
                views[f"{hf_name}.gate_up_proj"] = tensor.flatten(1, 2)
            else:
                for e, gate_up_GFD in enumerate(tensor):
                    views[f"{hf_name}.{e}.w1.weight"], views[f"{hf_name}.{e}.w3.weight"] = gate_up_GFD
        elif name.endswith(".w_out_EDF"):
            pieces = {"down_proj": tensor} if fused else {f"{e}.w2.weight": w_DF for e, w_DF in enumerate(tensor)}
            views |= {f"{hf_name}.{piece}": view for piece, view in pieces.items()}
        else:
            views[hf_name] = tensor
    return views


_OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.experts.w_in_EGFD": "mlp.experts",
    "moe.experts.w_out_EDF": "mlp.experts",
}


def _hf_name(name: str) -> str:
    layer, _, leaf = name.removeprefix("blocks.").partition(".")
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    if leaf in _BLOCK_NAMES:
        return f"model.layers.{layer}.{_BLOCK_NAMES[leaf]}"
    raise HFError(f"{name} has no counterpart in Mixtral: only the plain decoder can be exported")


# ---------------------------------------------------------------------------------------------------- configuration


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The content of Mixtral's `config.json` for the same function from tokens to logits.

    Mixtral's balance loss is `top_k` when even and ours is 1, hence the division. `router.z_loss` and `train` only
    matter in training and have no place in it.

    Raises:
        HFError: experts.activation is not "swiglu", there are dense layers, or router.bias_update_rate is not 0.
    """
    if cfg.experts.activation != "swiglu":
        raise HFError(
            f"experts.activation = {cfg.experts.activation!r}: Mixtral's experts have three matrices (swiglu), "
            "these two; keep the checkpoint with moe.save"
        )
    if cfg.dense is not None:
        raise HFError(
            f"dense.layers = {cfg.dense.layers}: every layer of Mixtral has experts; keep the checkpoint with moe.save"
        )
    if cfg.router.bias_update_rate != 0:
        raise HFError(
            f"router.bias_update_rate = {cfg.router.bias_update_rate}: the router's bias_E chooses experts and Mixtral "
            "has none; keep the checkpoint with moe.save, or train with router.balance_loss and bias_update_rate = 0"
        )
    attention, experts = cfg.attention, cfg.experts
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": experts.d_ff,
        "hidden_act": "silu",
        "num_local_experts": experts.n_experts,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": cfg.router.balance_loss / experts.top_k,
        "router_jitter_noise": 0.0,
        "attention_dropout": 0.0,
        "max_position_embeddings": cfg.max_seq_len,
        "sliding_window": None,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_rope_to_hf(attention.rope),
    }


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """As transformers 5 reads it (`rope_parameters`), and as 4 does, which would else take other frequencies."""
    scaling: dict[str, Any] = {}
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "yarn":
        scaling |= {
            "original_max_position_embeddings": rope.original_max_seq_len,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta, **scaling},
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
    }


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The `Config` of a Mixtral `config.json`, in the form of transformers 4 or 5; the reverse of `config_to_hf`.

    Raises:
        HFError: another model family, or a setting that this program has no counterpart for.
    """
    _refuse(hf)
    full = {**_DEFAULTS, **hf}
    heads, top_k = full["num_attention_heads"], full["num_experts_per_tok"]
    try:
        return Config(
            name="mixtral",
            d_model=full["hidden_size"],
            n_layers=full["num_hidden_layers"],
            vocab_size=full["vocab_size"],
            max_seq_len=full["max_position_embeddings"],
            tie_embeddings=full["tie_word_embeddings"],
            norm_eps=full["rms_norm_eps"],
            attention=AttentionConfig(
                n_heads=heads,
                n_kv_heads=full["num_key_value_heads"] or heads,
                head_dim=full.get("head_dim") or full["hidden_size"] // heads,
                rope=_rope_from_hf(full),
            ),
            router=RouterConfig(balance_loss=full["router_aux_loss_coef"] * top_k, z_loss=0.0),
            experts=ExpertsConfig(n_experts=full["num_local_experts"], top_k=top_k, d_ff=full["intermediate_size"]),
        )
    except (ConfigError, TypeError) as error:
        raise HFError(f"config.json describes a model that cannot be: {error}") from error


def _refuse(hf: Mapping[str, Any]) -> None:
    """Raises HFError for the first setting without a counterpart."""
    window, context = hf.get("sliding_window"), hf.get("max_position_embeddings", _DEFAULTS["max_position_embeddings"])
    for field, ok, remedy in (
        ("model_type", ("mixtral",), "only Mixtral's architecture is this program's; convert the weights yourself"),
        ("hidden_act", ("silu", "swish", None), "the experts here are SwiGLU, whose gate is silu"),
        ("attention_bias", (False, None), "attention has no biases here"),
        ("partial_rotary_factor", (1, None), "whole heads are rotated here"),
        ("quantization_config", (None,), "save the model dequantised, in bfloat16 or float32"),
        ("attention_dropout", (0, None), "there is no dropout here; inference does not use it: set it to 0"),
        ("router_jitter_noise", (0, None), "there is no jitter here; inference does not use it: set it to 0"),
    ):
        if hf.get(field) not in ok:
            raise HFError(f"{field} = {hf.get(field)!r}: {remedy}")
    if window is not None and window < context:
        raise HFError(
            f"sliding_window = {window} is below max_position_embeddings = {context}: attention here sees everything; "
            f"set max_position_embeddings to {window} in config.json for the same results up to that length"
        )


def _rope_from_hf(full: Mapping[str, Any]) -> RopeConfig:
    given = full.get("rope_scaling") or full.get("rope_parameters") or {}
    rope = {key: value for key, value in given.items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    theta = float(rope.pop("rope_theta", full["rope_theta"]))
    if kind not in ("default", "linear", "yarn"):
        raise HFError(f"rope_parameters.rope_type = {kind!r}: there are only default, linear and yarn here")
    context = full["max_position_embeddings"]
    original = rope.pop("original_max_position_embeddings", context)
    factor = float(rope.pop("factor", context / original if kind == "yarn" else 1.0))
    fast, slow = float(rope.pop("beta_fast", 32.0)), float(rope.pop("beta_slow", 1.0))
    temperature = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    for field, ok in (("attention_factor", temperature), ("truncate", True), ("partial_rotary_factor", 1.0)):
        value = rope.pop(field, ok)
        if not math.isclose(value, ok, rel_tol=1e-6):
            raise HFError(f"rope_parameters.{field} = {value!r}: here it is always {ok!r}")
    if rope:
        raise HFError(f"rope_parameters has {rope}: there is no counterpart here; remove it if it has no effect")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    return RopeConfig(theta, "yarn", factor, original, fast, slow)
