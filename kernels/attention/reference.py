"""Attention over a paged cache in plain torch: the specification, the path for any device and dtype, the tests' oracle.

Shape suffixes: R rows of queries, Q requests, H query heads, N key/value heads, C head width, P slots of the cache,
B blocks of a request's table, S rows of one request, A its positions.
"""

from itertools import pairwise

import torch
from torch import Tensor


def paged_attention(
    q_RHC: Tensor,
    k_PNC: Tensor,
    v_PNC: Tensor,
    blocks_QB: Tensor,
    starts: Tensor,
    lengths_Q: Tensor,
    block_size: int,
    k_scale_PN: Tensor | None = None,
    v_scale_PN: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, request after request, in at least float32; as `ops.paged_attention`."""
    wide = torch.promote_types(q_RHC.dtype, torch.float32)
    y_RHC = torch.empty_like(q_RHC)
    offsets = torch.arange(block_size, device=q_RHC.device)
    bounds = starts.tolist()
    for (low, high), length, blocks_B in zip(pairwise(bounds), lengths_Q.tolist(), blocks_QB, strict=True):
        n_blocks = -(-length // block_size)
        slots_A = (blocks_B[:n_blocks].long().unsqueeze(1) * block_size + offsets).flatten()[:length]
        k_ANC, v_ANC = _gather(k_PNC, k_scale_PN, slots_A, wide), _gather(v_PNC, v_scale_PN, slots_A, wide)
        q_SNMC = q_RHC[low:high].to(wide).unflatten(1, (k_ANC.shape[1], -1))
        scores_NMSA = torch.einsum("snmc,anc->nmsa", q_SNMC, k_ANC) / q_RHC.shape[2] ** 0.5
        S = high - low
        sees_SA = torch.ones(S, length, dtype=torch.bool, device=q_RHC.device).tril(length - S)
        p_NMSA = scores_NMSA.masked_fill(~sees_SA, -torch.inf).softmax(-1)
        y_RHC[low:high] = torch.einsum("nmsa,anc->snmc", p_NMSA, v_ANC).flatten(1, 2).to(y_RHC.dtype)
    return y_RHC


def _gather(x_PNC: Tensor, scale_PN: Tensor | None, slots_A: Tensor, dtype: torch.dtype) -> Tensor:
    x_ANC = x_PNC[slots_A].to(dtype)
    return x_ANC if scale_PN is None else x_ANC * scale_PN[slots_A].to(dtype).unsqueeze(-1)
