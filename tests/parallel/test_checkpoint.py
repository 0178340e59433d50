"""Checkpoints of one mesh continue on another, damaged ones are passed over, and nothing is lost in silence."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe
from moe.errors import CheckpointError
from moe.parallel.checkpoint import Checkpoints, optimizers_of, read_model
from moe.parallel.degrees import Degrees
from moe.parallel.mesh import Meshes, make_meshes
from moe.parallel.model import ParallelModel
from moe.parallel.step import Batch, clip_gradients, gradient_norm
from moe.parallel.verify import relative, whole
from tests.parallel import ranks
from tests.parallel.test_parallelize import B, batch, config, made


def trained(many: ParallelModel, meshes: Meshes, optimizers: list[Any], steps: range) -> None:
    """Steps of AdamW, each of other rows of a batch."""
    tokens, targets = batch()
    own = B // meshes.degrees.dp
    mine = slice(meshes.data.get_local_rank() * own, (meshes.data.get_local_rank() + 1) * own)
    for n in steps:
        many.forward_backward(Batch(tokens.roll(n, 1)[mine], targets.roll(n, 1)[mine]))
        clip_gradients(many.parameters(), gradient_norm(many.parameters(), meshes), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def on(mesh: Degrees, directory: Path, begin: int, end: int, save: bool) -> dict[str, torch.Tensor]:
    """Goes on from what is there at step `begin`; the whole weights at `end`."""
    meshes = make_meshes(mesh, torch.device("cpu"))
    many = ParallelModel(config(), meshes, seed=7 if begin == 0 else 1, dtype=torch.float64)
    optimizers = optimizers_of(many.parts, 1e-3, foreach=False)
    checkpoints = Checkpoints(directory)
    extra = checkpoints.load(many.parts, optimizers)
    assert (extra is None) == (begin == 0)
    assert extra is None or (extra["step"], extra["data"]) == (begin, 17)
    trained(many, meshes, optimizers, range(begin, end))
    if save:
        checkpoints.save(end, many.parts, optimizers, {"data": 17})
        trained(many, meshes, optimizers, range(end, end + 1))  # goes on while it is written
        checkpoints.finish()
        return {}
    return {name: whole(p).detach() for part in many.parts for name, p in part.named_parameters()}


def one_process(end: int) -> dict[str, torch.Tensor]:
    model = made(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    tokens, targets = batch()
    for n in range(end):
        model(tokens.roll(n, 1), targets.roll(n, 1)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


MESHES = [
    Degrees(tp=2, dp_shard=2, ep=2),
    Degrees(pp=2, dp_shard=2, schedule="interleaved-1f1b", microbatches=4),
    Degrees(),
    Degrees(cp=2, tp=2),
]


def test_any_mesh_goes_on_from_any_other(tmp_path: Path) -> None:
    """Moments of the optimizer included: each mesh takes one step from what the one before has left."""
    for n, mesh in enumerate(MESHES):
        ranks.run(mesh.world, on, mesh, tmp_path, n, n + 1, True)
    found = ranks.run(4, on, MESHES[0], tmp_path, 4, 5, False)
    want = one_process(5)
    for name, p in found[0].items():
        assert relative(p, want[name]) < 1e-9, name
    assert set(found[0]) == set(want)
    assert Checkpoints(tmp_path).steps() == [3, 4]  # of its two newest


def test_a_step_becomes_an_ordinary_checkpoint(tmp_path: Path) -> None:
    ranks.run(2, on, Degrees(tp=2), tmp_path, 0, 1, True)
    model = read_model(tmp_path / "step-00000001", config())
    moe.save(model, tmp_path / "plain")
    want = one_process(1)
    for name, p in moe.load(tmp_path / "plain").named_parameters():
        assert relative(p.detach(), want[name]) < 1e-6
    (tmp_path / "step-00000001" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="not written to its end"):
        read_model(tmp_path / "step-00000001", config())


def damaged(directory: Path) -> str:
    meshes = make_meshes(Degrees(dp_shard=2), torch.device("cpu"))
    many = ParallelModel(config(), meshes, seed=7, dtype=torch.float64)
    optimizers, checkpoints = optimizers_of(many.parts, 1e-3, foreach=False), Checkpoints(directory)
    for step in (1, 2, 3):
        checkpoints.save(step, many.parts, optimizers, {}, wait=True)
    assert checkpoints.steps() == [2, 3]
    if dist.get_rank() == 0:
        largest = max((directory / "step-00000003").glob("*.distcp"), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
        shutil.copytree(directory / "step-00000002", directory / "step-00000009")
        (directory / "step-00000009" / ".metadata").unlink()  # killed while it was written
    dist.barrier()
    extra = checkpoints.load(many.parts, optimizers)
    assert extra is not None
    first = extra["step"]
    other = optimizers_of(many.parts, 1e-3, foreach=False, amsgrad=True)
    try:
        checkpoints.load(many.parts, other)
    except CheckpointError as error:
        return f"{first}: {error}"
    return "nothing was said"


def test_damaged_ones_are_passed_over_and_other_names_are_errors(tmp_path: Path) -> None:
    for said in ranks.run(2, damaged, tmp_path):
        assert said.startswith("2: ")
        assert "it lacks optimizer.state." in said
        assert "max_exp_avg_sq" in said
