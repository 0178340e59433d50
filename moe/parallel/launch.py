"""Ranks: how one joins the others (`join`), and how a machine starts its own without torchrun (`start`).

Both go through torch.distributed.elastic: a rank that dies takes the others down, and all are started again, as often
as is allowed. What they then go on from is the newest checkpoint (checkpoint.py).
"""

import contextlib
import faulthandler
import json
import os
import re
import runpy
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from moe.errors import CheckpointError, ConfigError, DataError, LaunchError, TrainError
from moe.io.files import write_whole
from moe.parallel.degrees import Degrees

# These come back however often the ranks are started again.
_LASTING = (ConfigError, CheckpointError, DataError, TrainError)
# Loaded once, by the process that all ranks are forked from: starting them takes tenths of a second.
_PRELOADED = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "moe.model"]
# What torch.distributed.elastic tells each rank; everything else is as where they were started.
_TOLD = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
_HOLD = 0.5  # seconds before a rank ends in an error: what another was killed by is then noticed first
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")


class Rank(NamedTuple):
    """Which of the ranks this process is, and where it computes."""

    rank: int
    world: int
    local_rank: int
    device: torch.device


# ---------------------------------------------------------------------------------------------------- inside a process


def join(
    degrees: Degrees | None = None,
    device: str = "cpu",
    *,
    timeout: float = 600.0,
    dumps: str | os.PathLike[str] | None = None,
) -> Rank:
    """Makes the default process group of all ranks: those of `start`, torchrun or srun, or this process alone.

    Args:
        degrees: their product must be the number of ranks. None: any number will do.
        device: "cpu" (gloo) or "cuda" (NCCL, and gloo for what is on the CPU); each rank gets its own GPU.
        timeout: seconds that a collective may take. One that takes longer, since a rank hangs, ends the rank that
            waits, and with it all others.
        dumps: a directory for what NCCL's flight recorder knows of the last collectives when one takes too long.

    Raises:
        ConfigError: another number of ranks than the degrees make, fewer GPUs than ranks, an unknown device.
    """
    told = _surroundings()
    rank, world, local = (int(told.get(name, default)) for name, default in _DEFAULTS)
    if degrees is not None and degrees.world != world:
        raise ConfigError(_other_world(degrees, world))
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device = {device!r}: must be 'cpu' or 'cuda'")
    where, backend = torch.device("cpu"), "gloo"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank} is the {local + 1}. on its machine, which has {torch.cuda.device_count()} GPUs: start as "
                "many ranks on a machine as it has GPUs"
            )
        where, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(where)
        _record_flights(dumps)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_threads(int(told.get("LOCAL_WORLD_SIZE", 1))))
    limit = timedelta(seconds=timeout)
    if told:
        os.environ.update(told)
        store, rank, world = next(rendezvous("env://", timeout=limit))
        # torchrun restarts ranks on the same store, where gloo then finds the keys of those before and hangs
        # (pytorch#135712).
        store = PrefixStore(f"life{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    else:
        store = HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return Rank(rank, world, local, where)


def inside() -> bool:
    """Whether this process was started as one of the ranks, by `start`, torchrun or srun."""
    return bool(_surroundings())


def leave() -> None:
    """Ends what `join` made; for the end of a rank that has no error."""
    if dist.is_initialized():
        dist.destroy_process_group()


_DEFAULTS = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _surroundings() -> dict[str, str]:
    """What torchrun says in the environment, or the same from what srun says; nothing in a process by itself."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {name: env[name] for name in env if _TOLD.fullmatch(name)}
    # A batch script has SLURM_PROCID too, but only srun makes steps.
    if "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return {}
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0]
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": tasks.partition("(")[0],
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + (job * 31 + step) % 20000),
    }


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: "node[003-017,20],other" -> "node003"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def _other_world(degrees: Degrees, world: int) -> str:
    d, rest = degrees, degrees.world // degrees.dp_shard
    message = (
        f"{world} ranks: pp x dp_replicate x dp_shard x cp x tp = {d.pp} x {d.dp_replicate} x {d.dp_shard} x {d.cp} x "
        f"{d.tp} needs {d.world}; start {d.world}"
    )
    return message + (f", or set dp_shard = {world // rest}" if world % rest == 0 else "")


def _threads(ranks: int) -> int:
    """Of torch, for each of so many ranks on this machine: they share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, ranks))


def _record_flights(dumps: str | os.PathLike[str] | None) -> None:
    """Sets what NCCL reads when the group is made, unless it is set already. Each name is that of some torch."""
    settings: dict[str, str] = dict.fromkeys(("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"), "2000")
    settings["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
    if dumps is not None:
        Path(dumps).mkdir(parents=True, exist_ok=True)
        prefix = str(Path(dumps, "flight-of-rank-"))
        settings |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix, "TORCH_FR_DUMP_TEMP_FILE": prefix}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


# ------------------------------------------------------------------------------------------------- starting processes


@dataclass(frozen=True)
class _Job:
    """What every rank is given."""

    what: Callable[..., Any] | tuple[str, ...]
    args: tuple[Any, ...]
    folder: str  # for errors, stacks and process ids, while the ranks run
    environment: Mapping[str, str]
    launcher: int


