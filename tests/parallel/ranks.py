"""Starts the ranks of a test: processes from a server that has torch loaded already, with gloo between them."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "moe.model"])


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, which a module defines at its top, returns on each of `world` ranks, in their order.

    Raises:
        AssertionError: on some rank it raised; the message has that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            how = (rank, world, Path(directory, "store"), there, function, args)
            process = _context.Process(target=_rank, args=how, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        results, failures = [None] * world, []
        for rank, pipe in enumerate(pipes):
            # One that failed is missed by others: they have a moment to say whose failure was the first.
            if not pipe.poll(3 if failures else TIMEOUT.total_seconds()):
                failures.append(f"rank {rank} did not answer within {TIMEOUT}")
                continue
            try:
                results[rank], failure = pipe.recv()
            except EOFError:
                failure = f"rank {rank} ended without an answer"
            failures += [failure] if failure else []
        for process in processes:
            if failures:
                process.kill()
            process.join(10)
    assert not failures, "\n".join(failures)
    return results


def _rank(rank: int, world: int, store: Path, pipe: Connection, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
        result, failure = function(*args), ""
    except BaseException:
        result, failure = None, f"rank {rank}:\n{traceback.format_exc()}"
    pipe.send((result, failure))
    pipe.close()
    if not failure:
        dist.destroy_process_group()
