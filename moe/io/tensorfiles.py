"""Safetensors files, one or many: written in shards under Hugging Face's index, read one tensor at a time.

Our checkpoints and Hugging Face's keep their tensors alike, so both are read and written here. The format is a length
(8 bytes), a JSON header of that length, and the tensors' bytes; it is written out here, instead of by the library, to
stream: at no time is more than one tensor converted, moved to the CPU or copied.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

_FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk, and what it is there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    metadata: Mapping[str, str]  # the words in the header of its file


@dataclass(frozen=True)
class Deferred:
    """A tensor to write that is only read when its turn comes."""

    like: Tensor  # of its shape and dtype, best on the meta device
    read: Callable[[], Tensor]


# ---------------------------------------------------------------------------------------------------------- writing


def write_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor] | Mapping[str, Deferred],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `model.safetensors` into `directory`, or shards and their index where it would be above `max_shard_bytes`.

    Args:
        tensors: by name, on any device; views of one another are fine. A shard holds consecutive ones.
        dtype: floating-point tensors are written as this; None keeps each one's own.
        max_shard_bytes: of tensors in one file; a single larger tensor has a file of its own.
        metadata: words for the header of each file.

    Raises:
        CheckpointError: a tensor that is not plain (see `check_plain`), a dtype that the format lacks.
        OSError: the disk is full, or the directory cannot be written.
    """
    likes = {name: t.like if isinstance(t, Deferred) else t for name, t in tensors.items()}
    dtypes = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in likes.items()}
    sizes = {name: t.numel() * dtypes[name].itemsize for name, t in likes.items()}
    check_plain({name: t for name, t in tensors.items() if not isinstance(t, Deferred)})
    for name in tensors:
        if dtypes[name] not in _FORMAT_NAMES:
            raise CheckpointError(f"{name} has dtype {dtypes[name]}, which is not saved: convert it first")
    shards = _split(sizes, max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, {name: tensors[name] for name in shards[0]}, dtypes, metadata or {})
        return
    file_of: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_file(directory / file, {name: tensors[name] for name in names}, dtypes, metadata or {})
        file_of.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_plain(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for what has no values of its own, all of them, as plain numbers."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device, so there is nothing to save: give it weights first")
        if hasattr(tensor, "placements"):
            raise CheckpointError(
                f"{name} is sharded over ranks (DTensor): gather all first, with get_model_state_dict(model, options="
                "StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict, load that into an "
                "unsharded model on one rank, and save it there"
            )
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            kind = type(tensor).__name__ if tensor.layout == torch.strided else tensor.layout
            raise CheckpointError(
                f"{name} is a {kind}, not a plain tensor of numbers: save the model as it was before it was quantised "
                "or converted, or put plain tensors in (dequantize(), to_dense())"
            )


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut before each one that would take its shard above the limit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_file(
    path: Path,
    tensors: Mapping[str, Tensor | Deferred],
    dtypes: Mapping[str, torch.dtype],
    metadata: Mapping[str, str],
) -> None:
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian and this machine is not: save on another one")
    # transformers reads no file without "format".
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, given in tensors.items():
        tensor = given.like if isinstance(given, Deferred) else given
        start, end = end, end + tensor.numel() * dtypes[name].itemsize
        entry = {"dtype": _FORMAT_NAMES[dtypes[name]], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, given in tensors.items():
            tensor = given.read() if isinstance(given, Deferred) else given
            plain = tensor.detach().to("cpu", dtypes[name]).contiguous()
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
            del tensor, plain  # before the next one is read


# ---------------------------------------------------------------------------------------------------------- reading


def list_tensors(directory: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """What `model.safetensors`, or the files that the index names, hold: read from their headers, not their data.

    Other files are never read: shards that the index does not name, other indices, pickled weights. An index whose
    files are all gone, as `save_pretrained` leaves it beside a model that has become one file, is passed over with a
    warning.

    Raises:
        CheckpointError: no directory, no such files, one that the index names is missing or cut short, not safetensors;
            both `model.safetensors` and files of an index, or a tensor in two files: it would be chance which is read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(f"{directory}: {problem}; give the directory that a checkpoint was saved to")
    index_file, single = directory / INDEX_FILE, directory / SINGLE_FILE
    file_of = _read_index(index_file) if index_file.is_file() else {}
    if not file_of and not single.is_file():
        raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{_what_else(directory)}")
    shards = set(file_of.values())
    if single.is_file() and shards - {SINGLE_FILE}:
        there = sorted(file for file in shards if (directory / file).is_file())
        if there:
            raise CheckpointError(
                f"{directory} holds two sets of weights, {SINGLE_FILE} (which transformers reads) and those that "
                f"{INDEX_FILE} names ({some(there)}): delete the older ones, or the index"
            )
        warnings.warn(f"{index_file} names files that are all gone; {SINGLE_FILE} is read instead", stacklevel=3)
        shards = set()
    found: dict[str, StoredTensor] = {}
    for file in sorted(shards) or [SINGLE_FILE]:
        tensors = _list_file(directory / file)
        twice = [name for name in tensors if name in found]
        if twice:
            raise CheckpointError(f"{directory / file} and another file both hold {some(twice)}: copy all files again")
        found |= tensors
    lost = [name for name in (file_of if shards else ()) if name not in found]
    if lost:
        raise CheckpointError(f"{index_file} names tensors that its files do not hold: {some(lost)}; copy it again")
    return found


def _what_else(directory: Path) -> str:
    """What stands in the place of the weights, and the remedy."""
    names = sorted(entry.name for entry in directory.iterdir())
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return ", but pickled weights: load them with transformers and save_pretrained them as safetensors"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f", which has to say what {some(shards)} hold: copy the checkpoint again, with all its files"
    return ": not a checkpoint"


def join_tied(place: object, found: dict[str, Any], kept: str, other: str, remedy: str) -> None:
    """Leaves tied weights under the name `kept` alone, wherever they are: files have them under either name or both.

    Args:
        found: StoredTensors or tensors by name, changed in place.

    Raises:
        CheckpointError: both are there and differ; it names `place` and `remedy`.
    """
    twin = found.pop(other, None)
    if twin is None or found.setdefault(kept, twin) is twin:
        return
    pair = {}
    for key, tensor in ((kept, found[kept]), (other, twin)):
        if isinstance(tensor, StoredTensor):
            pair[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
            copy_tensors({key: tensor}, {key: pair[key]})
        else:
            pair[key] = tensor
    one, two = pair[kept], pair[other]
    if one.shape != two.shape or not bool((one == two).all()):
        raise CheckpointError(f"{place}: the weights are tied, but {other} differs from {kept}; {remedy}")


def copy_tensors(stored: Mapping[str, StoredTensor], targets: Mapping[str, Tensor]) -> None:
    """Copies stored tensors into `targets` of the same keys and shapes, one at a time, converting dtype and device.

    The files are memory-mapped; targets may be views, such as one expert of a stack.

    Raises:
        CheckpointError: a file cannot be read.
    """
    by_file: dict[Path, list[str]] = {}
    for key in targets:
        by_file.setdefault(stored[key].file, []).append(key)
    for file, keys in by_file.items():
        with _opened(file) as source, torch.no_grad():
            for key in keys:
                targets[key].copy_(source.get_tensor(stored[key].name))


def check_tensors(
    directory: str | os.PathLike[str],
    stored: Mapping[str, StoredTensor | Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    hint: str = "",
) -> None:
    """Compares names and shapes on disk with the expected ones.

    Raises:
        CheckpointError: some differ; the message names a few, with both shapes.
    """
    missing = [name for name in shapes if name not in stored]
    unexpected = [name for name in stored if name not in shapes]
    if missing or unexpected:
        parts = [f"{len(missing)} tensors are missing ({some(missing)})"] if missing else []
        parts += [f"{len(unexpected)} are not part of the model ({some(unexpected)})"] if unexpected else []
        raise CheckpointError(f"{directory}: {', '.join(parts)}{hint}")
    wrong = [
        f"{name} is {list(stored[name].shape)}, the configuration makes it {list(shape)}"
        for name, shape in shapes.items()
        if tuple(stored[name].shape) != tuple(shape)
    ]
    if wrong:
        raise CheckpointError(f"{directory}: {len(wrong)} tensors have another shape: {some(wrong, '; ')}")


def some(items: list[str], separator: str = ", ", limit: int = 3) -> str:
    """The first few of a list, for an error message."""
    return separator.join(items[:limit]) + (f"{separator}..." if len(items) > limit else "")


def _list_file(path: Path) -> dict[str, StoredTensor]:
    with _opened(path) as source:
        slices = {name: source.get_slice(name) for name in source.keys()}  # noqa: SIM118
        metadata = source.metadata() or {}
    dtypes = {text: dtype for dtype, text in _FORMAT_NAMES.items()}
    for name, found in slices.items():
        if found.get_dtype() not in dtypes:
            raise CheckpointError(
                f"{path}: {name} is stored as {found.get_dtype()}, known are {', '.join(dtypes)}; "
                "quantised weights have to be converted to one of these first"
            )
    return {
        name: StoredTensor(path, name, tuple(s.get_shape()), dtypes[s.get_dtype()], metadata)
        for name, s in slices.items()
    }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as source:
            yield source
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy the checkpoint again, with all its files") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): cut short, or another kind") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        file_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # Plain names only: an index must not lead out of its directory.
        ok = bool(file_of) and all(isinstance(f, str) and Path(f).name == f for f in file_of.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ok = False
    if not ok:
        raise CheckpointError(
            f"{path} is not a safetensors index (weight_map: tensor name to file name): copy it again"
        )
    return file_of
