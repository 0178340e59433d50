"""The mixture of experts of one layer: the router with its losses, the expert MLPs.

Shape suffixes: B batch, S sequence, T = B*S tokens, D model width, E experts, K experts per token, G gate/up,
F expert hidden width.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moe.config import ExpertsConfig, RouterConfig
from moe.kernels import ops
from moe.layers import at_least_fp32, cast, made_by_init_weights, without_autocast


class Routing(NamedTuple):
    """What one layer's router did in one forward pass."""

    ids_TK: Tensor  # int64, the chosen experts in falling order of score
    weights_TK: Tensor  # at least float32, each row sums to 1
    logits_BSE: Tensor  # at least float32, before any bias
    text_BS: Tensor | None = None  # bool, False at padding, which counts nowhere; None where all is text

    @property
    def logits_TE(self) -> Tensor:
        """The logits, token after token."""
        return self.logits_BSE.flatten(0, 1)

    @property
    def n_experts(self) -> int:
        """Experts that the router chooses among."""
        return self.logits_BSE.shape[2]

    @property
    def counts_E(self) -> Tensor:
        """Routed tokens per expert, int64; they sum to K times the tokens of text."""
        return self._counts_BE.sum(0)

    @property
    def balance_B(self) -> Tensor:
        """The balance loss of each sequence, before its weight: 1 when even, 0 where it has no text."""
        return balance_loss(self.logits_BSE, self._counts_BE, self.text_BS)

    @property
    def z_T(self) -> Tensor:
        """The z-loss of each token, before its weight: 0 at padding."""
        z_BS = z_loss(self.logits_BSE)
        return (z_BS if self.text_BS is None else z_BS.masked_fill(~self.text_BS, 0.0)).flatten()

    @property
    def _counts_BE(self) -> Tensor:
        (B, S, E), K = self.logits_BSE.shape, self.ids_TK.shape[1]
        text_BR = None if self.text_BS is None else self.text_BS.repeat_interleave(K, 1)
        return expert_counts(self.ids_TK.view(B, S * K), E, text_BR)


