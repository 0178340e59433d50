"""One pass of the model over a flat batch of tokens: logits where they are wanted.

Shape suffixes: T tokens, N wanted positions, D model width, H query heads, C head width, V vocabulary, K experts of a
token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.experts import MoE
from moe.generate import DecodeStep
from moe.kernels import ops
from moe.layers import MLP, at_least_fp32, cast, rotate
from moe.model import Transformer
from moe.serve.pages import Pages, Pass, Segment


class _Layer(NamedTuple):
    attention_norm_D: Tensor
    wqkv_DA: Tensor  # A = (H + 2N) * C
    wo_AD: Tensor
    mlp_norm_D: Tensor
    mlp: MoE | MLP


class Runner:
    """Runs a model over passes, with its keys and values in `pages`.

    A pass of few tokens computes little: the time goes into reading the weights and into starting operations, of which
    the modules of model.py need twice as many as are needed. So where every module is exactly ours and untouched, the
    same computation is done from one fused query/key/value weight, without modules between; results agree with the
    modules' up to rounding. Else the modules run.
    """

    def __init__(self, model: Transformer, pages: Pages) -> None:
        self.model, self.pages = model, pages
        self.fused = _Fused(model) if DecodeStep.fits(model) else None

    @torch.no_grad()
    def __call__(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        """Stores the tokens' keys and values; the logits [N, V] after the `wanted` rows of the pass."""
        one = Pass(self.pages, segments)
        rows_N = torch.tensor(wanted, dtype=torch.int64, device=self.pages.device)
        if self.fused is not None:
            return self.fused(one, rows_N)
        cache: Any = one
        return self.model(one.tokens_T.unsqueeze(0), cache=cache).logits_BSV[0].index_select(0, rows_N)


class _Fused:
    """Holds copies of the norms and of the query, key and value weights."""

    def __init__(self, model: Transformer) -> None:
        self.embedding = model.embedding.weight
        self.dtype = self.embedding.dtype
        self.wide = at_least_fp32(self.dtype)
        self.n_heads, self.head_dim = model.cfg.attention.n_heads, model.cfg.attention.head_dim
        self.eps = model.cfg.norm_eps
        self.layers = []
        blocks: Any = model.blocks
        for block in blocks:
            a = block.attention
            wqkv_DA = torch.cat([w.weight.t() for w in (a.wq, a.wk, a.wv)], 1)
            norms = (cast(n.weight, self.wide) for n in (block.attention_norm, block.mlp_norm))
            one, two = norms
            self.layers.append(_Layer(one, wqkv_DA, a.wo.weight.t().contiguous(), two, block.moe or block.mlp))
        self.norm_D = cast(model.norm.weight, self.wide)
        self.head_DV = model.head.weight.t().contiguous()

    def __call__(self, one: Pass, rows_N: Tensor) -> Tensor:
        T, H, C = len(one.tokens_T), self.n_heads, self.head_dim
        cos, sin = one.rope(T)
        x_TD = F.embedding(one.tokens_T, self.embedding)
        for layer, attend in zip(self.layers, one.attends(T), strict=True):
            qkv_TAC = torch.mm(self._norm(x_TD, layer.attention_norm_D), layer.wqkv_DA).view(T, -1, C)
            n_kv = (qkv_TAC.shape[1] - H) // 2
            qk_TAC = rotate(qkv_TAC[:, : H + n_kv], cos, sin)
            y_1THC = attend(qk_TAC[None, :, :H], qk_TAC[None, :, H:], qkv_TAC[None, :, H + n_kv :])
            x_TD = torch.addmm(x_TD, y_1THC.reshape(T, H * C), layer.wo_AD)
            x_TD = x_TD + self._mlp(layer.mlp, self._norm(x_TD, layer.mlp_norm_D))
        return torch.mm(self._norm(x_TD.index_select(0, rows_N), self.norm_D), self.head_DV)

    def _mlp(self, mlp: MoE | MLP, x_TD: Tensor) -> Tensor:
        if isinstance(mlp, MLP):
            return mlp(x_TD)
        router, experts = mlp.router, mlp.experts
        weights_TK, ids_TK = router.choose(F.linear(cast(x_TD, self.wide), cast(router.weight, self.wide)))
        weights = experts.w_in_EGFD, experts.w_out_EDF
        return ops.expert_mlp_inference(x_TD, *weights, weights_TK, ids_TK, experts.activation)

    def _norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        return cast(F.rms_norm(cast(x_TD, self.wide), weight_D.shape, weight_D, self.eps), self.dtype)
