"""The dense parts of a block: RMSNorm, rotary position embedding and its scaling to 32k, multi-query attention.

Shape suffixes: B batch, S sequence, P positions in the cache, D model width, H query heads, N key/value heads,
C head width.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.config import AttentionConfig, Config, RopeConfig


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, rotations, routers and losses compute."""
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), but for free where x has it: in a step of generation the call would count."""
    return x if x.dtype == dtype else x.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off for a block of code; where it is off already, for free."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Linear(nn.Linear):
    """A bias-free nn.Linear that leaves its weight to `init_weights`, the one place where weights are made."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        x_wide, weight = cast(x, wide), cast(self.weight, wide)
        with without_autocast(x.device.type):
            if x.device.type != "cpu":
                return cast(F.rms_norm(x_wide, weight.shape, weight, self.eps), x.dtype)
            if torch.is_grad_enabled():
                return cast(_CpuRMSNorm.apply(x_wide, weight, self.eps), x.dtype)
            return cast((x_wide * _inverse_rms(x_wide, self.eps)).mul_(weight), x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (torch.linalg.vecdot(x, x) / x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


class _CpuRMSNorm(torch.autograd.Function):
    """RMS norm for a CPU, where torch has no fused one: fewer passes over memory, fewer operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        # With s = 1 / rms(x): dx = s w dy - s^3 x mean(w dy x), dw = sum over rows of s x dy.
        x, weight, scale = ctx.saved_tensors
        product = dy * x
        mean = (product @ weight).unsqueeze(-1) / x.shape[-1]
        dx = (dy * weight).mul_(scale).addcmul_(x, mean * scale**3, value=-1)
        return dx, scale.flatten() @ product.flatten(0, -2), None


# ----------------------------------------------------------------------------------------------------------- rotary


def rope_frequencies(head_dim: int, cfg: RopeConfig) -> tuple[list[float], float]:
    """The rotation frequency of each of the head_dim / 2 pairs (radians per position), and the attention temperature.

    YaRN (Peng et al. 2023, sections 3.2-3.4): pairs that turn often within the original context keep their frequency,
    pairs that turn seldom are slowed by `factor`, the ones between are blended; queries and keys are both multiplied
    by the temperature 0.1 ln(factor) + 1.
    """
    # In float32 step by step, as the libraries that trained models come from do it: with the exact frequencies the
    # angles, and from some hundred positions on the logits, of an imported model would differ by more than rounding.
    base = [_fp32(1 / _fp32(cfg.theta ** _fp32(2 * i / head_dim))) for i in range(head_dim // 2)]
    if cfg.scaling == "none":
        return base, 1.0
    if cfg.scaling == "linear":
        return [f / cfg.factor for f in base], 1.0

    def pair_with(rotations: float) -> float:  # the pair that makes this many turns within the original context
        turns = cfg.original_max_seq_len / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(cfg.theta))

    low = max(math.floor(pair_with(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_with(cfg.beta_slow)), head_dim - 1)
    frequencies = []
    for i, f in enumerate(base):
        kept = _fp32(1 - _fp32(min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)))
        frequencies.append(_fp32(f / cfg.factor * (1 - kept)) + _fp32(f * kept))
    return frequencies, 0.1 * math.log(cfg.factor) + 1.0 if cfg.factor > 1 else 1.0


def _fp32(x: float) -> float:
    """x rounded to float32's 24 bits (Veltkamp's splitting): arithmetic only, which torch.compile traces through."""
    c = x * (2.0**29 + 1)
    return c - (c - x)


def rope_tables(
    start: int, length: int, head_dim: int, cfg: RopeConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotate`, of positions start .. start + length - 1: two [length, 1, head_dim].

    At least float32. Both halves of a head hold the same cosines, and opposite sines.
    """
    wide = at_least_fp32(dtype)
    frequencies, temperature = rope_frequencies(head_dim, cfg)
    positions = torch.arange(start, start + length, device=device, dtype=wide)
    angles = torch.outer(positions, torch.tensor(frequencies, device=device, dtype=wide))
    cos, sin = angles.cos() * temperature, angles.sin() * temperature
    return torch.cat([cos, cos], -1).unsqueeze(1), torch.cat([-sin, sin], -1).unsqueeze(1)


def rotate(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + C/2]) by its position's angle: the rotate-half form, with tables of `rope_tables`."""
    x = cast(x_BSHC, cos.dtype)
    return cast(torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin), x_BSHC.dtype)


# -------------------------------------------------------------------------------------------------------- attention


