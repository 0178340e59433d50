"""The one place where weights are made: what each parameter is, its first value, and what is tied to what.

Shape suffixes: E experts.
"""

import hashlib
import math
import sys
from typing import Any, NoReturn

import torch
import torch.nn as nn
from torch import Tensor

# What a parameter is, by the last part of its name: the one list of all of them, for whoever treats them differently.
KINDS = {
    "embedding": "embedding",
    "head": "head",
    **dict.fromkeys(("attention_norm", "mlp_norm", "norm"), "norm"),
    "router": "router",
    **dict.fromkeys(("wq", "wk", "wv", "w_in", "w_in_EGFD"), "matrix"),
    **dict.fromkeys(("wo", "w_out", "w_out_EDF"), "residual matrix"),  # they write to the residual stream
}


def kind_of(name: str) -> str:
    """The kind of the parameter of this name: a value of `KINDS`, or "adapter" for LoRA's.

    Raises:
        ValueError: it is not known here; what it starts from and which optimizer it gets has to be said first.
    """
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if leaf.startswith("lora_"):
        return "adapter"
    if leaf not in KINDS:
        raise ValueError(f"parameter {name} is of no kind that is known here: add {leaf!r} to moe.weights.KINDS")
    return KINDS[leaf]


@torch.no_grad()
def init_weights(model: Any, seed: int) -> None:
    """Give every parameter its first value, in place, fill the buffers, and tie what is tied.

    | kind | value |
    |---|---|
    | norm | 1 |
    | embedding | normal, std 1 |
    | head, tied embedding | normal, std 0.02 |
    | matrix, router | normal, std 1 / sqrt(fan-in) / 2 |
    | residual matrix | the same / sqrt(2 L) |
    | buffer (the router's bias) | 0 |

    Each parameter draws from a generator of its own, seeded by (seed, name), and each expert's slice from one seeded
    by (seed, name, expert): whichever slices a rank holds of a sharded parameter (DTensor), it draws the values that
    the whole model would have. Experts that it does not hold it never draws; of other parameters it draws one whole
    one at a time and keeps its slice.

    Raises:
        ValueError: a parameter of no known kind, or an adapter, which starts where `moe.lora.add` puts it.
    """
    model.tie_weights()
    for name, parameter in model.named_parameters():
        kind = kind_of(name)
        if kind == "norm":
            parameter.fill_(1.0)
        elif kind in ("embedding", "head"):
            _draw(parameter, 1.0 if kind == "embedding" and not model.cfg.tie_embeddings else 0.02, seed, name)
        elif kind in ("matrix", "router", "residual matrix"):
            std = 0.5 / math.sqrt(parameter.shape[-1])
            if kind == "residual matrix":
                std /= math.sqrt(2 * model.cfg.n_layers)
            if name.endswith(("_EGFD", "_EDF")):
                _draw_experts(parameter, std, seed, drawn_as(name))
            else:
                _draw(parameter, std, seed, name, 0)
        else:
            raise ValueError(f"parameter {name} is an {kind}: initialise the model first, then add adapters to it")
    for buffer in model.buffers():
        buffer.zero_()


def _draw(parameter: Any, std: float, seed: int, *key: object) -> None:
    """Normal values in place, from the generator of the key."""
    shards = _shards(parameter)
    whole = (
        parameter if shards is None else torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    )
    whole.normal_(0.0, std, generator=generator_for(parameter.device, seed, *key))
    if shards is not None:
        kept = shards.distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(kept.to_local())  # type: ignore[attr-defined]


def _draw_experts(parameter: Any, std: float, seed: int, name: str) -> None:
    """As `_draw`, each expert's slice from a generator of its own; of experts elsewhere there is nothing to draw."""
    shards = _shards(parameter)
    if shards is None:
        for e, part in enumerate(parameter):
            _draw(part, std, seed, name, e)
        return
    mesh, placements, by_expert, of_expert = parameter.device_mesh, parameter.placements, [], []
    for placement in placements:
        dim = placement.dim if placement.is_shard() else None
        by_expert.append(placement if dim == 0 else shards.Replicate())
        of_expert.append(shards.Shard(dim - 1) if dim else shards.Replicate())
    experts = torch.arange(len(parameter), device=parameter.device)
    here = shards.distribute_tensor(experts, mesh, by_expert, src_data_rank=None).to_local().tolist()
    for e, part in zip(here, parameter.to_local(), strict=True):
        whole = _like(parameter, parameter.shape[1:])
        _draw(whole, std, seed, name, e)
        part.copy_(shards.distribute_tensor(whole, mesh, of_expert, src_data_rank=None).to_local())


def _like(parameter: Tensor, shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)


def _shards(parameter: Tensor) -> Any:
    """torch.distributed.tensor for a sharded parameter, whose own module it is; None for a plain one.

    Not imported: this file knows of no parallelism, and where there is a DTensor it is loaded already.
    """
    return sys.modules["torch.distributed.tensor"] if hasattr(parameter, "placements") else None


def drawn_as(name: str) -> str:
    """The name by which a parameter's draws are keyed: the experts' weights keep that of when they were the MoE's."""
    return name.replace(".moe.experts.", ".moe.")


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator of its own for each key: the same values wherever, and in whatever order, they are drawn."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def made_by_init_weights(self: nn.Module) -> NoReturn:
    """The `reset_parameters` of every module, which knows neither its name nor the depth, on which values depend."""
    raise RuntimeError(
        f"{type(self).__name__} cannot make its own first values, which depend on its place in the model: call "
        "moe.weights.init_weights(model, seed) on the whole, after model.to_empty(device=...)"
    )


def tie(one: nn.Module, other: nn.Module) -> None:
    """Makes the weight of `other` that of `one`, unless one of them is an adapter's, quantised, or of another shape."""
    weight, old = (module._parameters.get("weight") for module in (one, other))
    if weight is not None and old is not None and type(weight) is type(old) and weight.shape == old.shape:
        other.weight = weight


def complete_tied(state_dict: dict[str, Tensor], one: str, other: str, errors: list[str]) -> None:
    """A state dict may hold a tied weight under one of its names or both, and then it must be the same."""
    found = [state_dict[name] for name in (one, other) if name in state_dict]
    if len(found) == 1:
        state_dict |= {one: found[0], other: found[0]}
    elif len({type(t) for t in found}) == 1 and not found[0].is_meta and not torch.equal(*found):
        errors.append(f"{one} and {other} are tied, but differ: load them into a model with tie_embeddings = false")
