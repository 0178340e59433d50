"""The top-k gate in Triton: one launch forward, one backward. No sort, no atomics, no host sync.

Shape suffixes as in reference.py; P experts rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launcher import cdiv, power_of_2, remembered


def block_tokens(n_experts: int) -> int:
    """How many tokens one program takes: their one-hot matrix must fit its registers."""
    return max(16, min(128, 4096 // power_of_2(n_experts)))


@remembered
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["given"], debug=True)
def _gate_kernel(
    logits, bias, given, weights, ids, T, stride_t,
    E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, GIVEN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Choose K experts per token, and weigh them by a softmax over the chosen.

    GIVEN: the choice is made already, and the rest is the same; that it is one is asserted.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, P)
    inside = (t < T)[:, None] & (e < E)[None, :]
    x = tl.load(logits + t[:, None].to(tl.int64) * stride_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
    slot = tl.full((BT, P), K, tl.int32)
    if GIVEN:
        for j in tl.static_range(K):
            i = tl.load(given + t.to(tl.int64) * K + j, mask=t < T, other=0)
            slot = tl.where(e[None, :] == i[:, None], j, slot)
        n_taken = tl.sum((slot < K).to(tl.int32), axis=1)
        tl.device_assert((n_taken == K) | (t >= T), "given_TK: an id outside [0, E), or twice in one row")
    else:
        score = tl.where(inside, x, -float("inf"))
        if HAS_BIAS:
            top = tl.max(tl.where(e[None, :] < E, x, -float("inf")), axis=1)
            p = tl.where(e[None, :] < E, tl.exp(x - top[:, None]), 0.0)
            added = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
            score = tl.where(inside, p / tl.sum(p, axis=1)[:, None] + added[None, :], -float("inf"))
        # An expert masked with -inf may still be needed to fill K; only what is taken already is out. NaN is largest.
        score = tl.where(score == score, tl.minimum(tl.maximum(score, -3.0e38), 3.4e38), float("inf"))
        score = tl.where(e[None, :] < E, score, -float("inf"))
        for j in tl.static_range(K):
            best = tl.argmax(score, axis=1, tie_break_left=True)
            hot = e[None, :] == tl.minimum(best, E - 1)[:, None]
            slot = tl.where(hot, j, slot)
            score = tl.where(hot, -float("inf"), score)
    taken = slot < K
    chosen = tl.where(taken, x, -float("inf"))
    p = tl.where(taken, tl.exp(x - tl.max(chosen, axis=1)[:, None]), 0.0)
    w = p / tl.sum(p, axis=1)[:, None]
    at = t[:, None].to(tl.int64) * K + slot
    keep = taken & inside
    tl.store(weights + at, w, mask=keep)
    tl.store(ids + at, tl.broadcast_to(e[None, :], (BT, P)).to(tl.int64), mask=keep)


@remembered
@triton.jit(do_not_specialize=["T"])
def _gate_backward_kernel(
    dweights, weights, ids, dlogits, T, E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):
    """dlogits = w (dw - <w, dw>) at the chosen experts, 0 elsewhere."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    live = t < T
    e = tl.arange(0, P)
    first = t.to(tl.int64) * K
    dot = tl.zeros((BT,), tl.float32)
    for j in tl.static_range(K):
        dot += tl.load(weights + first + j, mask=live, other=0.0) * tl.load(dweights + first + j, mask=live, other=0.0)
    out = tl.zeros((BT, P), tl.float32)
    for j in tl.static_range(K):
        w = tl.load(weights + first + j, mask=live, other=0.0)
        dw = tl.load(dweights + first + j, mask=live, other=0.0)
        i = tl.load(ids + first + j, mask=live, other=0)
        out += tl.where(e[None, :] == i[:, None], (w * (dw - dot))[:, None], 0.0)
    at = t[:, None].to(tl.int64) * E + e[None, :]
    tl.store(dlogits + at, out.to(dlogits.dtype.element_ty), mask=live[:, None] & (e < E)[None, :])


def gate(
    logits_TE: Tensor, top_k: int, bias_E: Tensor | None = None, given_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As reference.topk_gate, in one launch -> weights_TK float32, ids_TK int64."""
    T, E = logits_TE.shape
    P, BT = power_of_2(E), block_tokens(E)
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    bias_E, given_TK = (None if t is None else t.contiguous() for t in (bias_E, given_TK))
    weights_TK = logits_TE.new_empty(T, top_k, dtype=torch.float32)
    ids_TK = logits_TE.new_empty(T, top_k, dtype=torch.int64)
    if T:
        _gate_kernel[(cdiv(T, BT),)](
            logits_TE, bias_E, given_TK, weights_TK, ids_TK, T,
            logits_TE.stride(0), E=E, P=P, K=top_k, HAS_BIAS=bias_E is not None, GIVEN=given_TK is not None, BT=BT,
            sanitize_overflow=False,
        )  # fmt: skip
    return weights_TK, ids_TK


def gate_backward(dweights_TK: Tensor, weights_TK: Tensor, ids_TK: Tensor, n_experts: int) -> Tensor:
    """The gradient of the logits, float32 [T, E]; choosing has none."""
    T, K = ids_TK.shape
    dlogits_TE = weights_TK.new_empty(T, n_experts)
    if T:
        BT = block_tokens(n_experts)
        _gate_backward_kernel[(cdiv(T, BT),)](
            dweights_TK.contiguous(), weights_TK, ids_TK, dlogits_TE, T,
            E=n_experts, P=power_of_2(n_experts), K=K, BT=BT,
        )  # fmt: skip
    return dlogits_TE
