"""Hugging Face's Mixtral, read and written: the same decoder under other names, with equal logits.

Neither way needs the transformers library. Two layouts of the experts are read, the one on disk with a matrix per
expert (`experts.3.w1.weight`) and the one in memory with all experts stacked (`experts.gate_up_proj`); the first is
written, which transformers of any version reads. Tensors move one at a time, through views of our stacks.

Shape suffixes: E experts, D model width, G gate/up, F expert hidden width.
"""

import json
import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint import (
    cannot_write,
    check_as_configured,
    check_model,
    check_replaceable,
    check_vocabulary,
    put_tensors,
    stored_state,
)
from moe.errors import CheckpointError, HFError
from moe.hf.families.mixtral_config import config_from_hf, config_to_hf
from moe.hf.tokenizers import TOKENIZER_FILES, end_id, write_tokenizer
from moe.io.files import atomic_directory
from moe.io.tensorfiles import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    StoredTensor,
    check_tensors,
    copy_tensors,
    join_tied,
    list_tensors,
    write_tensors,
)
from moe.model import Transformer
from moe.tokenizer import Tokenizer

CONFIG_FILE = "config.json"


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    directory_or_model: Any, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Reads a Mixtral: a directory with `config.json` and safetensors (sharded or not), or a live `MixtralForCausalLM`.

    Args:
        directory_or_model: the weights of a live model are copied.
        device: where the weights go.
        dtype: of the weights; None keeps what is stored, whatever dtype `config.json` names.

    Raises:
        HFError: not a Mixtral, or a setting that this program has no counterpart for.
        CheckpointError: a file is missing or cut short, names or shapes do not fit `config.json`.
    """
    source: Mapping[str, StoredTensor | Tensor]
    if isinstance(directory_or_model, str | os.PathLike):
        place = str(directory_or_model)
        _refuse_adapter(Path(place))
        cfg, source = config_from_hf(read_config(Path(place))), list_tensors(place)
    elif hasattr(directory_or_model, "state_dict") and hasattr(directory_or_model, "config"):
        place = type(directory_or_model).__name__
        cfg, source = config_from_hf(directory_or_model.config.to_dict()), directory_or_model.state_dict()
    else:
        raise HFError(f"cannot load from a {type(directory_or_model).__name__}: give a directory or MixtralForCausalLM")
    found = _in_memory_names(source)
    if cfg.tie_embeddings:
        remedy = "set tie_word_embeddings to false in config.json to keep both"
        try:
            join_tied(place, found, "model.embed_tokens.weight", "lm_head.weight", remedy)
        except CheckpointError as error:
            raise HFError(str(error)) from error
    with torch.device("meta"):
        model = Transformer(cfg)
    fused = any(name.endswith("experts.gate_up_proj") for name in found)
    expected = hf_views(stored_state(model), fused=fused)
    hint = "; these are this program's names: use moe.load" if "embedding.weight" in found else ""
    check_tensors(place, found, {name: tuple(view.shape) for name, view in expected.items()}, hint)
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
    except (ValueError, RecursionError) as error:
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


def _refuse_adapter(place: Path) -> None:
    """An adapter beside the weights is put on them by transformers, so the weights alone are another model."""
    if (place / "adapter_config.json").is_file():
        raise HFError(
            f"{place} holds an adapter (adapter_config.json), which transformers puts on the model: merge it with "
            "peft's merge_and_unload and save that, or move the adapter's files away"
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
        tokenizer: a trained one, which `AutoTokenizer` then reads; its end of text, or of a turn, becomes the model's.
            A chat template comes along, and `apply_chat_template` renders what `moe chat` does.
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
    config["eos_token_id"] = end_id(tokenizer) if tokenizer is not None else None
    check_vocabulary(model.cfg, tokenizer)
    check_replaceable(directory, {CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES}, CONFIG_FILE)
    views = hf_views(stored_state(model))
    check_as_configured(model)
    views = {name.replace(".mlp.", ".block_sparse_moe."): view for name, view in views.items()}
    try:
        with atomic_directory(directory) as temporary:
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                write_tokenizer(temporary, tokenizer, model.cfg.max_seq_len)
            write_tensors(temporary, views, dtype=dtype, max_shard_bytes=max_shard_bytes)
    except OSError as error:
        raise CheckpointError(cannot_write(directory, error)) from error


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
