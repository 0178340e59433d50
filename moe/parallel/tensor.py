"""Tensor parallelism with sequence parallelism: heads, hidden widths and the vocabulary over the ranks of `tp`.

Between the layers a rank has a piece of the sequence; attention and experts gather it, and each rank's part of their
result is added up and scattered again (Korthikanti et al. 2022, arXiv:2205.05198). Weights are DTensors: their names
and global shapes are the model's, and FSDP, checkpoints and `init_weights` know what to do with them.

| weight | placement | gradient of a rank |
|---|---|---|
| wq, experts' w_in, head, embedding | its heads, widths, ids | its own |
| wo, w_out | columns | its own |
| wk, wv | its heads; where tp does not divide them, all of them, of which it uses those of its query heads | a part |
| norms | whole | a part: of its piece of the sequence |
| router | whole | whole: every rank routes all tokens |

Shape suffixes: B batch, S sequence, T = B*S tokens, D model width, H query heads, N key/value heads, C head width, V
vocabulary, E experts, K experts of a token.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from moe.config import Config
from moe.kernels.loss import IGNORE_INDEX
from moe.layers import MLP, Attention, Head, Linear, at_least_fp32
from moe.model import Transformer
from moe.parallel.collectives import gathered, repeated, scattered_sum, shared, summed

SEQUENCE = 1  # the dimension of [B, S, ...]


class LocalWeights:
    """Mixed into the class of a module: in its forward a weight is what this rank holds of it, a plain tensor.

    `gradients`: the placement that the rank's gradient of each weight has, where it is another than the weight's.
    """

    gradients: dict[str, tuple[Placement, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        self.__dict__["_inside"] = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["_inside"] = False

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if self.__dict__.get("_inside") and isinstance(value, DTensor):
            return value.to_local(grad_placements=self.gradients.get(name))
        return value


def localize(module: nn.Module, kind: type | None = None, **gradients: tuple[Placement, ...]) -> None:
    """Make a module, in place, one of `LocalWeights`; `kind`: of another class at that."""
    base = type(module) if kind is None else kind
    whatever: Any = module
    whatever.__class__ = type(f"Local{base.__name__}", (LocalWeights, base), {})
    whatever.gradients = gradients


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, *placements: Placement) -> None:
    """Make a parameter of a module a DTensor; every rank has the same values before."""
    parameter = getattr(module, name)
    made = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
    module.register_parameter(name, nn.Parameter(made, requires_grad=parameter.requires_grad))


# --------------------------------------------------------------------------------------------------- other products


class KeyHeads(Linear):
    """Keys or values of those heads that the rank's query heads need, where tp does not divide the heads."""

    heads: list[int]
    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., heads * C]."""
        weight_NCD = self.weight.unflatten(0, (-1, self.head_dim))
        return F.linear(x, weight_NCD[self.heads].flatten(0, 1))


class Rows(Linear):
    """The output of attention or of a plain MLP: every rank has a part of it, whose sum is scattered."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, piece] -> [B, S / tp, D]."""
        return scattered_sum(F.linear(x, self.weight), SEQUENCE, self.group)