def start(
    what: Callable[..., Any] | Sequence[str],
    n: int,
    *args: Any,
    max_restarts: int = 0,
    grace: float = 30.0,
) -> list[Any]:
    """Starts `n` ranks on this machine and waits for them; returns what each gave, in the order of ranks.

    Each begins by calling `join`. SIGINT, SIGTERM, SIGHUP and SIGQUIT go on to all ranks, which have `grace` seconds to
    end; none outlives this process, however it ends. Where one fails the others are ended too, and all are started
    again, unless it is an error that would only come back (of the configuration, the data, a checkpoint).

    Args:
        what: a function that a module defines at its top, called with `args`; or a module and its command line, such as
            ("moe", "train", "tiny"), run as by `python -m`.
        max_restarts: how often all ranks are started again after one has failed.
        grace: seconds.

    Raises:
        LaunchError: a rank failed, and no restarts are left; its `exit_status` is that of the first that did, 128 + N
            for signal N, and its message ends with that rank's traceback. Or a signal came: 128 + its number.
        ConfigError: `n` or `max_restarts` is out of range.
    """
    for name, value, least in (("n", n, 1), ("max_restarts", max_restarts, 0)):
        if value < least:
            raise ConfigError(f"{name} = {value}: must be at least {least}")
    get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="moe-ranks-") as folder, _as_before(), _threads_said(n):
        job = _Job(what if callable(what) else tuple(what), args, folder, dict(os.environ), os.getpid())
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=max_restarts,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder, "elastic"))),
            # nohup ignores SIGHUP, and so do the ranks then.
            signals_to_handle=",".join(s for s in _SIGNALS if signal.getsignal(getattr(signal, s)) != signal.SIG_IGN),
            shutdown_timeout=max(1, round(grace)),
        )
        try:
            results = elastic_launch(config, _rank)(job)
        except ChildFailedError as error:
            raise _failed(error, Path(folder)) from None
        except SignalException as stop:
            name = signal.Signals(stop.sigval).name
            raise LaunchError(f"stopped by {name}, and so were all ranks", 128 + stop.sigval) from None
    return [results[rank] for rank in range(n)]


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Puts back the signal handlers that torch.distributed.elastic replaces."""
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in _SIGNALS}
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not the main thread, where elastic replaces none
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _threads_said(n: int) -> Iterator[None]:
    """OMP_NUM_THREADS for n ranks, while they run; what is set already counts."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(_threads(n))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _failed(error: ChildFailedError, folder: Path) -> LaunchError:
    """Which rank failed first, and with what: the others fail since it is gone, and may be noticed before it."""
    rank, failure = error.get_first_failure()
    life = max((int(file.name.split("-")[1]) for file in folder.glob("error-*")), default=0)
    recorded = sorted((json.loads(f.read_text()) for f in folder.glob(f"error-{life}-*")), key=lambda e: e["time"])
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return LaunchError(f"rank {rank} was killed by {name} (process {failure.pid})", 128 - failure.exitcode)
    if not recorded:
        return LaunchError(f"rank {rank} ended with status {failure.exitcode}", failure.exitcode)
    first = recorded[0]
    stacks = [(file.name.split("-")[1], file.read_text()) for file in sorted(folder.glob("stack-*"))]
    waited_for = [f"rank {other} was then at\n{text}" for other, text in stacks if text]
    return LaunchError(
        "\n".join([f"rank {first['rank']} failed", *waited_for, first["text"]]).rstrip(), first["status"]
    )


# ------------------------------------------------------------------------------------------------------ a started rank


def _rank(job: _Job) -> Any:
    """Runs in each rank."""
    # Of a session of its own: Ctrl-C reaches the launcher alone, which passes it on, so that it comes once.
    os.setsid()
    _end_with(job.launcher)
    os.environ.update({k: v for k, v in job.environment.items() if not _TOLD.fullmatch(k)})
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    folder, rank = Path(job.folder), int(os.environ["RANK"])
    for file in folder.glob("error-*"):
        before = json.loads(file.read_text())
        if before["lasting"]:
            os._exit(before["status"])
    with (folder / f"stack-{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        try:
            return job.what(*job.args) if callable(job.what) else _run_module(job.what)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if status == 0:
                return None
            text = f"it ended with status {status}" if isinstance(end.code, int) else str(end.code)
            _record(folder, rank, text, status, lasting=status == 2)
            raise SystemExit(status) from None
        except Exception as error:
            lasting = isinstance(error, _LASTING)
            _record(folder, rank, traceback.format_exc(), getattr(error, "exit_status", 1), lasting)
            sys.stdout.flush()
            raise SystemExit(getattr(error, "exit_status", 1)) from error


def _run_module(argv: Sequence[str]) -> None:
    sys.argv = list(argv)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _record(folder: Path, rank: int, text: str, status: int, lasting: bool) -> None:
    """Writes down an error with its time, and, where it is that others did not come, where these are."""
    now, life = time.time_ns(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if re.search(r"timed? ?out|timeout", text, re.IGNORECASE):
        for file in folder.glob("pid-*"):
            if file.name != f"pid-{rank}":
                with contextlib.suppress(OSError):
                    os.kill(int(file.read_text()), signal.SIGUSR1)
    entry = {"time": now, "rank": rank, "text": text, "status": status, "lasting": lasting}
    write_whole(folder / f"error-{life}-{rank}", json.dumps(entry).encode())
    time.sleep(_HOLD)


def _end_with(launcher: int) -> None:
    """Kills this process when the launcher has ended, however it did.

    A thread waits for that. The kernel's own way (PR_SET_PDEATHSIG) is of no use: it looks at the server that forks
    ranks, which lives as long as they do.
    """
    try:
        handle = os.pidfd_open(launcher)
    except ProcessLookupError:
        os._exit(1)
    except (AttributeError, OSError):  # not Linux, or an old one
        handle = None

    def wait() -> None:
        if handle is not None:
            select.select([handle], [], [])
        else:
            with contextlib.suppress(ProcessLookupError):
                while True:
                    os.kill(launcher, 0)
                    time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="ends with the launcher").start()
