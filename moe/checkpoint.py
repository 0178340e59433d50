"""Checkpoints: a directory of safetensors, `config.toml` and, if there is one, `tokenizer.json`.

Weights lie in `model.safetensors`, or in shards under an index (see `moe.io.tensorfiles`). A checkpoint is written
under a temporary name and renamed, so that a directory is whole or absent. The optimizer's state is not part of it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from moe.config import Config, load_config
from moe.errors import CheckpointError, ConfigError, TokenizerError
from moe.io.files import LOCK_FILE, atomic_directory
from moe.io.runs import locate
from moe.io.tensorfiles import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    check_plain,
    check_tensors,
    copy_tensors,
    join_tied,
    list_tensors,
    some,
    write_tensors,
)
from moe.layers import at_least_fp32
from moe.model import Transformer
from moe.tokenizer import Tokenizer

T = TypeVar("T")

CONFIG_FILE = "config.toml"
TOKENIZER_FILE, CHAT_TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"
# What the tensors are called and how they lie, in the header of each file. Files without a version are of version 1.
VERSION_KEY, VERSION = "gpt4_moe_version", 2
# Names of older versions, by their ends, and what they are called now.
RENAMED = {".moe_norm.weight": ".mlp_norm.weight"} | {
    f".moe.{leaf}": f".moe.experts.{leaf}"
    for leaf in (
        *("w_in_EGFD", "w_out_EDF"),
        *("lora_a_in_ELD", "lora_b_in_EGFL", "lora_a_out_ELF", "lora_b_out_EDL"),
    )
}


# ----------------------------------------------------------------------------------------------------------- saving


def save(
    model: Transformer,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint to `directory`; an older checkpoint there is replaced, at once or not at all.

    Args:
        model: on any device; parameters and persistent buffers are stored in their own dtypes, tied weights once.
        tokenizer: stored beside the weights, with the chat template that it may have.
        max_shard_bytes: above this many bytes of weights there are several files and an index.

    Raises:
        CheckpointError: `directory` holds anything but a checkpoint, the tokenizer has more ids than the model, the
            weights are no plain tensors (on the meta device, sharded, quantised) or not those that the configuration
            describes, the disk is full. What was there before is then untouched.
    """
    check_model(model)
    check_plain(stored_state(model))
    check_as_configured(model)
    check_vocabulary(model.cfg, tokenizer)
    check_replaceable(directory, {CONFIG_FILE, TOKENIZER_FILE, CHAT_TEMPLATE_FILE, INDEX_FILE}, CONFIG_FILE)
    try:
        with atomic_directory(directory) as temporary:
            write_files(model, temporary, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
    except OSError as error:
        raise CheckpointError(cannot_write(directory, error)) from error


def write_files(
    model: Transformer,
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the files of a checkpoint into an existing directory: `save` without the checks and the renaming.

    For writers of more than a model, under `moe.io.files.atomic_directory`. Raises as `write_tensors` does.
    """
    metadata = {VERSION_KEY: str(VERSION)}
    write_tensors(directory, stored_state(model), max_shard_bytes=max_shard_bytes, metadata=metadata)
    (directory / CONFIG_FILE).write_text(model.cfg.to_toml(), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(directory / TOKENIZER_FILE)
        if tokenizer.chat_template is not None:
            (directory / CHAT_TEMPLATE_FILE).write_text(tokenizer.chat_template, encoding="utf-8")


def cannot_write(directory: str | os.PathLike[str], error: OSError) -> str:
    """The message for an OSError while a directory was written under `atomic_directory`."""
    return (
        f"cannot write {directory}: {error.strerror or error}; free some space or choose another place "
        "(what was there before is untouched, nothing half-written was left)"
    )


def check_model(model: object) -> None:
    """Raises CheckpointError unless it is a Transformer itself: a wrapper, as of torch.compile, renames the weights."""
    if not isinstance(model, Transformer) or hasattr(model, "_orig_mod"):
        raise CheckpointError(f"model is a {type(model).__name__}: give the moe.Transformer itself, not what wraps it")


def check_as_configured(model: Transformer) -> None:
    """Raises CheckpointError where the configuration describes other tensors than the model has: `load` would fail."""
    with torch.device("meta"):
        described = stored_state(Transformer(model.cfg))
    state, tied = stored_state(model), model.cfg.tie_embeddings
    hint = "; a checkpoint holds what its configuration describes: take adapters, wrappers and other layers out first"
    if any(".lora_" in name for name in state):
        hint = "; these are adapters: save moe.lora.merged(model), or the adapters alone with moe.lora.save_adapter"
    elif tied and "head.weight" in state:
        hint = "; tie_embeddings = true, but the two are no longer one: call model.tie_weights()"
    elif not tied and "head.weight" not in state:
        hint = "; it is the embedding's, but tie_embeddings = false: give the configuration tie_embeddings = true"
    check_tensors("the model", state, {name: tuple(t.shape) for name, t in described.items()}, hint)


def check_replaceable(directory: str | os.PathLike[str], files: Iterable[str], config_file: str) -> None:
    """Refuses to replace what is not a checkpoint, or holds more than one: replacing would delete it.

    Args:
        files: the names, beside `model*.safetensors`, that a checkpoint of this kind may have.
        config_file: the one that it must have.

    Raises:
        CheckpointError: a file is there, or a directory that is neither empty nor such a checkpoint.
    """
    place = Path(directory)
    if not place.exists():
        return
    if not place.is_dir():
        raise CheckpointError(f"{place} is a file: choose the name of a directory")
    names = {entry.name for entry in place.iterdir()} - {LOCK_FILE}
    weights = {n for n in names if n.startswith("model") and n.endswith(".safetensors") and (place / n).is_file()}
    if names and not (weights and config_file in names):
        raise CheckpointError(
            f"{place} exists and is not a checkpoint (it lacks {config_file} or model*.safetensors): "
            "choose a new or an empty directory"
        )
    others = sorted(names - weights - set(files))
    if others:
        raise CheckpointError(
            f"{place} holds more than a checkpoint, and saving would delete it: {some(others)}; "
            "move that away or choose another directory"
        )


def check_vocabulary(cfg: Config, tokenizer: Tokenizer | None) -> None:
    """Raises CheckpointError when the tokenizer makes ids that the model has no embedding for."""
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model has vocab_size = "
            f"{cfg.vocab_size}: use the tokenizer it was trained with, or a model of at least that vocabulary"
        )


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Reads a checkpoint: built without weights, then filled one tensor at a time from memory-mapped files.

    Args:
        directory: what `save` wrote, or a complete run, whose final/ is meant (`locate`); so for all of this module.
        device: where the weights go.
        dtype: of the parameters; None keeps what is stored. Buffers (the router's bias) keep it, or are float32.

    Raises:
        CheckpointError: no directory or file, a file cut short, not a checkpoint, other names or shapes than
            `config.toml` describes.
    """
    directory = locate(directory)
    cfg = load_config_of(directory)
    with torch.device("meta"):
        model = Transformer(cfg)
    load_weights(model, directory, device=device, dtype=dtype)
    return model


def load_weights(
    model: Transformer,
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Gives `model` (usually on the meta device) new parameters and buffers from a checkpoint's tensors; as `load`."""
    directory = locate(directory)
    stored = with_current_names(list_tensors(directory))
    for file, metadata in {tensor.file: tensor.metadata for tensor in stored.values()}.items():
        _check_version(file, metadata.get(VERSION_KEY, "1"))
    if model.cfg.tie_embeddings:
        remedy = f"set tie_embeddings = false in {CONFIG_FILE} to keep both"
        join_tied(directory, stored, "embedding.weight", "head.weight", remedy)
    state = stored_state(model)
    hint = ""
    if any(n.startswith("model.layers.") for n in stored):
        hint = "; these are Hugging Face's names: use moe.hf.load, or convert the model with `moe export`"
    elif any(".lora_" in n for n in stored):
        hint = "; a fine-tune with LoRA saved this to go on from: load what it left in final/"
    check_tensors(directory, stored, {name: tuple(t.shape) for name, t in state.items()}, hint)
    targets = {
        name: torch.empty(
            t.shape,
            dtype=(dtype or stored[name].dtype) if isinstance(t, nn.Parameter) else at_least_fp32(stored[name].dtype),
            device=device,
        )
        for name, t in state.items()
    }
    copy_tensors(stored, targets)
    put_tensors(model, targets)


def with_current_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of a checkpoint of any version under the names that they have now."""
    found = {}
    for name, tensor in tensors.items():
        old = next((end for end in RENAMED if name.endswith(end)), "")
        found[name.removesuffix(old) + RENAMED.get(old, "")] = tensor
    return found


def _check_version(file: Path, version: str) -> None:
    """Raises CheckpointError where a file is of a version that is newer than this program."""
    if not (version.isdecimal() and int(version) <= VERSION):
        raise CheckpointError(
            f"{file} is a checkpoint of version {version}, and this program knows versions up to {VERSION}: "
            "use the gpt4-moe that wrote it, or a newer one"
        )


def load_config_of(directory: str | os.PathLike[str]) -> Config:
    """The `Config` of a checkpoint, without its weights.

    Raises:
        CheckpointError: no directory, no `config.toml`, or one that is not a configuration.
    """
    place = locate(directory)
    if not place.is_dir():
        problem = "is not a directory" if place.exists() else "no such directory"
        raise CheckpointError(f"{place}: {problem}; give a checkpoint, such as RUN/final")
    if not (place / CONFIG_FILE).is_file():
        foreign = (place / "config.json").is_file()
        remedy = (
            "it looks like a Hugging Face model, use moe.hf.load, or convert it with `moe export --format moe`"
            if foreign
            else "give one that moe train or moe.save wrote"
        )
        raise CheckpointError(f"{place} has no {CONFIG_FILE}, so it is not a checkpoint of this program: {remedy}")
    try:
        return load_config(place / CONFIG_FILE)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, or of any directory with a `tokenizer.json`; with its chat template, if any.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has more ids than the checkpoint's model.
    """
    place = Path(directory)
    if not (place / TOKENIZER_FILE).is_file():
        place = locate(directory)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such checkpoint directory")
    if not (place / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{place} has no {TOKENIZER_FILE}: the checkpoint was saved without one; copy there the one that the model "
            "was trained with, or give it to moe.save as tokenizer="
        )
    try:
        tokenizer = Tokenizer.load(place / TOKENIZER_FILE)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    if (place / CONFIG_FILE).is_file():
        check_vocabulary(load_config_of(place), tokenizer)
    template = _chat_template(place)
    return tokenizer if template is None else tokenizer.with_chat_template(template)


def _chat_template(place: Path) -> str | None:
    """The template of a file of its own, or of Hugging Face's `tokenizer_config.json`, where it may be one of several.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file, settings = place / CHAT_TEMPLATE_FILE, place / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{place}: its chat template cannot be read ({error}): copy it again") from None
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


# ----------------------------------------------------------------------------------------------------- model tensors


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once: tied weights under the first of their names."""
    first_name: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first_name.setdefault(id(tensor), name)
    return {name: state[name] for name in first_name.values()}


def put_tensors(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Makes `tensors` the parameters and buffers of these names, without a copy, and ties what is tied."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
    if model.cfg.tie_embeddings:
        model.head.weight = model.embedding.weight
