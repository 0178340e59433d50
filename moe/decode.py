"""One step of generation in as few operations as it takes.

A step of a small batch computes little: the time goes into reading the weights and into starting operations, of which
the modules of model.py need twice as many. `DecodeStep` does the same computation from one fused query/key/value
weight, without modules between. Results agree with the modules' up to rounding.

Shape suffixes: B batch, D model width, H query heads, N key/value heads, C head width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.experts import MoE
from moe.kernels import ops
from moe.kernels.stages import stage
from moe.layers import KVCache, LayerCache, RMSNorm, at_least_fp32, cast, rotate


class _Layer(NamedTuple):
    attention_norm_D: Tensor
    wqkv_DA: Tensor  # A = (H + 2N) * C
    wo_AD: Tensor
    moe_norm_D: Tensor
    moe: MoE
    cache: LayerCache


class DecodeStep:
    """Takes the newest token of every sequence, gives the logits of the next; keys and values go to the cache.

    Made for one `generate`: it holds copies of the norms and of the query, key and value weights.

    Args:
        model: a `moe.Transformer` (which this module, below it, cannot name) that `fits`.
        cache: of that model, holding the earlier positions.
    """

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.cache = cache
        self.embedding = model.embedding.weight
        self.dtype = self.embedding.dtype
        self.wide = at_least_fp32(self.dtype)
        self.head_dim = model.cfg.attention.head_dim
        self.d_model = model.cfg.d_model
        # x / rms(x) = x * sqrt(D) / sqrt(|x|^2 + D eps): the sqrt(D) moves into the norm's weight, and what is left is
        # a hypotenuse.
        self.root_eps = torch.tensor((model.cfg.norm_eps * self.d_model) ** 0.5, dtype=self.wide)
        self.layers = []
        for block, layer_cache in zip(model.blocks, cache.layers, strict=True):
            a = block.attention
            wqkv_DA = torch.cat([w.weight.t() for w in (a.wq, a.wk, a.wv)], 1)
            wo_AD = a.wo.weight.t().contiguous()
            norms = self._norm_weight(block.attention_norm), self._norm_weight(block.moe_norm)
            self.layers.append(_Layer(norms[0], wqkv_DA, wo_AD, norms[1], block.moe, layer_cache))
        self.norm_D = self._norm_weight(model.norm)
        self.head_DV = model.head.weight.t().contiguous()

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model is as model.py made it: a replaced or hooked module must be called, not gone around."""
        own = ("moe.model", "moe.layers", "moe.experts", "torch.nn.modules.container")
        if torch.is_autocast_enabled(next(model.parameters()).device.type):
            return False
        return all(
            type(m).__module__ in own and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules()
        )

    def __call__(self, tokens_B: Tensor) -> Tensor:
        """tokens_B int64, ids of the vocabulary -> logits [B, V]."""
        B, C, position = len(tokens_B), self.head_dim, self.cache.length
        cos, sin = (table[position] for table in self.cache.rope)
        with stage("embedding"):
            x_BD = F.embedding(tokens_B, self.embedding)
        for layer in self.layers:
            k_BNPC, v_BNPC = layer.cache.k_BNPC, layer.cache.v_BNPC
            N = k_BNPC.shape[1]
            n_BD = self._norm(x_BD, layer.attention_norm_D)
            with stage("projections"):
                qkv_BAC = torch.mm(n_BD, layer.wqkv_DA).view(B, -1, C)
            with stage("attention"):
                H = qkv_BAC.shape[1] - 2 * N
                qk_BAC = rotate(qkv_BAC[:, : H + N], cos, sin)
                k_BNPC.select(2, position).copy_(qk_BAC[:, H:])
                v_BNPC.select(2, position).copy_(qkv_BAC[:, H + N :])
                # One position sees all the others, so the heads that share a key head are rows of one query.
                q_BNGC = qk_BAC[:, :H].reshape(B, N, H // N, C)
                seen = k_BNPC.narrow(2, 0, position + 1), v_BNPC.narrow(2, 0, position + 1)
                y_BNGC = F.scaled_dot_product_attention(q_BNGC, *seen)
            with stage("projections"):
                x_BD = torch.addmm(x_BD, y_BNGC.reshape(B, H * C), layer.wo_AD)
            x_BD = x_BD + self._experts(layer.moe, self._norm(x_BD, layer.moe_norm_D))
        self.cache.length = position + 1
        n_BD = self._norm(x_BD, self.norm_D)
        with stage("head"):
            return torch.mm(n_BD, self.head_DV)

    def _experts(self, moe: MoE, x_BD: Tensor) -> Tensor:
        router = moe.router
        with stage("router"):
            logits_BE = F.linear(cast(x_BD, self.wide), cast(router.weight, self.wide))
            weights_BK, ids_BK = router.choose(logits_BE)
        return ops.expert_mlp_inference(x_BD, moe.w_in_EGFD, moe.w_out_EDF, weights_BK, ids_BK, moe.activation)

    def _norm_weight(self, norm: RMSNorm) -> Tensor:
        return norm.weight.to(self.wide) * self.d_model**0.5

    def _norm(self, x_BD: Tensor, weight_D: Tensor) -> Tensor:
        with stage("norm"):
            x_BD = cast(x_BD, self.wide)
            length_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True).hypot_(self.root_eps)
            return cast((x_BD / length_B1).mul_(weight_D), self.dtype)