class GatedColumns(Linear):
    """A plain MLP's first product: a rank's rows are no pairs of gate and up, so they are gathered and used in part."""

    group: ProcessGroup
    gates: int

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., G * F / tp]."""
        weight_GFD = gathered(self.weight, 0, self.group).unflatten(0, (self.gates, -1))
        own = weight_GFD.chunk(self.group.size(), 1)[self.group.rank()]
        return F.linear(x, own.flatten(0, 1))


class VocabularyEmbedding(nn.Embedding):
    """A rank has some ids' vectors, the others' are zero; the sum over the ranks is scattered over the sequence."""

    group: ProcessGroup

    def forward(self, tokens_BS: Tensor) -> Tensor:  # type: ignore[override]
        """-> [B, S / tp, D]."""
        weight_VD = self.weight
        local_BS = tokens_BS - self.group.rank() * len(weight_VD)
        mine_BS = (local_BS >= 0) & (local_BS < len(weight_VD))
        x_BSD = F.embedding(local_BS * mine_BS, weight_VD) * mine_BS.unsqueeze(2)
        return scattered_sum(x_BSD, SEQUENCE, self.group)


class VocabularyHead(Head):
    """The output layer with some ids' rows on each rank."""

    group: ProcessGroup

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [B, S / tp, D] -> logits [B, S, V]; with targets [B, S] the sum of their losses, the same on all ranks."""
        x_BSD, weight_VD = gathered(x_BSD, SEQUENCE, self.group), self.weight
        if targets_BS is None:
            # Whoever uses the logits is every rank, with the whole gradient.
            logits = repeated(gathered(F.linear(x_BSD, weight_VD), 2, self.group), self.group.size())
            return logits
        first = self.group.rank() * len(weight_VD)
        return _vocabulary_loss(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten(), first, self.group)


_CHUNK = 1024  # tokens whose logits are held at a time


def _vocabulary_loss(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, first: int, group: ProcessGroup) -> Tensor:
    return _VocabularyLoss.apply(x_TD, w_VD, targets_T, first, group)  # type: ignore[return-value]


class _VocabularyLoss(torch.autograd.Function):
    """The sum of -log softmax(x w^T)[target], of which each rank computes the logits of its ids, a chunk of tokens at a
    time, with the gradients in the same pass: they are scaled in the backward. The gradient of x is a part."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, first: int, group: ProcessGroup) -> Tensor:
        wide = at_least_fp32(x_TD.dtype)
        total = x_TD.new_zeros((), dtype=wide)
        dx_TD, dw_VD = torch.empty_like(x_TD), torch.zeros(w_VD.shape, dtype=wide, device=w_VD.device)
        for low in range(0, len(x_TD), _CHUNK):
            rows = slice(low, low + _CHUNK)
            x, counts = x_TD[rows], targets_T[rows] != IGNORE_INDEX
            logits = F.linear(x, w_VD).to(wide)
            top = logits.amax(1)
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            logits = logits.sub_(top.unsqueeze(1))
            local = targets_T[rows] - first
            mine = (local >= 0) & (local < len(w_VD)) & counts
            at = (local * mine).unsqueeze(1)
            own = logits.gather(1, at).squeeze(1) * mine
            p = logits.exp_()
            both = torch.stack([p.sum(1), own])
            dist.all_reduce(both, group=group)
            total += ((both[0].log() - both[1]) * counts).sum()
            p = p.div_(both[0].unsqueeze(1)).scatter_add_(1, at, -mine.to(wide).unsqueeze(1)).mul_(counts.unsqueeze(1))
            narrow = p.to(x.dtype)
            dx_TD[rows] = narrow @ w_VD
            dw_VD += (narrow.t() @ x).to(wide)
        ctx.save_for_backward(dx_TD, dw_VD.to(w_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx_TD, dw_VD = ctx.saved_tensors
        return dx_TD * dy.to(dx_TD.dtype), dw_VD * dy.to(dw_VD.dtype), None, None, None


# ------------------------------------------------------------------------------------------------------- the whole


def apply(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide a model, or a stage of one, over the ranks of the one-dimensional `mesh`, in place."""
    group, cfg = mesh.get_group(), model.cfg
    if model.embedding is not None:
        distribute(model.embedding, "weight", mesh, Shard(0))
        localize(model.embedding, VocabularyEmbedding)
        model.embedding.group = group  # type: ignore[assignment]
    blocks: Any = model.blocks
    for block in blocks:
        if block is not None:
            _norm(block.attention_norm, mesh)
            _attention(block.attention, cfg, mesh)
            _norm(block.mlp_norm, mesh)
            if block.mlp is not None:
                _mlp(block.mlp, mesh)
            else:
                _moe(block.moe, mesh)
    if model.norm is not None:
        _norm(model.norm, mesh)
    if model.head is not None:
        distribute(model.head, "weight", mesh, Shard(0))
        localize(model.head, VocabularyHead)
        model.head.group = group  # type: ignore[assignment]


def _norm(norm: nn.Module, mesh: DeviceMesh) -> None:
    distribute(norm, "weight", mesh, Replicate())
    localize(norm, weight=(Partial(),))


def _attention(attention: Attention, cfg: Config, mesh: DeviceMesh) -> None:
    group, a = mesh.get_group(), cfg.attention
    distribute(attention.wq, "weight", mesh, Shard(0))
    localize(attention.wq)
    own = a.n_heads // group.size()
    w: Any
    for w in (attention.wk, attention.wv):
        if a.n_kv_heads % group.size() == 0:
            distribute(w, "weight", mesh, Shard(0))
            localize(w)
        else:
            distribute(w, "weight", mesh, Replicate())
            localize(w, KeyHeads, weight=(Partial(),))
            w.heads = _key_heads(range(group.rank() * own, (group.rank() + 1) * own), a.n_heads // a.n_kv_heads)
            w.head_dim = a.head_dim
    distribute(attention.wo, "weight", mesh, Shard(1))
    localize(attention.wo, Rows)
    attention.wo.group = group  # type: ignore[assignment]
    attention.register_forward_pre_hook(lambda _, args: (gathered(args[0], SEQUENCE, group), *args[1:]))


def _key_heads(heads: range, group_size: int) -> list[int]:
    """The key heads of these query heads: each once where every one serves equally many of them, else one for each."""
    of_each = [h // group_size for h in heads]
    once = list(dict.fromkeys(of_each))
    even = len(of_each) % len(once) == 0 and of_each == [n for n in once for _ in range(len(of_each) // len(once))]
    return once if even else of_each


def _mlp(mlp: MLP, mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    for w, kind, placement in ((mlp.w_in, GatedColumns, Shard(0)), (mlp.w_out, Rows, Shard(1))):
        distribute(w, "weight", mesh, placement)
        localize(w, kind)
        w.group = group  # type: ignore[assignment]
    mlp.w_in.gates = mlp.w_in.out_features // mlp.w_out.in_features  # type: ignore[assignment]
    mlp.register_forward_pre_hook(lambda _, args: (gathered(args[0], SEQUENCE, group), *args[1:]))


def _moe(moe: Any, mesh: DeviceMesh) -> None:
    """The experts are divided elsewhere (expert.py): here is what goes in and comes out."""
    group = mesh.get_group()
    distribute(moe.router, "weight", mesh, Replicate())
    localize(moe.router)
    moe.register_forward_pre_hook(lambda _, args: (gathered(args[0], SEQUENCE, group), *args[1:]))
    # All ranks route all tokens: of x's gradient, whose parts are added, each has the router's whole.
    moe.router.register_forward_pre_hook(lambda _, args: (repeated(args[0], group.size()),))
    # The experts' widths are divided: every rank has a part of the gradient of a token's weights.
    moe.experts.register_forward_pre_hook(lambda _, args: (args[0], shared(args[1], group), args[2]))
    moe.register_forward_hook(functools.partial(_after_moe, group))


def _after_moe(group: ProcessGroup, _module: nn.Module, _args: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return scattered_sum(out[0], SEQUENCE, group), out[1]


__all__ = ["LocalWeights", "apply", "distribute", "localize", "summed"]
