"""The two meshes over the ranks of a run: of what every token passes, and of the experts."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.errors import ConfigError
from moe.parallel.degrees import Degrees

DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERTS = ("pp", "dp_replicate", "efsdp", "ep", "tp")


class Meshes(NamedTuple):
    """What a rank is among others.

    Attributes:
        dense: dimensions `DENSE`. experts: dimensions `EXPERTS`, over the same ranks in the same order.
        data: the ranks of a stage with sequences of their own (dp_replicate, dp_shard), flattened.
        tokens: those with tokens of their own (dp_replicate, dp_shard, cp), flattened.
    """

    degrees: Degrees
    dense: DeviceMesh
    experts: DeviceMesh
    data: DeviceMesh
    tokens: DeviceMesh
    device: torch.device


def make_meshes(degrees: Degrees, device: torch.device) -> Meshes:
    """The meshes; every rank of the default process group calls it.

    Raises:
        ConfigError: another number of ranks than the degrees make.
    """
    if dist.get_world_size() != degrees.world:
        raise ConfigError(
            f"{dist.get_world_size()} ranks: pp x dp x cp x tp = {degrees.pp} x {degrees.dp} x {degrees.cp} x "
            f"{degrees.tp} needs {degrees.world}"
        )
    d, kind = degrees, device.type
    dense = init_device_mesh(kind, (d.pp, d.dp_replicate, d.dp_shard, d.cp, d.tp), mesh_dim_names=DENSE)
    experts = init_device_mesh(kind, (d.pp, d.dp_replicate, d.efsdp, d.ep, d.tp), mesh_dim_names=EXPERTS)
    data = dense["dp_replicate", "dp_shard"]._flatten("data")
    tokens = dense["dp_replicate", "dp_shard", "cp"]._flatten("tokens")
    return Meshes(degrees, dense, experts, data, tokens, device)
