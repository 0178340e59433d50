"""Is a model over many ranks the model in one process? The errors of everything that a training step has.

`verify` runs a configuration both ways; `compare` takes any two models of torch whose backward was run. Gradients are
compared and not only weights: an optimizer such as AdamW hides a gradient of the wrong size.

Shape suffixes: B sequences, S positions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.config import Config
from moe.model import Counts, Transformer, objective
from moe.parallel.apply import parallelize
from moe.parallel.degrees import Degrees
from moe.parallel.mesh import Meshes, make_meshes
from moe.parallel.pipeline import Pipeline
from moe.parallel.step import Batch, Done, clip_gradients, forward_backward, gradient_norm
from moe.weights import init_weights

# Relative errors that rounding explains: sums of thousands of terms in another order.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
LR, CLIP = 1e-2, 1.0


@dataclass(frozen=True)
class Row:
    """One thing that was compared: its relative error, and the most that it may have."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """A NaN does not."""
        return self.error <= self.tolerance


@torch.no_grad()
def compare(
    reference: Mapping[str, Tensor] | nn.Module, parallel: nn.Module | Iterable[nn.Module], tolerance: float = 1e-12
) -> list[Row]:
    """The gradients of a model over ranks beside those of one process. Every rank calls it; rank 0's rows count.

    Args:
        reference: a model after its backward, or gradients by name; empty on ranks that have none.
        parallel: the model, or its parts, after its backward; parameters are tensors or DTensors, named as there.
    """
    gradients = _gradients(reference) if isinstance(reference, nn.Module) else reference
    rows, seen = [], set()
    for part in [parallel] if isinstance(parallel, nn.Module) else parallel:
        for name, p in part.named_parameters():
            got = whole(p.grad) if p.grad is not None else None
            seen.add(name)
            if gradients:
                rows.append(Row(f"gradient {name}", relative(got, gradients.get(name)), tolerance))
    if gradients and isinstance(parallel, nn.Module):
        rows += [Row(f"gradient {name}", torch.inf, tolerance) for name in gradients if name not in seen]
    return rows


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every rank that has a part of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def relative(got: Tensor | None, want: Tensor | None) -> float:
    """|got - want| / |want|; infinite where one of them is missing."""
    if got is None or want is None or got.shape != want.shape:
        return 0.0 if got is None and want is None else torch.inf
    size = want.double().norm()
    off = (got.double() - want.to(got.device).double()).norm()
    return (off / size if size else off).item()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def verify(
    cfg: Config,
    degrees: Degrees,
    *,
    batch_size: int = 8,
    seq_len: int = 32,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Row]:
    """A step of training on the mesh beside one in one process, of random tokens, some targets missing.

    Every rank of the process group calls it. Rows of the loss and the routers' losses, the gradient's norm, every
    gradient, the routers' counts, and the weights after one clipped step of AdamW: on every rank those of all.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    degrees.check(cfg, batch_size=batch_size, seq_len=seq_len)
    tolerance = TOLERANCES[dtype]
    meshes = make_meshes(degrees, torch.device("cpu"))
    tokens_BS, targets_BS = random_batch(cfg, batch_size, seq_len, seed)
    one = _One(cfg, seed, dtype, tokens_BS, targets_BS) if dist.get_rank() == 0 else None
    many = Many(cfg, meshes, seed, dtype)
    rows_of = batch_size // degrees.dp
    mine = slice(meshes.data.get_local_rank() * rows_of, (meshes.data.get_local_rank() + 1) * rows_of)
    done = many.forward_backward(Batch(tokens_BS[mine], targets_BS[mine]))
    norm = gradient_norm(many.parameters(), meshes)
    rows = _scalars(one, done, norm, tolerance) if one else []
    # Names of a stage are known to its own ranks: one of each has the reference's from rank 0.
    gradients = _from_rank_0(one.gradients if one else None)
    rows += compare(gradients, many.parts, tolerance)
    weights = _from_rank_0(one.step() if one else None)
    rows += many.step(norm, weights, tolerance)
    return _of_all(rows)


