"""Generation: tokens one after the other, a step in as few operations as it takes, and tokens to text as they come.

`Transformer.generate` is the simple oracle; what is here is faster and gives the same tokens.

Shape suffixes: B batch, S sequence, D model width, H query heads, N key/value heads, C head width, V vocabulary.
"""

import codecs
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from moe.experts import Experts, MoE, Router
from moe.kernels import ops
from moe.kernels.arguments import autocasts
from moe.kernels.spans import span
from moe.layers import (
    MLP,
    Attention,
    Head,
    KVCache,
    LayerCache,
    Linear,
    RMSNorm,
    at_least_fp32,
    cast,
    rotate,
    untouched,
)
from moe.model import Block, Embedding, Ends, Transformer, check_sampling, last_of_text, sample

# ----------------------------------------------------------------------------------------------------------- tokens


@torch.no_grad()
def stream(
    model: Transformer,
    prompt_BS: Tensor,
    max_new_tokens: int,
    *,
    mask_BS: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 [B], `max_new_tokens` times, or until the context is full or every
    sequence has ended.

    Args:
        prompt_BS: int64 ids, at least one token each.
        mask_BS: False, or 0, at padding, on either side, where prompts are not equally long.
        temperature: 0 for greedy. top_k: 0 for all. top_p: in (0, 1], 1 for all.
        eos_id: the id that ends a sequence, such as `tokenizer.eot_id`, or several of them. A sequence that has ended
            repeats it while others go on. None: none ends.

    Raises:
        ValueError: an empty or over-long prompt, or a sampling setting out of range.
    """
    check_sampling(prompt_BS, temperature, top_k, top_p, mask_BS, max_new_tokens)
    batch, length = prompt_BS.shape
    max_len = min(length + max_new_tokens, model.cfg.max_seq_len)
    weight = model.embedding.weight
    device = prompt_BS.device if weight.is_meta else weight.device  # meta: accelerate brings the weights when called
    cache = KVCache(model.cfg, batch, max(max_len, length), weight.dtype, device)
    generator, ends = torch.Generator(device).manual_seed(seed), Ends(eos_id, model.cfg.vocab_size)
    logits_BV = last_of_text(model(prompt_BS, mask_BS=mask_BS, cache=cache).logits_BSV, mask_BS)
    step = DecodeStep(model, cache) if cache.even and DecodeStep.fits(model) else None
    for n in range(1, max_new_tokens + 1):
        next_B = ends.hold(sample(logits_BV, temperature, top_k, top_p, generator))
        yield next_B
        if n == max_new_tokens or cache.length == model.cfg.max_seq_len or ends.all():
            return
        logits_BV = step(next_B) if step else model(next_B.unsqueeze(1), cache=cache).logits_BSV[:, -1]


# --------------------------------------------------------------------------------------------------------- one step


_KINDS = {Transformer, nn.ModuleList, Embedding, Block, RMSNorm, Attention, Linear, MoE, Router, Experts, MLP, Head}


class _Layer(NamedTuple):
    attention_norm_D: Tensor
    wqkv_DA: Tensor  # A = (H + 2N) * C
    wo_AD: Tensor
    mlp_norm_D: Tensor
    mlp: MoE | MLP
    cache: LayerCache


class DecodeStep:
    """One step of generation: takes the newest token of every sequence, gives the logits of the next.

    A step of a small batch computes little: the time goes into reading the weights and into starting operations, of
    which the modules of model.py need twice as many. This does the same computation from one fused query/key/value
    weight, without modules between; results agree with the modules' up to rounding. It holds copies of the norms and of
    the query, key and value weights, so it is made for one generation.

    Args:
        model: one that `fits`.
        cache: of that model, holding the earlier positions of equally long sequences; takes the new keys and values.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
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
        blocks: Any = model.blocks
        for block, layer_cache in zip(blocks, cache.layers, strict=True):
            a = block.attention
            wqkv_DA = torch.cat([w.weight.t() for w in (a.wq, a.wk, a.wv)], 1)
            wo_AD = a.wo.weight.t().contiguous()
            norms = self._norm_weight(block.attention_norm), self._norm_weight(block.mlp_norm)
            self.layers.append(_Layer(norms[0], wqkv_DA, wo_AD, norms[1], block.moe or block.mlp, layer_cache))
        self.norm_D = self._norm_weight(model.norm)
        self.head_DV = model.head.weight.t().contiguous()

    @staticmethod
    def fits(model: Transformer) -> bool:
        """Whether every module is exactly ours and as the configuration says, and no autocast is on: what is not has to
        be called."""
        if autocasts(next(model.parameters()).device.type):
            return False
        if isinstance(model.embedding, Embedding) and model.embedding.max_norm is not None:
            return False
        if any(isinstance(m, RMSNorm) and m.eps != model.cfg.norm_eps for m in model.modules()):
            return False
        return all(type(m) in _KINDS and untouched(m, type(m)) for m in model.modules())

    def __call__(self, tokens_B: Tensor) -> Tensor:
        """tokens_B int64, ids of the vocabulary -> logits [B, V]."""
        B, C, position = len(tokens_B), self.head_dim, self.cache.length
        cos, sin = self.cache.rope(1)
        with span("embedding"):
            x_BD = F.embedding(tokens_B, self.embedding)
        for layer in self.layers:
            k_BNPC, v_BNPC = layer.cache.k_BNPC, layer.cache.v_BNPC
            N = k_BNPC.shape[1]
            n_BD = self._norm(x_BD, layer.attention_norm_D)
            with span("projections"):
                qkv_BAC = torch.mm(n_BD, layer.wqkv_DA).view(B, layer.wqkv_DA.shape[1] // C, C)
            with span("attention"):
                H = qkv_BAC.shape[1] - 2 * N
                qk_BAC = rotate(qkv_BAC[:, : H + N], cos, sin)
                k_BNPC.select(2, position).copy_(qk_BAC[:, H:])
                v_BNPC.select(2, position).copy_(qkv_BAC[:, H + N :])
                # One position sees all the others, so the heads that share a key head are rows of one query.
                q_BNGC = qk_BAC[:, :H].reshape(B, N, H // N, C)
                seen = k_BNPC.narrow(2, 0, position + 1), v_BNPC.narrow(2, 0, position + 1)
                y_BNGC = F.scaled_dot_product_attention(q_BNGC, *seen)
            with span("projections"):
                x_BD = torch.addmm(x_BD, y_BNGC.reshape(B, H * C), layer.wo_AD)
            x_BD = x_BD + self._mlp(layer.mlp, self._norm(x_BD, layer.mlp_norm_D))
        self.cache.advance(1)
        n_BD = self._norm(x_BD, self.norm_D)
        with span("head"):
            return torch.mm(n_BD, self.head_DV)

    def _mlp(self, mlp: MoE | MLP, x_BD: Tensor) -> Tensor:
        if isinstance(mlp, MLP):
            return mlp(x_BD)
        router, experts = mlp.router, mlp.experts
        with span("router"):
            logits_BE = F.linear(cast(x_BD, self.wide), cast(router.weight, self.wide))
            weights_BK, ids_BK = router.choose(logits_BE)
        weights = experts.w_in_EGFD, experts.w_out_EDF
        return ops.expert_mlp_inference(x_BD, *weights, weights_BK, ids_BK, experts.activation)

    def _norm_weight(self, norm: RMSNorm) -> Tensor:
        return norm.weight.to(self.wide) * self.d_model**0.5

    def _norm(self, x_BD: Tensor, weight_D: Tensor) -> Tensor:
        with span("norm"):
            x_BD = cast(x_BD, self.wide)
            length_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True).hypot_(self.root_eps)
            return cast((x_BD / length_B1).mul_(weight_D), self.dtype)
