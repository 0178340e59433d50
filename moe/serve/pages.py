"""Keys and values in blocks, and one pass over a flat batch: tokens of many requests, one after the other.

A `Pass` is a cache as `moe.layers.KVCache` is one: it brings the rotations and the attention of its tokens, so the
model's own modules run it as a batch of one sequence.

Shape suffixes: T tokens of the pass, P slots of the cache, S tokens and A = all positions of one request, H query
heads, N key/value heads, C head width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Config
from moe.layers import Attend, LayerCache, cast, rope_tables
from moe.layers.attention import attention_of


class Pages:
    """The keys and values of all layers: `n_blocks` blocks, and one more for what nobody reads."""

    def __init__(
        self, cfg: Config, n_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        a, slots = cfg.attention, (n_blocks + 1) * block_size
        shape = (slots, a.n_kv_heads, a.head_dim)
        self.block_size = block_size
        self.layers = [
            LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(cfg.n_layers)
        ]
        self.rope = rope_tables(0, cfg.max_seq_len, a.head_dim, a.rope, dtype, torch.device(device))
        self.device = torch.device(device)

    @property
    def n_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


class Segment(NamedTuple):
    """One request's tokens of a pass: positions [start, start + n), in these blocks."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.token_ids)


class _Seen(NamedTuple):
    """Rows [low, high) of the pass, and the slots of all positions up to their last."""

    low: int
    high: int
    slots_A: Tensor


class Pass:
    """The tokens of some requests, on their way through the model once."""

    def __init__(self, pages: Pages, segments: Sequence[Segment]) -> None:
        self._pages, size = pages, pages.block_size
        tokens, positions, slots, self._seen = [], [], [], []
        offsets = torch.arange(size)
        for segment in segments:
            low = len(tokens)
            tokens += segment.token_ids
            positions += range(segment.start, segment.end)
            used = torch.tensor(segment.blocks[: -(-segment.end // size)])
            slots_A = (used.unsqueeze(1) * size + offsets).flatten()[: segment.end]
            slots.append(slots_A[segment.start :])
            self._seen.append(_Seen(low, len(tokens), slots_A.to(pages.device)))
        self.tokens_T = torch.tensor(tokens, device=pages.device)
        self._positions_T = torch.tensor(positions, device=pages.device)
        self._slots_T = torch.cat(slots).to(pages.device)
        # What KVCache says of itself: one sequence, whose last position is the last of any.
        self.batch, self.length = 1, max(positions) + 1 - len(positions)
        self.max_len = len(pages.rope[0])

    def rope(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin, for `rotate`, of each token's position."""
        cos, sin = (table[self._positions_T] for table in self._pages.rope)
        return cos, sin

    def attends(self, n: int) -> list[Attend]:
        """For each layer: stores the tokens' keys and values; each sees its own request's up to itself."""
        return [functools.partial(self._attend, layer) for layer in self._pages.layers]

    def advance(self, n: int) -> None:
        """What a request has is the scheduler's to know."""

    def _attend(self, layer: LayerCache, q_1THC: Tensor, k_1TNC: Tensor, v_1TNC: Tensor) -> Tensor:
        k_PNC, v_PNC = layer
        k_PNC.index_copy_(0, self._slots_T, cast(k_1TNC[0], k_PNC.dtype))
        v_PNC.index_copy_(0, self._slots_T, cast(v_1TNC[0], v_PNC.dtype))
        y_1THC = torch.empty_like(q_1THC)
        for low, high, slots_A in self._seen:
            k_ANC, v_ANC = (x.index_select(0, slots_A) for x in (k_PNC, v_PNC))
            y_1THC[0, low:high] = _attention(q_1THC[0, low:high], k_ANC, v_ANC)
        return y_1THC


def _attention(q_SHC: Tensor, k_ANC: Tensor, v_ANC: Tensor) -> Tensor:
    """Of the last S of A positions."""
    (S, H, C), (A, N, _) = q_SHC.shape, k_ANC.shape
    if S == 1:
        # One position sees everything, so the heads that share a key head are rows of one query: a single product.
        k_NAC, v_NAC = k_ANC.transpose(0, 1), v_ANC.transpose(0, 1)
        return F.scaled_dot_product_attention(q_SHC.reshape(N, H // N, C), k_NAC, v_NAC).reshape(1, H, C)
    batch = (x.unsqueeze(0) for x in (q_SHC, k_ANC, v_ANC))
    if S == A:
        return attention_of(*batch, is_causal=True)[0]
    sees_SA = torch.ones(S, A, dtype=torch.bool, device=q_SHC.device).tril(A - S)
    return attention_of(*batch, attn_mask=sees_SA)[0]