def random_batch(cfg: Config, batch_size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, S]; one sequence ends early."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(cfg.vocab_size, (batch_size, seq_len + 1), generator=g)
    targets = tokens[:, 1:].clone()
    targets[0, seq_len // 2 :] = -100
    return tokens[:, :-1], targets


class Many:
    """The model over the ranks, whatever the mesh."""

    def __init__(self, cfg: Config, meshes: Meshes, seed: int, dtype: torch.dtype) -> None:
        self.meshes = meshes
        self.pipeline = Pipeline(cfg, meshes, seed=seed, dtype=dtype) if meshes.degrees.pp > 1 else None
        self.parts = [_made(cfg, meshes, seed, dtype)] if self.pipeline is None else self.pipeline.parts

    def parameters(self) -> list[nn.Parameter]:
        """Of all parts on this rank."""
        return [p for part in self.parts for p in part.parameters()]

    def forward_backward(self, batch: Batch, counts: Counts | None = None) -> Done:
        """As `step.forward_backward`."""
        if self.pipeline is not None:
            return self.pipeline.forward_backward(batch, counts)
        return forward_backward(self.parts[0], self.meshes, batch, counts)

    @torch.no_grad()
    def step(self, norm: Tensor, weights: Mapping[str, Tensor], tolerance: float) -> list[Row]:
        """One clipped step of AdamW, beside what one process has then."""
        clip_gradients(self.parameters(), norm, CLIP)
        torch.optim.AdamW(self.parameters(), lr=LR, foreach=False).step()
        rows = []
        for part in self.parts:
            for name, p in part.named_parameters():
                # AdamW's first step is a sign, so what is off in a gradient near zero is off in full.
                rows.append(Row(f"after a step {name}", relative(whole(p), weights.get(name)), 1e4 * tolerance))
        return rows


def _made(cfg: Config, meshes: Meshes | None, seed: int, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    if meshes is not None:
        model = parallelize(model, meshes)
    model.to_empty(device="cpu")
    init_weights(model, seed)
    return model


class _One:
    """The same in one process."""

    def __init__(self, cfg: Config, seed: int, dtype: torch.dtype, tokens_BS: Tensor, targets_BS: Tensor) -> None:
        self.model = _made(cfg, None, seed, dtype)
        out = self.model(tokens_BS, targets_BS)
        assert out.sums is not None
        objective(cfg.router, out.sums, out.counts).backward()
        self.sums = out.sums
        self.routed = torch.stack([r.counts_E for r in out.routing]) if out.routing else torch.zeros(0)
        self.gradients = {name: g.clone() for name, g in _gradients(self.model).items()}
        self.norm = torch.nn.utils.get_total_norm([g.double() for g in self.gradients.values()])

    def step(self) -> dict[str, Tensor]:
        """The weights after one clipped step of AdamW."""
        clip_gradients(self.model.parameters(), self.norm, CLIP)
        torch.optim.AdamW(self.model.parameters(), lr=LR, foreach=False).step()
        return {name: p.detach() for name, p in self.model.named_parameters()}


def _scalars(one: _One, done: Done, norm: Tensor, tolerance: float) -> list[Row]:
    rows = []
    for name, got, want in zip(("loss", "balance loss", "z-loss"), done.sums, one.sums, strict=True):
        rows.append(Row(name, relative(got, want.detach()), tolerance))  # type: ignore[union-attr]
    rows.append(Row("gradient norm", relative(norm, one.norm), tolerance))
    rows.append(Row("routed tokens", float((done.routed_LE.cpu() != one.routed).sum()), 0.0))
    return rows


def _from_rank_0(x: dict[str, Tensor] | None) -> dict[str, Tensor]:
    box = [x]
    dist.broadcast_object_list(box, src=0)
    return box[0] or {}


def _of_all(rows: list[Row]) -> list[Row]:
    """The rows of all ranks, of each name the one with the largest error, in order of their first appearance."""
    every: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, rows)
    worst: dict[str, Row] = {}
    for row in (row for own in every for row in own):
        known = worst.get(row.name)
        # Not "larger": a NaN has to stay.
        if known is None or not row.error <= known.error:
            worst[row.name] = row
    return list(worst.values())
