"""What a checkpoint holds of a rank, by the names of the whole model, and how it is put back; see checkpoint.py."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from moe.errors import ConfigError
from moe.io.tensorfiles import some


def entries(parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], complete: bool) -> dict[str, Any]:
    """All there is on this rank, by name: the tensors themselves, not copies.

    Args:
        complete: an optimizer that has made no step gets the state that its first would begin with.
    """
    held: dict[str, Any] = {}
    for part in parts:
        state = get_model_state_dict(part)  # first: it brings what FSDP has gathered back to shards
        twice = [name for name in state if f"model.{name}" in held]
        if twice:
            raise ConfigError(f"two parts of the model both have {some(twice)}: each may be in one alone")
        held |= {f"model.{name}": tensor for name, tensor in state.items()}
    for part, optimizer in paired(parts, optimizers):
        for name, parameter, group in _named(part, optimizer, complete):
            settings = {key: value for key, value in group.items() if key != "params"}
            held[f"optimizer.settings.{name}"] = json.dumps(settings, default=float)
            for key, value in optimizer.state.get(parameter, {}).items():
                held[f"optimizer.state.{name}.{key}"] = value
    return held


def paired(
    parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """Each optimizer with the part whose parameters it updates."""
    inside = [{id(p) for p in part.parameters()} for part in parts]
    for optimizer in optimizers:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        home = next((part for part, there in zip(parts, inside, strict=True) if own <= there), None)
        if home is None:
            raise ConfigError(
                f"an optimizer ({type(optimizer).__name__}) updates parameters that are not all of one part of the "
                "model: make one for each part, after it has been sharded"
            )
        yield home, optimizer


def _named(
    part: nn.Module, optimizer: torch.optim.Optimizer, complete: bool
) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """(name in the whole model, parameter, its group), by torch's own rules for wrapped modules."""
    new = not optimizer.state
    # This makes the state of a new optimizer, by a step with no gradients and no rate.
    named = get_optimizer_state_dict(part, optimizer)
    if new and not complete:
        optimizer.state.clear()
    return [
        (name, parameter, group)
        for group, with_names in zip(optimizer.param_groups, named["param_groups"], strict=True)
        for name, parameter in zip(with_names["params"], group["params"], strict=True)  # type: ignore[index]
    ]


def restore(part: nn.Module, optimizer: torch.optim.Optimizer, held: dict[str, Any], fresh: set[str]) -> None:
    """What is not loaded in place: settings, numbers that are no tensors, and that there is no state."""
    for name, parameter, group in _named(part, optimizer, complete=True):
        if name in fresh:
            optimizer.state.pop(parameter, None)
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                optimizer.state[parameter][key] = held[f"optimizer.state.{name}.{key}"]
        saved = json.loads(held[f"optimizer.settings.{name}"])
        if odd := sorted(saved.keys() ^ (group.keys() - {"params"})):
            warn(f"settings of {type(optimizer).__name__} that only one of checkpoint and optimizer has: {some(odd)}")
        for key in saved.keys() & group.keys():
            if isinstance(group[key], Tensor):
                group[key].fill_(saved[key])
            else:
                group[key] = tuple(saved[key]) if isinstance(group[key], tuple) else saved[key]


def rng_state() -> dict[str, Tensor]:
    """This rank's random generators. Training draws nothing from them today; a resumed run must not depend on that."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    states = {f"rng.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(held: Mapping[str, Any]) -> None:
    """Restores those of `rng_state` that are in `held`."""
    for key, state in held.items():
        if key.startswith("rng."):
            (torch.cuda.set_rng_state if key.endswith(".cuda") else torch.set_rng_state)(state)


# ------------------------------------------------------------------------------------------------- between the ranks


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agreed(look: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """What rank 0 sees, on every rank: a file system may show others something older."""
    values = gathered(look() if not dist.is_initialized() or dist.get_rank() == 0 else None, group)
    return values[0]


def warn(message: str) -> None:
    """On rank 0 alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(message, stacklevel=3)
