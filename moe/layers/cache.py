"""The keys and values of earlier positions: a cache that brings its own attention.

Shape suffixes: B batch, S sequence, P positions in the cache, H query heads, N key/value heads, C head width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Config
from moe.layers.attention import Attend, attention_of, causal, rope_tables
from moe.layers.plain import cast


class LayerCache(NamedTuple):
    """One layer's keys and values of B sequences, [B, N, P, C] each."""

    k_BNPC: Tensor
    v_BNPC: Tensor


class KVCache:
    """Keys and values of all layers for `batch` sequences of up to `max_len` positions; it brings its own attention.

    `lengths`: how many positions of each sequence are filled.
    """

    def __init__(self, cfg: Config, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (batch, cfg.attention.n_kv_heads, max_len, cfg.attention.head_dim)
        self.layers = [
            LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(cfg.n_layers)
        ]
        # The rotations of all its positions, made once.
        self._rope = rope_tables(0, max_len, cfg.attention.head_dim, cfg.attention.rope, dtype, torch.device(device))
        self.max_len = max_len
        self.lengths = [0] * batch

    def __repr__(self) -> str:
        keys = self.layers[0].k_BNPC
        shape = f"{len(self.layers)} layers, lengths={self.lengths}, max_len={self.max_len}"
        return f"KVCache({shape}, n_kv_heads={keys.shape[1]}, head_dim={keys.shape[3]}, {keys.dtype}, {keys.device})"

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Filled positions of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all sequences are equally long."""
        return len(set(self.lengths)) <= 1

    def rope(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin, for `rotate`, of the next `n` positions of each sequence."""
        places = slice(self.length, self.length + n) if self.even else self._next(n)
        cos, sin = (table[places] for table in self._rope)
        return cos, sin

    def attends(self, n: int) -> list[Attend]:
        """For each layer: stores the next `n` keys and values; their queries see these and all before them."""
        if self.even:
            return [functools.partial(_extend_evenly, cache, self.length) for cache in self.layers]
        at_BS = self._next(n)
        return [functools.partial(_extend, cache, at_BS, self.length + n) for cache in self.layers]

    def advance(self, n: int | Sequence[int]) -> None:
        """The next `n` positions of each sequence are filled, in every layer; or of each as many as it says."""
        more = [n] * self.batch if isinstance(n, int) else n
        self.lengths = [length + m for length, m in zip(self.lengths, more, strict=True)]

    def _next(self, n: int) -> Tensor:
        """The next `n` positions of each sequence, int64 [B, n]."""
        device = self.layers[0].k_BNPC.device
        return torch.tensor(self.lengths, device=device).unsqueeze(1) + torch.arange(n, device=device)


def _extend_evenly(cache: LayerCache, start: int, q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
    """Attention of the positions from `start` on, of sequences that are equally long."""
    (B, S, H, C), N = q_BSHC.shape, k_BSNC.shape[2]
    end = start + S
    k_BNPC, v_BNPC = cache.k_BNPC[:, :, :end], cache.v_BNPC[:, :, :end]
    k_BNPC[:, :, start:] = k_BSNC.transpose(1, 2)
    v_BNPC[:, :, start:] = v_BSNC.transpose(1, 2)
    if S == 1:
        # One position sees everything, so the heads that share a key head can be rows of one query: a single product.
        return F.scaled_dot_product_attention(q_BSHC.reshape(B, N, H // N, C), k_BNPC, v_BNPC).reshape(B, 1, H, C)
    if start == 0:
        return causal(q_BSHC, k_BSNC, v_BSNC)
    sees_SP = torch.ones(S, end, dtype=torch.bool, device=q_BSHC.device).tril(start)
    return attention_of(q_BSHC, k_BNPC.transpose(1, 2), v_BNPC.transpose(1, 2), attn_mask=sees_SP)


def _extend(cache: LayerCache, at_BS: Tensor, end: int, q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
    """Attention of the positions `at_BS` of sequences of different lengths, all of them before `end`."""
    rows_B1 = torch.arange(len(at_BS), device=at_BS.device).unsqueeze(1)
    cache.k_BNPC[rows_B1, :, at_BS] = cast(k_BSNC, cache.k_BNPC.dtype)  # under autocast they are narrower
    cache.v_BNPC[rows_B1, :, at_BS] = cast(v_BSNC, cache.v_BNPC.dtype)
    sees_B1SP = (torch.arange(end, device=at_BS.device) <= at_BS.unsqueeze(2)).unsqueeze(1)
    k_BPNC, v_BPNC = (x[:, :, :end].transpose(1, 2) for x in cache)
    return attention_of(q_BSHC, k_BPNC, v_BPNC, attn_mask=sees_B1SP)
