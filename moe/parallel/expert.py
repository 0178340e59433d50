"""Experts divided over ranks: a module in the place of a model's `Experts`, with the same weights in pieces.

Tokens travel to the ranks that hold their experts and back (all-to-all, uneven: dropless). Over `tp`, which divides the
experts' widths, nothing travels: its ranks have the same tokens, and each a part of the result.

Shape suffixes: T tokens, D model width, E experts, K experts of a token, R = T*K routed rows, G gate/up, F its width.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from moe.experts import Experts
from moe.kernels import ops
from moe.model import Transformer
from moe.parallel.collectives import exchanged
from moe.parallel.tensor import distribute, localize


class DividedExperts(Experts):
    """`Experts` of which a rank holds `E / ep`; tokens come from, and go back to, the ranks of `group`.

    Attributes:
        sent: rows to each rank in the last forward, for whoever counts bytes.
    """

    group: ProcessGroup
    n_experts: int
    sent: list[int]

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """As `Experts.forward`."""
        (T, K), ranks = ids_TK.shape, self.group.size()
        own = self.n_experts // ranks
        order_R = ids_TK.flatten().argsort(stable=True)
        counts_E = torch.zeros(self.n_experts, dtype=torch.int64, device=ids_TK.device)
        counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK.flatten()))
        # How many rows of each of its experts a rank gets from every other: [rank, own expert].
        received_PE = torch.empty_like(counts_E).view(ranks, own)
        torch.distributed.all_to_all_single(received_PE, counts_E.view(ranks, own), group=self.group)
        sent, received = counts_E.view(ranks, own).sum(1).tolist(), received_PE.sum(1).tolist()
        self.sent = sent
        there_RD = exchanged(x_TD[order_R // K], sent, received, self.group)
        # From each rank the rows are in the order of the experts.
        ids_R1 = torch.arange(own, device=ids_TK.device).repeat(ranks).repeat_interleave(received_PE.flatten())
        ones_R1 = torch.ones(len(there_RD), 1, dtype=weights_TK.dtype, device=there_RD.device)
        y_RD = ops.expert_mlp(
            there_RD, self.w_in_EGFD, self.w_out_EDF, ones_R1, ids_R1.unsqueeze(1), self.activation,
            recompute=self.recompute,
        )  # fmt: skip
        back_RD = exchanged(y_RD, received, sent, self.group)
        weighted_RD = back_RD * weights_TK.flatten()[order_R].unsqueeze(1)
        return torch.zeros(T, back_RD.shape[1], dtype=weighted_RD.dtype, device=back_RD.device).index_add(
            0, order_R // K, weighted_RD
        )


def apply(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide the experts of a model, or of a stage, over the ranks of the two-dimensional `mesh` (ep, tp), in place."""
    ep, tp = mesh["ep"], mesh["tp"]
    parts: dict[str, Any] = {}
    if ep.size() > 1 and tp.size() > 1:
        parts = {"mesh": mesh, "w_in_EGFD": (Shard(0), Shard(2)), "w_out_EDF": (Shard(0), Shard(2))}
    elif ep.size() > 1:
        parts = {"mesh": ep, "w_in_EGFD": (Shard(0),), "w_out_EDF": (Shard(0),)}
    elif tp.size() > 1:
        parts = {"mesh": tp, "w_in_EGFD": (Shard(2),), "w_out_EDF": (Shard(2),)}
    if not parts:
        return
    for module in model.modules():
        if isinstance(module, Experts):
            _divide(module, parts, ep)


def _divide(experts: nn.Module, parts: dict[str, Any], ep: DeviceMesh) -> None:
    n_experts = len(experts.w_in_EGFD)  # type: ignore[arg-type]
    for name in ("w_in_EGFD", "w_out_EDF"):
        distribute(experts, name, parts["mesh"], *parts[name])
    if ep.size() == 1:
        localize(experts)
        return
    localize(experts, DividedExperts)
    experts.group, experts.n_experts, experts.sent = ep.get_group(), n_experts, []  # type: ignore[assignment]
