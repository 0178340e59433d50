"""Ranks: started on this machine by torch's elastic launcher, or found where torchrun or SLURM has started them."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moe.errors import ConfigError

TIMEOUT = timedelta(minutes=10)  # without an answer a rank is taken for lost
# What SLURM calls what torchrun calls so.
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def inside() -> bool:
    """Whether somebody has started this process as a rank among others."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1)


def connect(device: torch.device, world: int | None = None, timeout: timedelta = TIMEOUT) -> torch.device:
    """Joins the process group that the environment tells of; returns this rank's own device.

    A rank that is started again meets others of its own life only: torchrun keeps its store, and in it what the dead
    have left (pytorch issue 135712). On CUDA a collective that hangs leaves a trace of what every rank was doing.

    Args:
        world: how many ranks there must be.

    Raises:
        ConfigError: there are others, or the environment tells of none.
    """
    for name, slurm in _SLURM.items():
        if name not in os.environ and slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"no ranks: {', '.join(missing)} is not in the environment; start with torchrun")
    if world is not None and int(os.environ["WORLD_SIZE"]) != world:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} ranks were started, and the mesh needs {world}: start as many, or change it"
        )
    if device.type == "cuda":
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    store, rank, ranks = next(rendezvous("env://", timeout=timeout))
    life = PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=life, rank=rank, world_size=ranks, timeout=timeout)
    return device


def start(world: int, function: Callable[..., Any], *args: Any, max_restarts: int = 0) -> Any:
    """Runs `function(*args)`, which a module defines at its top, on `world` ranks of this machine -> rank 0's result.

    Each has its share of the processor's cores. Signals that end this process end them; if one fails, all are ended,
    and started again up to `max_restarts` times.

    Raises:
        ChildFailedError: (torch's) a rank failed for the last time; it names the first, and its traceback.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = str(max(1, torch.get_num_threads() // world))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="moe", max_restarts=max_restarts, start_method="spawn", monitor_interval=0.1,
    )  # fmt: skip
    return elastic_launch(config, function)(*args)[0]