class Router(nn.Module):
    """Softmax top-k gate, computed in at least float32.

    With bias-based balancing, `bias_E` is added to the scores for choosing only and nudged after each step by
    `update_bias` (Wang et al. 2024, arXiv:2408.15664). It sums many small steps, so it is at least float32, whatever
    the model is cast to or loaded from: bfloat16 adds 0.001 to 0.5 in vain.
    """

    bias_E: Tensor | None
    reset_parameters = made_by_init_weights

    def __init__(self, d_model: int, n_experts: int, top_k: int, cfg: RouterConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.top_k = top_k
        self.bias_update_rate = cfg.bias_update_rate
        dtype = at_least_fp32(torch.get_default_dtype())
        self.register_buffer("bias_E", torch.zeros(n_experts, dtype=dtype) if cfg.bias_update_rate else None)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Casts and moves; what a cast would round off the bias stays."""
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if bias_E is not None and self.bias_E is not None and self.bias_E.dtype != at_least_fp32(self.bias_E.dtype):
            self.bias_E = bias_E.to(self.bias_E.device, at_least_fp32(self.bias_E.dtype))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (stored := state_dict.get(f"{prefix}bias_E")) is not None:
            state_dict[f"{prefix}bias_E"] = cast(stored, at_least_fp32(stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """For repr: the shape, and whether a bias balances."""
        (n_experts, d_model), balanced = self.weight.shape, "" if self.bias_E is None else ", bias_E"
        return f"{d_model}, {n_experts} experts, top_k={self.top_k}{balanced}"

    def forward(self, x_BSD: Tensor) -> Routing:
        """x_BSD -> the routing of its B*S tokens, in that order."""
        wide = at_least_fp32(x_BSD.dtype)
        with without_autocast(x_BSD.device.type):
            logits_BSE = F.linear(cast(x_BSD, wide), cast(self.weight, wide))
            weights_TK, ids_TK = self.choose(logits_BSE.flatten(0, 1))
        return Routing(ids_TK, weights_TK, logits_BSE)

    if TYPE_CHECKING:
        # Of nn.Module it is Any.
        def __call__(self, x_BSD: Tensor) -> Routing: ...

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and ids [T, K] of the chosen experts."""
        return ops.topk_gate(logits_TE, self.top_k, self.bias_E)

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of experts above it, by a fixed rate."""
        if self.bias_E is not None:
            load_E = counts_E.to(self.bias_E.dtype)
            self.bias_E += self.bias_update_rate * torch.sign(load_E.mean() - load_E)


def expert_counts(ids_BR: Tensor, n_experts: int, text_BR: Tensor | None = None) -> Tensor:
    """How often each expert occurs in each row, where `text_BR` is True -> int64 [B, E]. No host sync."""
    zeros = ids_BR.new_zeros(ids_BR.shape[0], n_experts, dtype=torch.int64)
    ones = torch.ones_like(ids_BR, dtype=torch.int64) if text_BR is None else text_BR.long()
    return zeros.scatter_add(1, ids_BR, ones)


def balance_loss(logits_BSE: Tensor, counts_BE: Tensor, text_BS: Tensor | None = None) -> Tensor:
    """E * sum over experts of (fraction of choices) x (mean probability), per sequence -> [B]: 1 when even.

    Switch Transformer's loss (Fedus et al. 2021, eq. 4) taken per sequence, so that micro-batching, data and pipeline
    parallelism do not change it. Both factors are of text alone; a sequence without any has 0.
    """
    fraction_BE = counts_BE.to(logits_BSE.dtype) / counts_BE.sum(1, keepdim=True).clamp(min=1)
    p_BSE = logits_BSE.softmax(-1)
    if text_BS is None:
        mean_BE = p_BSE.sum(1) / max(logits_BSE.shape[1], 1)
    else:
        mean_BE = (p_BSE * text_BS.unsqueeze(2)).sum(1) / text_BS.sum(1, keepdim=True).clamp(min=1)
    return logits_BSE.shape[-1] * (fraction_BE * mean_BE).sum(1)


def z_loss(logits: Tensor) -> Tensor:
    """logsumexp(logits [..., E])^2 -> [...], which keeps the logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return logits.logsumexp(-1).square()


class Experts(nn.Module):
    """The expert MLPs of one layer. Whoever has them elsewhere, or otherwise (sharded over ranks, with adapters,
    quantised, imported), puts a module with the same `forward` in this one's place.

    `recompute`: keep only the input for the backward, as selective checkpointing wants (see ops.expert_mlp).
    """

    reset_parameters = made_by_init_weights

    def __init__(self, d_model: int, cfg: ExpertsConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.recompute = False
        n_gates = ops.ACTIVATIONS[cfg.activation]
        self.w_in_EGFD = nn.Parameter(torch.empty(cfg.n_experts, n_gates, cfg.d_ff, d_model))
        self.w_out_EDF = nn.Parameter(torch.empty(cfg.n_experts, d_model, cfg.d_ff))

    def extra_repr(self) -> str:
        """For repr: how many experts of which shape, and their parameters."""
        (n_experts, _, d_ff, d_model), w_out = self.w_in_EGFD.shape, self.w_out_EDF
        n = self.w_in_EGFD.numel() + w_out.numel()
        return f"{n_experts} x (d_model={d_model}, d_ff={d_ff}), activation={self.activation}, {n:,} parameters"

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """x_TD -> [T, D]: the sum over a token's experts, weighted, dropless, however uneven the loads."""
        weights = self.w_in_EGFD, self.w_out_EDF
        return ops.expert_mlp(x_TD, *weights, weights_TK, ids_TK, self.activation, recompute=self.recompute)

    if TYPE_CHECKING:

        def __call__(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor: ...


class MoE(nn.Module):
    """Mixture of experts: the router chooses `top_k` of the experts for each token, and they serve it."""

    def __init__(self, d_model: int, cfg: ExpertsConfig, router: RouterConfig) -> None:
        super().__init__()
        self.router = Router(d_model, cfg.n_experts, cfg.top_k, router)
        self.experts = Experts(d_model, cfg)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        """x_BSD -> [B, S, D] and what the router did."""
        routing: Routing = self.router(x_BSD)
        y_TD = self.experts(rearrange(x_BSD, "b s d -> (b s) d"), routing.weights_TK, routing.ids_TK)
        return y_TD.view(x_BSD.shape).to(x_BSD.dtype), routing

    if TYPE_CHECKING:

        def __call__(self, x_BSD: Tensor) -> tuple[Tensor, Routing]: ...
