"""Between the checkpoints of a run on many ranks and the directories of `moe.save` and `moe.load`, in one process.

Neither way holds the model: tensors are read, and written, one at a time.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_entries
from torch.distributed.checkpoint.state_dict_saver import save as save_entries

from moe.checkpoint import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    VERSION,
    VERSION_KEY,
    cannot_write,
    check_replaceable,
    check_vocabulary,
    load_config_of,
    stored_state,
    with_current_names,
)
from moe.errors import CheckpointError
from moe.io.files import atomic_directory
from moe.io.runs import locate
from moe.io.tensorfiles import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    Deferred,
    StoredTensor,
    check_tensors,
    copy_tensors,
    join_tied,
    list_tensors,
    write_tensors,
)
from moe.model import Transformer
from moe.parallel.checkpoint import FAILURES, METADATA_FILE, Writer, read_training, small_files
from moe.tokenizer import Tokenizer


def export(
    step_directory: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the weights of a run's checkpoint as `moe.save` would: safetensors, config.toml, tokenizer.

    Args:
        step_directory: such as RUN/checkpoints/step-000500, of any mesh; one that was saved with a configuration.
        directory, tokenizer, max_shard_bytes: as for `moe.save`. An older checkpoint there is replaced, at once or not
            at all.

    Raises:
        CheckpointError: it is not whole, not of the model that its configuration describes, or cannot be written.
    """
    place = Path(step_directory)
    if not (place / METADATA_FILE).is_file():
        raise CheckpointError(f"{place} has no {METADATA_FILE}: give a checkpoint that was written to its end")
    read_training(place)  # for its version
    cfg = load_config_of(place)
    check_vocabulary(cfg, tokenizer)
    check_replaceable(directory, {CONFIG_FILE, TOKENIZER_FILE, CHAT_TEMPLATE_FILE, INDEX_FILE}, CONFIG_FILE)
    reader = _Reader(place)
    try:
        likes = _weights(reader.read_metadata())
    except Exception as error:
        raise CheckpointError(f"{place / METADATA_FILE} cannot be read ({error}): use an older checkpoint") from error
    if cfg.tie_embeddings and "embedding.weight" in likes:
        likes.pop("head.weight", None)
    with torch.device("meta"):
        described = stored_state(Transformer(cfg))
    check_tensors(place, likes, {name: tuple(t.shape) for name, t in described.items()})
    tensors = {name: Deferred(likes[name], lambda n=name: reader.read(n, likes[n])) for name in described}
    try:
        with atomic_directory(directory) as temporary:
            metadata = {VERSION_KEY: str(VERSION)}
            write_tensors(temporary, tensors, max_shard_bytes=max_shard_bytes, metadata=metadata)
            (temporary / CONFIG_FILE).write_text(cfg.to_toml(), encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(temporary / TOKENIZER_FILE)
                if tokenizer.chat_template is not None:
                    (temporary / CHAT_TEMPLATE_FILE).write_text(tokenizer.chat_template, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(cannot_write(directory, error)) from error


def divide(directory: str | os.PathLike[str], step_directory: str | os.PathLike[str]) -> None:
    """Writes the weights of a `moe.save` directory so that the ranks of any mesh load their shards alone.

    `moe.parallel.checkpoint.load(step_directory, parts)` reads what comes out, without optimizers.

    Raises:
        CheckpointError: `directory` is no checkpoint, or not of the model that its configuration describes;
            `step_directory` is there already, or cannot be written.
    """
    place, target = locate(directory), Path(step_directory)
    if target.exists():
        raise CheckpointError(f"{target} exists: choose a new directory")
    cfg = load_config_of(place)
    stored = with_current_names(list_tensors(place))
    with torch.device("meta"):
        model = Transformer(cfg)
    if cfg.tie_embeddings:
        join_tied(place, stored, "embedding.weight", "head.weight", f"set tie_embeddings = false in {CONFIG_FILE}")
    check_tensors(place, stored, {name: tuple(t.shape) for name, t in stored_state(model).items()})
    if cfg.tie_embeddings:
        stored["head.weight"] = stored["embedding.weight"]  # a stage has one of them
    held = {f"model.{n}": torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in stored.items()}
    planner = _FromFiles({f"model.{name}": tensor for name, tensor in stored.items()})
    writer = Writer(target, small_files({"step": 0, "world": 1}, cfg))
    try:
        with _alone():
            save_entries(held, storage_writer=writer, planner=planner, no_dist=True)
    except FAILURES as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


class _Reader(FileSystemReader):
    """torch's reader, which would else read `.metadata` again for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata

    def read(self, name: str, like: Tensor) -> Tensor:
        """One tensor of the model, put together from however many shards there are."""
        tensor = torch.empty(like.shape, dtype=like.dtype)
        try:
            with _alone():
                load_entries({f"model.{name}": tensor}, storage_reader=self, no_dist=True)
        except FAILURES as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error}): use an older checkpoint") from error
        return tensor


class _FromFiles(DefaultSavePlanner):
    """Plans with tensors on the meta device, and reads each from its file when it is written."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        super().__init__()
        self.stored = stored

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.stored[index.fqn]
        tensor = torch.empty(found.shape, dtype=found.dtype)
        copy_tensors({"": found}, {"": tensor})
        return tensor


def _weights(metadata: Metadata) -> dict[str, Tensor]:
    """What a checkpoint has of the model: by name, on the meta device."""
    return {
        key.removeprefix("model."): torch.empty(found.size, dtype=found.properties.dtype, device="meta")
        for key, found in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(found, TensorStorageMetadata)
    }


def _alone() -> warnings.catch_warnings:
    """torch warns of every reading and writing without a process group."""
    return warnings.catch_warnings(action="ignore")
