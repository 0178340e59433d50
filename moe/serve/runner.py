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
from moe.layers import MLP, at_least_fp32, cast, rotate, untouched
from moe.model import Transformer
from moe.serve.pages import Pages, Pass, Segment


class _Layer(NamedTuple):
    attention_norm_D: Tensor
    wqkv_DA: Tensor  # A = (H + 2N) * C
    wo_AD: Tensor
    mlp_norm_D: Tensor
    mlp: MoE | MLP


class Choice(NamedTuple):
    """What a layer's router chose, for each token of a pass."""

    ids_TK: Tensor
    weights_TK: Tensor


class Runner:
    """Runs a model over passes, with its keys and values in `pages`.

    `record`: whether `routing` shall hold, after a pass, the choices of each layer with experts, on the model's device.

    A pass of few tokens computes little: the time goes into reading the weights and into starting operations, of which
    the modules of model.py need twice as many as are needed. So where every module is exactly ours and untouched, the
    same computation is done from one fused query/key/value weight, without modules between; results agree with the
    modules' up to rounding. Else the modules run.
    """

    def __init__(self, model: Transformer, pages: Pages) -> None:
        self.model, self.pages = model, pages
        self.record = False
        self.routing: list[Choice] = []
        self._fused = _Fused(model) if DecodeStep.fits(model) else None

    @torch.no_grad()
    def __call__(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        """Stores the tokens' keys and values; the logits [N, V] after the `wanted` rows of the pass."""
        one = Pass(self.pages, segments)
        rows_N = torch.tensor(wanted, dtype=torch.int64, device=self.pages.device)
        logits_NV, routing = (self._modules if self._fused is None else self._fused)(one, rows_N)
        self.routing = routing if self.record else []
        return logits_NV

    def _modules(self, one: Pass, rows_N: Tensor) -> tuple[Tensor, list[Choice]]:
        """The output layer sees wanted rows only, but for a model that somebody has changed as a whole."""
        cache: Any = one
        if not untouched(self.model, Transformer):
            out = self.model(one.tokens_T.unsqueeze(0), cache=cache)
            return out.logits_BSV[0].index_select(0, rows_N), [Choice(r.ids_TK, r.weights_TK) for r in out.routing]
        x_1TD, T, routing = self.model.embedding(one.tokens_T.unsqueeze(0)), len(one.tokens_T), []
        blocks: Any = self.model.blocks
        for block, attend in zip(blocks, one.attends(T), strict=True):
            x_1TD, r = block(x_1TD, one.rope(T), attend)
            if r is not None:
                routing.append(Choice(r.ids_TK, r.weights_TK))
        return self.model.head(self.model.norm(x_1TD.index_select(1, rows_N)))[0], routing


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

    def __call__(self, one: Pass, rows_N: Tensor) -> tuple[Tensor, list[Choice]]:
        routing: list[Choice] = []
        T, H, C = len(one.tokens_T), self.n_heads, self.head_dim
        cos, sin = one.rope(T)
        x_TD = F.embedding(one.tokens_T, self.embedding)
        for layer, attend in zip(self.layers, one.attends(T), strict=True):
            qkv_TAC = torch.mm(self._norm(x_TD, layer.attention_norm_D), layer.wqkv_DA).view(T, -1, C)
            n_kv = (qkv_TAC.shape[1] - H) // 2
            qk_TAC = rotate(qkv_TAC[:, : H + n_kv], cos, sin)
            y_1THC = attend(qk_TAC[None, :, :H], qk_TAC[None, :, H:], qkv_TAC[None, :, H + n_kv :])
            x_TD = torch.addmm(x_TD, y_1THC.reshape(T, H * C), layer.wo_AD)
            x_TD = x_TD + self._mlp(layer.mlp, self._norm(x_TD, layer.mlp_norm_D), routing)
        return torch.mm(self._norm(x_TD.index_select(0, rows_N), self.norm_D), self.head_DV), routing

    def _mlp(self, mlp: MoE | MLP, x_TD: Tensor, routing: list[Choice]) -> Tensor:
        if isinstance(mlp, MLP):
            return mlp(x_TD)
        router, experts = mlp.router, mlp.experts
        weights_TK, ids_TK = router.choose(F.linear(cast(x_TD, self.wide), cast(router.weight, self.wide)))
        routing.append(Choice(ids_TK, weights_TK))
        weights = experts.w_in_EGFD, experts.w_out_EDF
        return ops.expert_mlp_inference(x_TD, *weights, weights_TK, ids_TK, experts.activation)

    def _norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        return cast(F.rms_norm(cast(x_TD, self.wide), weight_D.shape, weight_D, self.eps), self.dtype)
