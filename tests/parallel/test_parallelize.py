"""A model over many ranks is the model in one process: loss, every gradient, norm, a step, and what routers did."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe import Transformer
from moe.config import AttentionConfig, Config, DenseConfig, ExpertsConfig
from moe.model import Counts, objective
from moe.parallel.apply import parallelize
from moe.parallel.degrees import Degrees
from moe.parallel.mesh import make_meshes
from moe.parallel.step import Batch, clip_gradients, forward_backward, gradient_norm
from moe.weights import init_weights
from tests.conftest import tiny_config
from tests.parallel import ranks

B, S = 8, 16


def config(**changes: Any) -> Config:
    shape: dict[str, Any] = {
        "d_model": 24,
        "n_layers": 3,
        "vocab_size": 64,
        "max_seq_len": S,
        "attention": AttentionConfig(n_heads=8, n_kv_heads=1, head_dim=6),
        "experts": ExpertsConfig(n_experts=8, top_k=2, d_ff=20),
        "dense": DenseConfig(layers=1, d_ff=28),
    }
    return tiny_config(**{**shape, **changes})


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(64, (B, S + 1), generator=g)
    targets = tokens[:, 1:].clone()
    targets[3, 5:] = -100
    return tokens[:, :-1], targets


def made(cfg: Config) -> Transformer:
    """In float64, every weight as it is drawn in float64."""
    with torch.device("meta"):
        model = Transformer(cfg).double()
    model.to_empty(device="cpu")
    init_weights(model, 7)
    return model


def one_process(cfg: Config) -> dict[str, Any]:
    model = made(cfg)
    tokens, targets = batch()
    out = model(tokens, targets)
    objective(cfg.router, out.sums, Counts(int((targets != -100).sum()), B, B * S)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {
        "sums": [float(x.detach()) for x in out.sums if x is not None],
        "norm": norm.item(),
        "routed": torch.stack([r.counts_E for r in out.routing]),
        "gradients": gradients,
    }


def on_ranks(cfg: Config, degrees: Degrees) -> dict[str, float]:
    """The largest errors, relative, of everything, on this rank."""
    want = one_process(cfg)
    meshes = make_meshes(degrees, torch.device("cpu"))
    model = parallelize(made(cfg), meshes)
    mine = slice(*(meshes.data.get_local_rank() * B // degrees.dp + n for n in (0, B // degrees.dp)))
    tokens, targets = batch()
    done = forward_backward(model, meshes, Batch(tokens[mine], targets[mine]))
    norm = gradient_norm(model.parameters(), meshes)
    errors = {"norm": abs(norm.item() / want["norm"] - 1), "routed": float((done.routed_LE != want["routed"]).any())}
    for name, got, expected in zip(("lm", "balance", "z"), done.sums, want["sums"], strict=True):
        assert got is not None
        errors[name] = abs(got.item() / expected - 1)
    seen = set()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        full = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        errors[name] = ((full - want["gradients"][name]).norm() / want["gradients"][name].norm()).item()
        seen.add(name)
    assert seen == set(want["gradients"])
    clip_gradients(model.parameters(), norm, want["norm"] / 2)
    clipped = want["norm"] / 2 / (want["norm"] + 1e-6) * want["norm"]
    errors["clipped"] = abs(gradient_norm(model.parameters(), meshes).item() / clipped - 1)
    return errors


MESHES = [
    "tp=2", "tp=4", "dp_shard=2,ep=2", "dp_shard=4,ep=4", "dp_shard=4", "dp_replicate=2,dp_shard=2", "cp=2",
    "cp=2,tp=2", "tp=2,dp_shard=2,ep=2", "dp_replicate=2,dp_shard=2,ep=2", "dp_shard=4,ep=2", "cp=2,dp_shard=2,ep=4",
]  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_one_process(mesh: str) -> None:
    degrees = Degrees.parse(mesh)
    for errors in ranks.run(degrees.world, on_ranks, config(), degrees):
        assert max(errors.values()) < 1e-12, {k: v for k, v in errors.items() if v >= 1e-12}


@pytest.mark.parametrize("kv", [2, 4])
def test_key_heads_under_tensor_parallelism(kv: int) -> None:
    cfg = dataclasses.replace(config(), attention=AttentionConfig(n_heads=8, n_kv_heads=kv, head_dim=6))
    for errors in ranks.run(4, on_ranks, cfg, Degrees(tp=4)):
        assert max(errors.values()) < 1e-12, {k: v for k, v in errors.items() if v >= 1e-12}