@dataclass
class LayerCache:
    """One layer's keys and values, [B, N, P, C] each, of which the first `length` positions are filled."""

    k_BNPC: Tensor
    v_BNPC: Tensor

    def append(self, start: int, k_BNSC: Tensor, v_BNSC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions from `start` on; returns all keys and values so far."""
        end = start + k_BNSC.shape[2]
        self.k_BNPC[:, :, start:end] = k_BNSC
        self.v_BNPC[:, :, start:end] = v_BNSC
        return self.k_BNPC[:, :, :end], self.v_BNPC[:, :, :end]


class KVCache:
    """Keys and values of all layers for `batch` sequences of up to `max_len` positions; `length` are filled."""

    def __init__(self, cfg: Config, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (batch, cfg.attention.n_kv_heads, max_len, cfg.attention.head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(cfg.n_layers)
        ]
        # The rotations of all its positions, made once.
        self.rope = rope_tables(0, max_len, cfg.attention.head_dim, cfg.attention.rope, dtype, torch.device(device))
        self.batch = batch
        self.max_len = max_len
        self.length = 0


# The documents of a batch, one after the other: (n, length) for n of them that are equally long. Or a mask that says
# what each position sees, bool [B, 1, S, S].
Documents = list[tuple[int, int]] | Tensor


def document_runs(documents_BS: Tensor) -> list[tuple[int, int]]:
    """`Documents` of a batch in which runs of equal integers are documents. Reads them: best kept on the CPU."""
    starts = [*_first(documents_BS).flatten().nonzero().flatten().tolist(), documents_BS.numel()]
    lengths = (end - start for start, end in pairwise(starts))
    return [(sum(1 for _ in equal), length) for length, equal in groupby(lengths)]


def document_mask(documents_BS: Tensor) -> Tensor:
    """`Documents` as a mask: memory quadratic in S, but one graph for torch.compile however they divide a batch."""
    run_BS = _first(documents_BS).cumsum(1)
    return (run_BS.unsqueeze(2) == run_BS.unsqueeze(1)).tril_().unsqueeze(1)


def _first(documents_BS: Tensor) -> Tensor:
    """Whether each position is the first of its document."""
    return torch.cat([torch.ones_like(documents_BS[:, :1], dtype=torch.bool), documents_BS.diff() != 0], dim=1)


class Attention(nn.Module):
    """Causal attention in which H query heads share N key/value heads: N = 1 is multi-query (Shazeer 2019)."""

    def __init__(self, d_model: int, cfg: AttentionConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.wq = Linear(d_model, cfg.n_heads * cfg.head_dim)
        self.wk = Linear(d_model, cfg.n_kv_heads * cfg.head_dim)
        self.wv = Linear(d_model, cfg.n_kv_heads * cfg.head_dim)
        self.wo = Linear(cfg.n_heads * cfg.head_dim, d_model)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        start: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        """x_BSD -> [B, S, D]. `start` is the position of the first token; earlier ones are in the cache.

        Each position sees itself and those before it: all of them, or with `documents` those of its own.
        """
        # -1, not the number of heads: under tensor parallelism a rank holds some of them.
        q_BSHC = rotate(self.wq(x_BSD).unflatten(-1, (-1, self.head_dim)), *rope)
        k_BSNC = rotate(self.wk(x_BSD).unflatten(-1, (-1, self.head_dim)), *rope)
        v_BSNC = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        k, v = k_BSNC.transpose(1, 2), v_BSNC.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(start, k, v)
        return self.wo(_attend(q_BSHC, k, v, documents))


def _attend(q_BSHC: Tensor, k_BNPC: Tensor, v_BNPC: Tensor, documents: Documents | None = None) -> Tensor:
    """Causal attention of the last S of P positions -> [B, S, H*C]."""
    B, S, H, C = q_BSHC.shape
    N, P = k_BNPC.shape[1:3]
    if S == 1:
        # One position sees everything, so the heads that share a key head can be rows of one query: a single product.
        return F.scaled_dot_product_attention(q_BSHC.reshape(B, N, H // N, C), k_BNPC, v_BNPC).reshape(B, 1, H * C)
    q_BHSC = q_BSHC.transpose(1, 2)
    if isinstance(documents, list):
        return _attend_within(q_BHSC, k_BNPC, v_BNPC, documents).flatten(2)
    if documents is not None:
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BNPC, v_BNPC, attn_mask=documents, enable_gqa=True)
    elif S == P:
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BNPC, v_BNPC, is_causal=True, enable_gqa=True)
    else:
        mask_SP = torch.ones(S, P, dtype=torch.bool, device=q_BHSC.device).tril(P - S)
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BNPC, v_BNPC, attn_mask=mask_SP, enable_gqa=True)
    return y_BHSC.transpose(1, 2).flatten(2)


def _attend_within(q_BHSC: Tensor, k_BNSC: Tensor, v_BNSC: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """Causal attention inside each of the documents that make up the batch -> [B, S, H, C]. Memory linear in S."""
    pieces, sizes = [], [n * length for n, length in runs]
    in_turn = (x.transpose(1, 2).flatten(0, 1).split(sizes) for x in (q_BHSC, k_BNSC, v_BNSC))
    for (n, length), *parts in zip(runs, *in_turn, strict=True):
        q, k, v = (part.unflatten(0, (n, length)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        pieces.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces).unflatten(0, (len(q_BHSC), -1))
