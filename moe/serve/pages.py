"""Keys and values in blocks, and one pass over a flat batch: tokens of many requests, one after the other.

A `Pass` is a cache as `moe.layers.KVCache` is one: it brings the rotations and the attention of its tokens, so the
model's own modules run it as a batch of one sequence.

Shape suffixes: T tokens of the pass, P slots of the cache, Q requests, S tokens and A = all positions of one request, B
blocks of one request, H query heads, N key/value heads, G = H/N, C head width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Config
from moe.errors import ConfigError
from moe.kernels.quantization import quantize
from moe.layers import Attend, LayerCache, cast, rope_tables
from moe.layers.attention import attention_of
from moe.serve.tables import Tables, on_device

# What keys and values can be kept in; "auto" is the model's own dtype.
KV_CACHE_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
# Requests of up to so many tokens of a pass, and positions of the cache, attend together, padded: then starting
# operations takes longer than computing. Longer ones attend one by one.
TOGETHER_TOKENS, TOGETHER_POSITIONS = 16, 1024


class Pages:
    """The keys and values of all layers: `n_blocks` blocks, and one more for what nobody reads.

    Args:
        dtype: the model's.
        kv_cache_dtype: one of `KV_CACHE_DTYPES`. "int8" and "fp8" (e4m3) keep a float32 scale for each head of each
            position, of keys and of values.

    Attributes:
        layers: the keys and values [P, N, C] of each layer.
        scales: theirs [P, N], in eight bits; else None.

    Raises:
        ConfigError: another `kv_cache_dtype`.
    """

    def __init__(
        self,
        cfg: Config,
        n_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_cache_dtype: str = "auto",
    ) -> None:
        a, slots = cfg.attention, (n_blocks + 1) * block_size
        self.block_size, self.n_blocks, self.device = block_size, n_blocks, torch.device(device)
        self.dtype = _kept_in(dtype, kv_cache_dtype)

        def layers(shape: tuple[int, ...], dtype: torch.dtype) -> list[LayerCache]:
            both = ((torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)) for _ in range(cfg.n_layers))
            return [LayerCache(*pair) for pair in both]

        self.layers = layers((slots, a.n_kv_heads, a.head_dim), self.dtype)
        self.scales = layers((slots, a.n_kv_heads), torch.float32) if self.dtype.itemsize == 1 else None
        self.rope = rope_tables(0, cfg.max_seq_len, a.head_dim, a.rope, dtype, self.device)
        # Whether requests of few tokens attend in one call of `ops.paged_attention`.
        self.paged = self.device.type == "cuda"

    @staticmethod
    def block_bytes(cfg: Config, block_size: int, dtype: torch.dtype, kv_cache_dtype: str = "auto") -> int:
        """Memory of one block, of all layers. Raises as `Pages` does."""
        kept = _kept_in(dtype, kv_cache_dtype).itemsize
        vector = cfg.attention.head_dim * kept + (4 if kept == 1 else 0)
        return 2 * cfg.n_layers * block_size * cfg.attention.n_kv_heads * vector

    def of(self, layer: int) -> tuple[LayerCache, LayerCache | None, int]:
        """One layer's keys and values, their scales, and the size of a block."""
        return self.layers[layer], None if self.scales is None else self.scales[layer], self.block_size

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zeros, where numbers were none: a position that is masked is multiplied by 0, and a NaN stays one."""
        for pair in (*self.layers, *(self.scales or ())):
            for kept in pair:
                raw = kept.view(torch.int8) if kept.itemsize == 1 else kept
                raw.view(-1, self.block_size, *kept.shape[1:])[list(blocks)] = 0

    def store(self, layer: int, slots: Tensor | slice, k_TNC: Tensor, v_TNC: Tensor) -> None:
        """Put a pass's keys and values into their slots."""
        for i, (x_TNC, kept_PNC) in enumerate(zip((k_TNC, v_TNC), self.layers[layer], strict=True)):
            if self.scales is None:
                _put(kept_PNC, slots, x_TNC)
                continue
            data_TNC, scale_TN = quantize(x_TNC, self.dtype)
            _put(self.scales[layer][i], slots, scale_TN)
            # As bytes: torch moves those of every kind.
            _put(kept_PNC.view(torch.int8), slots, data_TNC.view(torch.int8))

    def load(self, layer: int, blocks: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values of these blocks, [n * block_size, N, C] each, in `dtype`; of a slice, if they are kept in
        that dtype, where they are."""
        found = []
        for i, kept_PNC in enumerate(self.layers[layer]):
            if self.scales is None:
                found.append(cast(self._blocks(kept_PNC, blocks), dtype))
                continue
            x_ANC = self._blocks(kept_PNC.view(torch.int8), blocks).view(self.dtype).to(dtype)
            found.append(x_ANC.mul_(self._blocks(self.scales[layer][i], blocks).to(dtype).unsqueeze(2)))
        return found[0], found[1]

    def _blocks(self, x_P: Tensor, blocks: Tensor | slice) -> Tensor:
        size = self.block_size
        if isinstance(blocks, slice):
            return x_P[blocks.start * size : blocks.stop * size]
        in_blocks = x_P.view(len(x_P) // size, -1)
        return in_blocks.index_select(0, blocks).view(-1, *x_P.shape[1:])


def _put(kept_P: Tensor, slots: Tensor | slice, x_T: Tensor) -> None:
    if isinstance(slots, slice):
        kept_P[slots] = x_T
    else:
        kept_P.index_copy_(0, slots, cast(x_T, kept_P.dtype))


def _kept_in(dtype: torch.dtype, kv_cache_dtype: str) -> torch.dtype:
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        names = ", ".join(map(repr, KV_CACHE_DTYPES))
        raise ConfigError(f"kv_cache_dtype = {kv_cache_dtype!r}: must be one of {names}")
    return KV_CACHE_DTYPES[kv_cache_dtype] or dtype


class Segment(NamedTuple):
    """One request's tokens of a pass: positions [start, start + n), in these blocks."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.token_ids)


class _Group:
    """Requests whose tokens, S each, attend together: rows [low, low + Q * S) of the pass.

    Attributes:
        length: positions that are read of each, the longest request's, to the end of its last block.
        blocks: of all, equally many of each; a slice of the cache where they follow each other.
    """

    def __init__(self, pages: Pages, low: int, segments: Sequence[Segment]) -> None:
        size, unread = pages.block_size, pages.n_blocks
        self.low, self.n, self.S = low, len(segments), len(segments[0].token_ids)
        self.ends = [s.end for s in segments]
        used = [s.blocks[: -(-s.end // size)] for s in segments]
        most = max(map(len, used))
        first = used[0][0]
        self.blocks: Tensor | slice
        if self.n == 1 and all(b == first + i for i, b in enumerate(used[0])):
            self.blocks = slice(first, first + most)
        else:
            padded = [b for blocks in used for b in (*blocks, *[unread] * (most - len(blocks)))]
            self.blocks = on_device(pages.device, padded)
        # Of one request what lies behind its last position is cut off, of several it is masked.
        self.length = self.ends[0] if self.n == 1 else most * size
        self.masks: dict[torch.dtype, Tensor | None] = {}

    def mask(self, dtype: torch.dtype, device: torch.device, group_size: int) -> Tensor | None:
        """What is added to the scores, [Q, 1, S * G, A] (or one row for all, where S = 1)."""
        if dtype not in self.masks:
            self.masks[dtype] = self._mask(group_size).to(device, dtype) if self.n * self.S > 1 else None
        return self.masks[dtype]

    def _mask(self, group_size: int) -> Tensor:
        last_QS1 = torch.tensor(self.ends)[:, None, None] - self.S + torch.arange(self.S)[:, None]
        hidden_QSA = torch.arange(self.length) > last_QS1
        mask_QSA = torch.zeros(hidden_QSA.shape).masked_fill_(hidden_QSA, -torch.inf)
        return (mask_QSA if self.S == 1 else mask_QSA.repeat_interleave(group_size, 1)).unsqueeze(1)


class _Paged:
    """Requests of any numbers of tokens that attend in one call of the kernel: rows [low, high) of the pass."""

    def __init__(self, pages: Pages, low: int, segments: Sequence[Segment]) -> None:
        counts, ends = [len(s.token_ids) for s in segments], [s.end for s in segments]
        used = [s.blocks[: -(-s.end // pages.block_size)] for s in segments]
        self.low, self.high = low, low + sum(counts)
        self.tables = Tables.of(used, counts, ends, pages.device)


class Pass:
    """The tokens of some requests, on their way through the model once.

    Args:
        all_paged: requests of many tokens attend as those of few do, so that a token's bits do not depend on what else
            is in the pass, or was computed before it; of `Pages` that are paged.
    """

    def __init__(self, pages: Pages, segments: Sequence[Segment], all_paged: bool = False) -> None:
        self._pages, size, self._all_paged = pages, pages.block_size, all_paged
        tokens, positions, slots = [], [], []
        for s in segments:
            tokens += s.token_ids
            positions += range(s.start, s.end)
            slots += [s.blocks[p // size] * size + p % size for p in range(s.start, s.end)]
        self.tokens_T, self._positions_T, slots_T = on_device(pages.device, [tokens, positions, slots])
        first, n = slots[0], len(slots)
        in_one_run = len(segments) == 1 and slots == [*range(first, first + n)]
        self._slots = slice(first, first + n) if in_one_run else slots_T
        self._groups = self._grouped(segments)
        # What KVCache says of itself: one sequence, whose last position is the last of any.
        self.batch, self.length = 1, max(positions) + 1 - len(positions)
        self.max_len = len(pages.rope[0])
        self._rope: tuple[Tensor, Tensor] | None = None

    def _grouped(self, segments: Sequence[Segment]) -> list["_Group | _Paged"]:
        groups: list[list[Segment]] = []
        for s in segments:
            if groups and self._attend_together(groups[-1][0], s):
                groups[-1].append(s)
            else:
                groups.append([s])
        found, low = [], 0
        for group in groups:
            if self._is_paged(group[0]):
                found.append(_Paged(self._pages, low, group))
            else:
                found.append(_Group(self._pages, low, group))
            low += sum(len(s.token_ids) for s in group)
        return found

    def _is_paged(self, s: Segment) -> bool:
        # The kernel's bits do not depend on the batch, those of other libraries for long prompts do.
        return self._pages.paged and (self._all_paged or len(s.token_ids) <= TOGETHER_TOKENS)

    def _attend_together(self, a: Segment, b: Segment) -> bool:
        if self._pages.paged:
            return self._is_paged(a) and self._is_paged(b)
        few = len(a.token_ids) == len(b.token_ids) <= TOGETHER_TOKENS
        return few and max(a.end, b.end) <= TOGETHER_POSITIONS

    def rope(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin, for `rotate`, of each token's position."""
        if self._rope is None:
            cos, sin = (table.index_select(0, self._positions_T) for table in self._pages.rope)
            self._rope = cos, sin
        return self._rope

    def attends(self, n: int) -> list[Attend]:
        """For each layer: stores the tokens' keys and values; each sees its own request's up to itself."""
        return [functools.partial(self._attend, layer) for layer in range(len(self._pages.layers))]

    def advance(self, n: int) -> None:
        """What a request has is the scheduler's to know."""

    def leave_out_padding(self, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The routing as it is: here is no padding."""
        return weights_TK, ids_TK

    def _attend(self, layer: int, q_1THC: Tensor, k_1TNC: Tensor, v_1TNC: Tensor) -> Tensor:
        self._pages.store(layer, self._slots, k_1TNC[0], v_1TNC[0])
        parts = []
        for group in self._groups:
            if isinstance(group, _Paged):
                parts.append(group.tables.attend(q_1THC[0, group.low : group.high], *self._pages.of(layer)))
                continue
            rows = slice(group.low, group.low + group.n * group.S)
            q_THC = q_1THC[0, rows]
            if group.n == 1 and group.length == group.S and self._pages.dtype == k_1TNC.dtype:
                kv_ANC = k_1TNC[0, rows], v_1TNC[0, rows]  # a prompt from its beginning: nothing is to be fetched
            else:
                kv_ANC = self._pages.load(layer, group.blocks, q_THC.dtype)
            parts.append(_together(group, q_THC, *kv_ANC))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


def _together(group: _Group, q_THC: Tensor, k_ANC: Tensor, v_ANC: Tensor) -> Tensor:
    """Attention of a group's tokens. The heads that share a key head, and few tokens, are rows of one query."""
    (T, H, C), N, Q, S = q_THC.shape, k_ANC.shape[1], group.n, group.S
    k_QANC, v_QANC = (x.view(Q, -1, N, C)[:, : group.length] for x in (k_ANC, v_ANC))
    if S > TOGETHER_TOKENS or (group.length == S and Q == 1):
        batch = q_THC.unsqueeze(0), k_QANC, v_QANC
        if group.length == S:
            return attention_of(*batch, is_causal=True)[0]
        sees_SA = torch.ones(S, group.length, dtype=torch.bool, device=q_THC.device).tril(group.length - S)
        return attention_of(*batch, attn_mask=sees_SA)[0]
    q_QNRC = q_THC.view(Q, S, N, H // N, C).transpose(1, 2).reshape(Q, N, S * (H // N), C)
    mask = group.mask(q_THC.dtype, q_THC.device, H // N)
    y_QNRC = F.scaled_dot_product_attention(q_QNRC, k_QANC.transpose(1, 2), v_QANC.transpose(1, 2), attn_mask=mask)
    return y_QNRC.view(Q, N, S, H // N, C).transpose(1, 2).reshape(T, H, C)
