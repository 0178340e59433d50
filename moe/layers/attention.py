"""Rotary position embedding and its scaling to 32k, multi-query attention, and who sees whom: documents, padding.

Shape suffixes: B batch, S sequence, P positions in the cache, D model width, H query heads, N key/value heads,
C head width.
"""

import math
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.config import AttentionConfig, RopeConfig
from moe.kernels.arguments import can_read, has_values, transformed
from moe.layers.plain import Linear, at_least_fp32, cast

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

# How queries [B, S, H, C] see the new keys and values [B, S, N, C], and what else there is -> [B, S, H, C]. The one
# seam of attention: whoever knows a cache, documents, a mask, pages or a ring of ranks brings a function of its own.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
    """Each position sees itself and those before it."""
    return attention_of(q_BSHC, k_BSNC, v_BSNC, is_causal=True)


def attention_of(q_BSHC: Tensor, k_BPNC: Tensor, v_BPNC: Tensor, **which: Any) -> Tensor:
    """Scaled dot-product attention of S queries to P keys -> [B, S, H, C]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BPNC, v_BPNC))
    if transformed():  # torch's fused kernels have neither forward-mode nor second derivatives
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **which).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **which).transpose(1, 2)


class Attention(nn.Module):
    """Attention in which H query heads share N key/value heads: N = 1 is multi-query (Shazeer 2019)."""

    def __init__(self, d_model: int, cfg: AttentionConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.wq = Linear(d_model, cfg.n_heads * cfg.head_dim)
        self.wk = Linear(d_model, cfg.n_kv_heads * cfg.head_dim)
        self.wv = Linear(d_model, cfg.n_kv_heads * cfg.head_dim)
        self.wo = Linear(cfg.n_heads * cfg.head_dim, d_model)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend = causal) -> Tensor:
        """x_BSD -> [B, S, D]. `rope`: of its positions, for `rotate`; `attend`: who sees whom."""
        # Not the number of heads: under tensor parallelism a rank holds some of them.
        q, k, v = (
            rearrange(project(x_BSD), "b s (h c) -> b s h c", c=self.head_dim)
            for project in (self.wq, self.wk, self.wv)
        )
        y_BSHC = attend(rotate(q, *rope), rotate(k, *rope), v)
        return self.wo(rearrange(y_BSHC, "b s h c -> b s (h c)"))


# -------------------------------------------------------------------------------------------------------- documents


def within_documents(documents_BS: Tensor) -> Attend:
    """Each position sees itself and those before it in its document; runs of equal integers are documents.

    Memory is linear in S: documents are taken one after the other. Reads the integers: best kept on the CPU.
    """
    runs = document_runs(documents_BS)

    def attend(q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
        pieces, sizes = [], [n * length for n, length in runs]
        in_turn = (x.flatten(0, 1).split(sizes) for x in (q_BSHC, k_BSNC, v_BSNC))
        for (n, length), *parts in zip(runs, *in_turn, strict=True):
            equal = (part.unflatten(0, (n, length)) for part in parts)
            pieces.append(attention_of(*equal, is_causal=True).flatten(0, 1))
        return torch.cat(pieces).unflatten(0, q_BSHC.shape[:2])

    return attend


def document_runs(documents_BS: Tensor) -> list[tuple[int, int]]:
    """The documents of a batch, one after the other: (n, length) for n of them that are equally long."""
    starts = [*_first(documents_BS).flatten().nonzero().flatten().tolist(), documents_BS.numel()]
    lengths = (end - start for start, end in pairwise(starts))
    return [(sum(1 for _ in equal), length) for length, equal in groupby(lengths)]


def within_documents_by_mask(documents_BS: Tensor) -> Attend:
    """As `within_documents`, but memory quadratic in S, and one graph for torch.compile however they divide a batch."""
    run_BS = _first(documents_BS).cumsum(1)
    sees_B1SS = (run_BS.unsqueeze(2) == run_BS.unsqueeze(1)).tril_().unsqueeze(1)

    def attend(q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
        return attention_of(q_BSHC, k_BSNC, v_BSNC, attn_mask=sees_B1SS)

    return attend


def attend_within(documents_BS: Tensor | None, device: torch.device) -> Attend:
    """Causal attention, inside documents where there are any; their integers are read where they have values."""
    if documents_BS is None:
        return causal
    if has_values(documents_BS):
        return within_documents(documents_BS)
    return within_documents_by_mask(documents_BS.to(device))


def _first(documents_BS: Tensor) -> Tensor:
    """Whether each position is the first of its document."""
    first_S = torch.arange(documents_BS.shape[1], device=documents_BS.device) == 0
    return (documents_BS != documents_BS.roll(1, 1)) | first_S


# ---------------------------------------------------------------------------------------------------------- padding


class TextFirst:
    """The positions of a batch with each sequence's text at the front, in order, and its padding behind.

    There causal attention already ignores the padding, positions count text alone, and memory stays linear in S,
    wherever the padding was.
    """

    def __init__(self, text_BS: Tensor, device: torch.device) -> None:
        self._order_BS = text_BS.to(device).logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        self._place_BS = self._order_BS.argsort(1)

    def front(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] with text at the front."""
        return _taken(x_BS, self._order_BS)

    def back(self, x_BS: Tensor) -> Tensor:
        """Undoes `front`."""
        return _taken(x_BS, self._place_BS)

    def rope(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rotations [S, 1, C] or [B, S, 1, C] of the positions at the front, each where its token is."""
        cos, sin = (self.back(t.expand(self._place_BS.shape[0], *t.shape[-3:])) for t in tables)
        return cos, sin

    def attend(self, attend: Attend) -> Attend:
        """`attend` as it sees text at the front."""
        return lambda q, k, v: self.back(attend(self.front(q), self.front(k), self.front(v)))


def _taken(x_BS: Tensor, places_BS: Tensor) -> Tensor:
    return x_BS.gather(1, places_BS.view(*places_BS.shape, *[1] * (x_BS.ndim - 2)).expand(x_BS.shape))


def text_of(mask_BS: Tensor, shape: torch.Size) -> Tensor:
    """A mask as bool [B, S]: True at text.

    Raises:
        ValueError: no tensor, of another shape, or floating point, such as one that is added to scores.
    """
    if not isinstance(mask_BS, Tensor):
        raise ValueError(f"mask of type {type(mask_BS).__name__}: must be a tensor, bool or of integers")
    if mask_BS.shape != shape:
        raise ValueError(f"mask {list(mask_BS.shape)} must have the shape of the tokens {list(shape)}")
    if mask_BS.is_floating_point():
        raise ValueError(f"mask of {mask_BS.dtype}: must be bool, or integers with 0 where there is no text")
    return mask_BS.bool()


def text_first(text_BS: Tensor, device: torch.device) -> TextFirst | None:
    """For tensors on `device`; None where text is at the front already, which is seen in a mask on the CPU."""
    if can_read(text_BS) and not (text_BS[:, 1:] & ~text_BS[:, :-1]).any():
        return None
    return TextFirst(text_BS, device)
