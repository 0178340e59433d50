"""A training step's gradient over many ranks: exactly that of one process with the whole batch.

Losses are sums, divided by the counts of the whole batch, so that ranks' gradients add up; norms count every element
once, wherever it lies and however often.

Shape suffixes: B sequences of this rank, S positions, L layers with experts, E experts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from moe.experts import expert_counts
from moe.kernels.loss import IGNORE_INDEX
from moe.model import Counts, Sums, Transformer, objective
from moe.parallel.mesh import Meshes


class Batch(NamedTuple):
    """The sequences of this rank, the same on all ranks of its (cp, tp, pp); each whole."""

    tokens_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor | None = None


class Done(NamedTuple):
    """Of a step, on every rank the whole's: sums and counts of the objective, and routed tokens [L, E] per expert."""

    sums: Sums
    counts: Counts
    routed_LE: Tensor


def counts_of(targets_BS: Tensor, meshes: Meshes) -> Counts:
    """Of the whole batch, whose targets of this rank these are."""
    B, S = targets_BS.shape
    n = torch.tensor([int((targets_BS != IGNORE_INDEX).sum()), B, B * S], device=meshes.device)
    dist.all_reduce(n, group=_data(meshes))
    targets, sequences, tokens = n.tolist()
    return Counts(targets, sequences, tokens)


def _data(meshes: Meshes) -> Any:
    """The group of ranks with sequences of their own."""
    return meshes.data.get_group()


def forward_backward(model: Transformer, meshes: Meshes, batch: Batch, counts: Counts | None = None) -> Done:
    """Adds the gradient of the objective of the whole batch to the parameters', as this rank has them.

    Args:
        counts: of the whole batch, where this is a part of it (gradient accumulation); None: this is all.
    """
    counts = counts_of(batch.targets_BS, meshes) if counts is None else counts
    model.positions.documents_BS = batch.documents_BS  # type: ignore[union-attr]
    cp = meshes.dense["cp"]
    tokens_BS, targets_BS = (piece(x, cp) for x in (batch.tokens_BS, batch.targets_BS))
    out = model(tokens_BS, targets_BS)
    # Of router losses every rank of cp has those of whole sequences.
    sums = out.sums._replace(balance=out.sums.balance / cp.size(), z=out.sums.z / cp.size())
    objective(model.cfg.router, sums, counts).backward()
    finish_gradients(model.parameters())
    return _everywhere(model, meshes, sums, counts, out.routing)


def piece(x_BS: Tensor, cp: Any) -> Tensor:
    """The positions of this rank of cp."""
    return x_BS.chunk(cp.size(), 1)[cp.get_local_rank()].contiguous()


def _everywhere(model: Transformer, meshes: Meshes, sums: Sums, counts: Counts, routing: Iterable[Any]) -> Done:
    lm = sums.balance.new_zeros(()) if sums.lm is None else sums.lm.detach()
    all_sums = torch.stack([lm, sums.balance.detach(), sums.z.detach()])
    dist.all_reduce(all_sums, group=meshes.tokens.get_group())
    n_experts = model.cfg.experts.n_experts
    routed = [expert_counts(r.ids_TK.reshape(1, -1), n_experts)[0] for r in routing]
    routed_LE = torch.stack(routed) if routed else torch.zeros(0, n_experts, dtype=torch.int64, device=lm.device)
    dist.all_reduce(routed_LE, group=_data(meshes))
    return Done(Sums(*all_sums.unbind()), counts, routed_LE)


def finish_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the parts of gradients of which every rank has one."""
    for p in parameters:
        if isinstance(p.grad, DTensor) and any(isinstance(x, Partial) for x in p.grad.placements):
            p.grad = p.grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------------- norms


def gradient_norm(parameters: Iterable[nn.Parameter], meshes: Meshes) -> Tensor:
    """The norm of the whole model's gradient, a float64 scalar, the same on every rank."""
    total = torch.zeros((), dtype=torch.float64, device=meshes.device)
    stage = dist.get_world_size() // meshes.degrees.pp
    for p in parameters:
        if p.grad is not None:
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            # So many ranks of the stage have the same elements.
            total += local.double().square().sum() / (stage // _shards(p.grad))
    dist.all_reduce(total)
    return total.sqrt()


def _shards(x: Tensor) -> int:
    """Into how many different pieces a tensor is divided."""
    if not isinstance(x, DTensor):
        return 1
    n = 1
    for i, placement in enumerate(x.placements):
        n *= 1 if isinstance(placement, Replicate) else x.device_mesh.size(i)
    return n


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, most: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, by a norm that is known."""
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            local.mul_(factor.to(local.dtype))
