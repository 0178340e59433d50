"""A pipeline under every schedule is the model in one process."""

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from moe.config import Config
from moe.parallel.degrees import Degrees
from moe.parallel.mesh import make_meshes
from moe.parallel.pipeline import Pipeline
from moe.parallel.step import Batch, gradient_norm
from tests.parallel import ranks
from tests.parallel.test_parallelize import B, batch, config, one_process


def on_ranks(cfg: Config, degrees: Degrees) -> dict[str, float]:
    """The largest errors, relative, of everything, on this rank."""
    want = one_process(cfg)
    meshes = make_meshes(degrees, torch.device("cpu"))
    pipeline = Pipeline(cfg, meshes, seed=7, dtype=torch.float64)
    mine = slice(*(meshes.data.get_local_rank() * B // degrees.dp + n for n in (0, B // degrees.dp)))
    tokens, targets = batch()
    done = pipeline.forward_backward(Batch(tokens[mine], targets[mine]))
    norm = gradient_norm(pipeline.parameters(), meshes)
    errors = {"norm": abs(norm.item() / want["norm"] - 1), "routed": float((done.routed_LE != want["routed"]).any())}
    for name, got, expected in zip(("lm", "balance", "z"), done.sums, want["sums"], strict=True):
        assert got is not None
        errors[name] = abs(got.item() / expected - 1)
    for part in pipeline.parts:
        for name, p in part.named_parameters():
            assert p.grad is not None, name
            full = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            errors[name] = ((full - want["gradients"][name]).norm() / want["gradients"][name].norm()).item()
    return errors


@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "interleaved-zero-bubble", "zbv", "dualpipev"]
)
def test_every_schedule(schedule: str) -> None:
    check(config(), Degrees(pp=2, schedule=schedule))


def check(cfg: Config, degrees: Degrees) -> None:
    for errors in ranks.run(degrees.world, on_ranks, cfg, degrees):
        assert max(errors.values()) < 1e-12, {k: v for k, v in errors.items() if not v < 1e-12}


@pytest.mark.parametrize(
    "settings",
    [
        {"tp": 2},
        {"dp_shard": 2, "ep": 2},
        {"dp_shard": 2, "ep": 2, "schedule": "interleaved-1f1b", "microbatches": 4},
        {"cp": 2, "schedule": "zbv"},
        {"stage_layers": (0, 3)},
    ],
    ids=str,
)
def test_with_others(settings: dict[str, Any]) -> None:
    check(config(), Degrees(pp=2, **settings))


def test_four_stages_of_uneven_sizes() -> None:
    check(config(n_layers=4), Degrees(pp=4, stage_layers=(1, 0, 2, 1)))
