"""A run whose ranks are killed, whenever and whichever, ends with the bits of one that was never disturbed."""

import hashlib
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe.model import Counts, Transformer, objective
from moe.parallel.checkpoint import Checkpointer
from moe.parallel.launch import join, leave, start
from tests.conftest import tiny_config

B, S = 6, 16


def run(folder: Path, steps: int, kills: int) -> tuple[int, str, str]:
    """Of one rank: trains from the newest checkpoint on, saving after every step; waits for the kills to come.

    Returns how often the ranks were started again, the last loss, and a digest of all weights and moments.
    """
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (folder / f"{life}-{os.environ['RANK']}").write_text(str(os.getpid()))
    me = join(timeout=40)
    model = Transformer(tiny_config())
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mine = slice(me.rank * B // me.world, (me.rank + 1) * B // me.world)
    loss = torch.zeros(())
    with Checkpointer(folder / "checkpoints", model.cfg) as checkpointer:
        training = checkpointer.load([model], [optimizer]) or {"sample": 0, "loss": "none"}
        step, said = training["sample"] // B, training["loss"]
        while step < steps:
            while life < kills and step >= (life + 1) * steps // (kills + 1):
                time.sleep(0.01)  # it does not come further before it is killed
            # The data are a function of the position alone.
            tokens = torch.randint(61, (B, S + 1), generator=torch.Generator().manual_seed(step * B))[mine]
            out = model(tokens[:, :-1], tokens[:, 1:])
            loss = objective(model.cfg.router, out.sums, Counts(B * S // me.world, B // me.world, B * S // me.world))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(loss.detach())
            step, said = step + 1, float(loss).hex()
            checkpointer.save(step, [model], [optimizer], {"sample": step * B, "loss": said})
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        for tensor in (parameter.detach(), *(optimizer.state[parameter][k] for k in ("exp_avg", "exp_avg_sq"))):
            assert isinstance(tensor, DTensor)
            digest.update(tensor.full_tensor().numpy().tobytes())
    leave()
    return life, said, digest.hexdigest()


def saving(folder: Path) -> bool:
    return any(not (p / ".metadata").exists() for p in (folder / "checkpoints").glob("step-*"))


def kill(folder: Path, n: int, moments: list[tuple[int, str]], rng: random.Random, done: threading.Event) -> None:
    """In each life one rank: at any moment from its start on, or while a checkpoint is being written."""
    for life, (rank, when) in enumerate(moments):
        pids: list[str] = []
        while not done.is_set() and (len(pids) < n or not all(pids)):
            time.sleep(0.001)
            pids = [p.read_text() for p in (folder / f"{life}-{r}" for r in range(n)) if p.exists()]
        if when == "saving":
            end = time.monotonic() + 10
            while not saving(folder) and time.monotonic() < end and not done.is_set():
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, 2.0))
        if not done.is_set():
            os.kill(int(pids[rank]), signal.SIGKILL)


def disturbed(folder: Path, n: int, steps: int, moments: list[tuple[int, str]], rng: random.Random) -> list[Any]:
    folder.mkdir()
    done = threading.Event()
    killer = threading.Thread(target=kill, args=(folder, n, moments, rng, done))
    killer.start()
    try:
        return start(run, n, folder, steps, len(moments), max_restarts=len(moments))
    finally:
        done.set()
        killer.join()


def test_three_kills(tmp_path: Path, any_moment: random.Random) -> None:
    """The first rank, any rank, and any rank while a checkpoint is being written."""
    moments = [(0, "any"), (any_moment.randrange(2), "any"), (any_moment.randrange(2), "saving")]
    any_moment.shuffle(moments)
    undisturbed = disturbed(tmp_path / "a", 2, 8, [], any_moment)
    got = disturbed(tmp_path / "b", 2, 8, moments, any_moment)
    assert [life for life, *_ in got] == [3, 3]
    assert [end for _, *end in got] == [end for _, *end in undisturbed]


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, any_moment: random.Random) -> None:
    moments = [(any_moment.randrange(3), any_moment.choice(["any", "saving"])) for _ in range(20)]
    undisturbed = disturbed(tmp_path / "a", 3, 42, [], any_moment)
    got = disturbed(tmp_path / "b", 3, 42, moments, any_moment)
    assert [life for life, *_ in got] == [20] * 3
    assert [end for _, *end in got] == [end for _, *end in undisturbed]
