"""Where a rank's positions are: rotations and attention of a piece of the sequence, under `cp`, and of all of it.

A layer's attention is told by whoever calls the model which positions there are; under sequence and context parallelism
the caller sees a piece, so a hook tells it anew. Keys and values are gathered over cp (with one head they are small).

Shape suffixes: B batch, S sequence, D model width, H query heads, N key/value heads, C head width, E experts.
"""

import functools
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe.experts import Routing
from moe.layers import Attend, attend_within, rope_tables
from moe.layers.attention import attention_of
from moe.model import Transformer
from moe.parallel.collectives import all_parts, gathered


class Positions:
    """Of the pass that is under way: its rotations, and who sees whom.

    `documents_BS`: of whole sequences, set before a pass; None where attention is over all that came before.
    """

    def __init__(self, model: Transformer, mesh: DeviceMesh) -> None:
        self.cfg, self.group = model.cfg.attention, mesh.get_group()
        self.documents_BS: Tensor | None = None
        self._rope: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def rope(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's `length` positions."""
        key = length, like.dtype, like.device
        if key not in self._rope:
            first = self.group.rank() * length
            self._rope = {key: rope_tables(first, length, self.cfg.head_dim, self.cfg.rope, like.dtype, like.device)}
        return self._rope[key]

    def attend(self, device: torch.device) -> Attend:
        """For one layer."""
        if self.group.size() == 1:
            return attend_within(self.documents_BS, device)
        return self._over_ranks

    def _over_ranks(self, q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
        S, rank = q_BSHC.shape[1], self.group.rank()
        k, v = (gathered(x, 1, self.group)[:, : (rank + 1) * S] for x in (k_BSNC, v_BSNC))
        sees = torch.ones(S, k.shape[1], dtype=torch.bool, device=k.device).tril(rank * S)
        if self.documents_BS is not None:
            documents = self.documents_BS.to(k.device)
            # A number that comes again is another document.
            run_BS = (documents[:, 1:] != documents[:, :-1]).cumsum(1)
            run_BS = torch.cat([torch.zeros_like(run_BS[:, :1]), run_BS], 1)
            own, seen = run_BS[:, rank * S : (rank + 1) * S], run_BS[:, : (rank + 1) * S]
            sees = (sees & (own.unsqueeze(2) == seen.unsqueeze(1))).unsqueeze(1)
        return attention_of(q_BSHC, k, v, attn_mask=sees)


def apply(model: Transformer, mesh: DeviceMesh) -> Positions:
    """Attention that knows where it is, and router losses of whole sequences, over the one-dimensional `mesh`.

    A rank's hooks come behind those of tensor parallelism, which gather the sequence.
    """
    positions = Positions(model, mesh)
    blocks: Any = model.blocks
    for block in blocks:
        if block is None:
            continue
        block.attention.register_forward_pre_hook(functools.partial(_told, positions))
        if block.moe is not None and mesh.size() > 1:
            block.moe.register_forward_hook(functools.partial(_whole, mesh.get_group()))
    return positions


def _told(positions: Positions, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x_BSD = args[0]
    return x_BSD, positions.rope(x_BSD.shape[1], x_BSD), positions.attend(x_BSD.device)


def _whole(group: Any, _module: nn.Module, _args: Any, out: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
    """The routing of whole sequences, on every rank: balance is a product of two sums over a sequence."""
    y_BSD, r = out
    B = r.logits_BSE.shape[0]
    chosen = (x.detach().unflatten(0, (B, -1)) for x in (r.ids_TK, r.weights_TK))
    ids, weights = (all_parts(x, 1, group).flatten(0, 1) for x in chosen)
    return y_BSD, r._replace(ids_TK=ids, weights_TK=weights, logits_BSE=gathered(r.logits_BSE, 1, group))
