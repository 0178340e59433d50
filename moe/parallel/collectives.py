"""What ranks send each other inside a forward pass, each with the gradient that belongs to it.

Sums over ranks appear where each of them had a part: of activations in a forward, of gradients in a backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Later torches call them so, and warn of the old names.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' x, one after the other along `dim`. Every rank's gradient of it is a part: they are added."""
    return _Gathered.apply(x, dim, group) if group.size() > 1 else x  # type: ignore[return-value]


def scattered_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The sum over the ranks, of which each has its piece along `dim`."""
    return _ScatteredSum.apply(x, dim, group) if group.size() > 1 else x  # type: ignore[return-value]


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks, on each; the gradient is the same on all, and is the parts'."""
    return _Summed.apply(x, group) if group.size() > 1 else x  # type: ignore[return-value]


def shared(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, the same on all ranks, each of which does a part of the work with it: the gradients are added."""
    return _Shared.apply(x, group) if group.size() > 1 else x  # type: ignore[return-value]


def repeated(x: Tensor, times: int) -> Tensor:
    """x for work that `times` ranks all do, where what they have of a gradient will be added: each gives its share."""
    return _Repeated.apply(x, times) if times > 1 else x  # type: ignore[return-value]


def exchanged(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """Rows to each rank, `sent` of them, for rows from each, `received`; their gradients go the way back."""
    return _Exchanged.apply(x, sent, received, group) if group.size() > 1 else x  # type: ignore[return-value]


def all_parts(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """As `gathered`, without a gradient."""
    n, first = group.size(), x.transpose(0, dim).contiguous()
    out = first.new_empty(n * first.shape[0], *first.shape[1:])
    _gather(out, first, group=group)
    return out.transpose(0, dim).contiguous()


def _sum_of_parts(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    first = x.transpose(0, dim).contiguous()
    out = first.new_empty(first.shape[0] // group.size(), *first.shape[1:])
    _reduce_scatter(out, first, group=group)
    return out.transpose(0, dim).contiguous()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.where = dim, group
        return all_parts(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of_parts(dy, *ctx.where), None, None


class _ScatteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.where = dim, group
        return _sum_of_parts(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return all_parts(dy, *ctx.where), None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.contiguous().clone()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy / ctx.times, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(dy, *ctx.way_back), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
