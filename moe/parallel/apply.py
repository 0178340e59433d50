"""A model, or a stage of a pipeline, over the ranks: everything that is done to it, in order."""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe.experts import Experts
from moe.model import Transformer
from moe.parallel import context, expert, tensor
from moe.parallel.mesh import Meshes


def parallelize(model: Transformer, meshes: Meshes) -> Transformer:
    """Divide a model in place, and return it: experts, then tensors and the sequence, then the batch and the weights.

    A pipeline is cut before (pipeline.py): a stage is a model with parts that are None. On the meta device, or with the
    same weights on every rank; `init_weights`, after `to_empty`, draws for any mesh what one process would.
    `model.positions` is told of a pass's documents; activation checkpointing is the model's own setting.

    Raises:
        ConfigError: the model cannot be divided so; see `Degrees.check`.
    """
    degrees = meshes.degrees
    degrees.check(model.cfg)
    expert.apply(model, meshes.experts["ep", "tp"])
    if degrees.tp > 1:
        tensor.apply(model, meshes.dense["tp"])
    model.positions = context.apply(model, meshes.dense["cp"])  # type: ignore[assignment]
    if degrees.dp * degrees.cp > 1:
        _shard(model, meshes)
    return model


def _shard(model: Transformer, meshes: Meshes) -> None:
    """FSDP: of the experts over what expert parallelism leaves, of all else over the ranks with other tokens."""
    dense, experts = _sharding_mesh(meshes.dense, "dp_shard", "cp"), _sharding_mesh(meshes.experts, "efsdp")
    # A pipeline comes back to its weights soon, and schedules that take a backward apart find no gradients of weights
    # that were dropped between.
    stay = meshes.degrees.zero == 2 or meshes.degrees.pp > 1
    blocks: Any = model.blocks
    for block in blocks:
        if block is None:
            continue
        if meshes.degrees.ep > 1:
            for module in block.modules():
                if isinstance(module, Experts):
                    fully_shard(module, mesh=experts, reshard_after_forward=not stay)
        fully_shard(block, mesh=dense, reshard_after_forward=not stay)
    fully_shard(model, mesh=dense, reshard_after_forward=not stay)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The objective is divided by the counts of the whole batch, so gradients are added, not averaged.
            module.set_gradient_divide_factor(1.0)
            # Else of float32 by an operation that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def _sharding_mesh(mesh: DeviceMesh, *names: str) -> DeviceMesh:
    name = "_".join(names)
    sharded = mesh[names]._flatten(name) if len(names) > 1 else mesh[name]
    return sharded if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", name]
