"""Output layer and cross-entropy on a GPU: cuBLAS products over chunks of tokens, one Triton kernel between them.

The loss and all gradients are 6 TDV FLOP: 2 for the logits, 2 each for the gradients of x and w. Two designs reach
that without [T, V] logits. Products fused with an online log-sum-exp (cut cross-entropy) never write a logit, but must
compute every logit again to make its gradient: 8 TDV, and 10 if the sums over tokens and over the vocabulary are to
have a fixed order, which needs two passes. Chunks, as here, stay at 6 and pay with memory traffic: a logit is written
by its product, then read and overwritten by the kernel with its gradient. In bfloat16 the kernel's part is 4 bytes a
logit beside 6 D FLOP: against the products' time, at 3.35 TB/s and 700 TFLOP/s (H100), 1% at width 10,752 and 18% at
768, where computing the logits again would cost 33% at any width. And the products are those of cuBLAS.

A chunk is as large as its products need, not as small as it could be. The gradient of w is read and written in float32
once a chunk: 8 DV bytes beside its 2 CDV FLOP, a fifth of that product's time at C = 4096, all of it near 850. And the
gradient of x is a [C, D] product over V: at width 768 and tiles of 128 x 256, C = 4096 makes 96 tiles for 132
multiprocessors; a chunk that is no larger than x (C = T D / V) would leave most of them idle.

Nothing waits for the device, and sums have a fixed order: the same bits in every run. Shape suffixes as in
cross_entropy.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launcher import cdiv, power_of_2, remembered
from moe.kernels.loss import IGNORE_INDEX
from moe.kernels.loss.chunked import accumulate, accumulator

CHUNK_TOKENS = 4096
# A row of up to so many logits is kept in the registers of one program, and read from memory once.
_REGISTER_ROW = 16_384
_IGNORE = tl.constexpr(IGNORE_INDEX)


@remembered
@triton.jit
def loss_kernel(logits, targets, losses, V, stride, WANT_GRAD: tl.constexpr, ONE_BLOCK: tl.constexpr, BV: tl.constexpr):
    """The loss of one token; with WANT_GRAD its logits become their gradient, softmax - one_hot(target), in place.

    ONE_BLOCK: BV covers the row. Else it is read twice, the second time from the L2 cache: programs are large, so that
    few rows are under way, and go back over what they have read last. `stride` >= V: what lies between is padding, read
    and written so that no access is partial.
    """
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * stride
    target = tl.load(targets + t)
    v = tl.arange(0, BV)
    if target == _IGNORE:
        tl.store(losses + t, 0.0)
        if WANT_GRAD:
            for start in range(0, V, BV):
                zeros = tl.zeros((BV,), dtype=logits.dtype.element_ty)
                tl.store(row + start + v, zeros, mask=start + v < stride)
        return
    # A target that is no id of the vocabulary cannot be an error here, without waiting for the device: the loss is NaN.
    known = (target >= 0) & (target < V)
    logit = tl.load(row + target, mask=known, other=0.0).to(tl.float32)
    logit = tl.where(known, logit, float("nan"))
    hit = target.to(tl.int32)
    if ONE_BLOCK:
        x = tl.load(row + v, mask=v < stride, other=0.0).to(tl.float32)
        x = tl.where(v < V, x, -float("inf"))
        top = tl.max(x, axis=0)
        p = tl.exp(x - top)
        total = tl.sum(p, axis=0)
        if WANT_GRAD:
            p = p * (1 / total) - (v == hit).to(tl.float32)
            tl.store(row + v, p.to(logits.dtype.element_ty), mask=v < stride)
    else:
        top = tl.full((), -3.0e38, tl.float32)
        sums = tl.zeros((BV,), dtype=tl.float32)
        for start in range(0, V, BV):
            x = tl.load(row + start + v, mask=start + v < stride, other=0.0).to(tl.float32)
            x = tl.where(start + v < V, x, -float("inf"))
            higher = tl.maximum(top, tl.max(x, axis=0))
            sums = sums * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        total = tl.sum(sums, axis=0)
        if WANT_GRAD:
            scale = 1 / total
            last = tl.cdiv(V, BV) * BV - BV
            for back in range(0, V, BV):
                start = last - back
                x = tl.load(row + start + v, mask=start + v < stride, other=0.0).to(tl.float32)
                x = tl.where(start + v < V, x, -float("inf"))
                p = tl.exp(x - top) * scale - (start + v == hit).to(tl.float32)
                tl.store(row + start + v, p.to(logits.dtype.element_ty), mask=start + v < stride)
    # The difference first: where the target is likely it is exact, and the logarithm small.
    tl.store(losses + t, (top - logit) + tl.log(total))


def linear_cross_entropy(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As cross_entropy.linear_cross_entropy; a target that is neither -100 nor in [0, V) makes the sum NaN.

    Logits, and their gradients, are held in the dtype of x for CHUNK_TOKENS tokens; the gradient of w is summed in
    float32 and rounded once.
    """
    T, V = len(x_TD), len(w_VD)
    w = w_VD.to(x_TD.dtype)
    targets_T = targets_T.contiguous()
    losses_T = x_TD.new_empty(T, dtype=torch.float32)
    dx_TD = torch.empty_like(x_TD) if want_grad else x_TD.new_empty(0)
    chunk = chunk_tokens(T)
    dw_VD = accumulator(w_VD, x_TD.dtype, n_chunks=cdiv(T, chunk)) if want_grad else w_VD.new_empty(0)
    # Rows begin at multiples of 16 elements, as tensor cores and wide loads want them, whatever the vocabulary.
    buffer = x_TD.new_empty(chunk, cdiv(V, 16) * 16)
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        x_CD = x_TD[rows]
        logits_CV = buffer[: len(x_CD), :V]
        torch.mm(x_CD, w.t(), out=logits_CV)
        losses_and_dlogits(logits_CV, targets_T[rows], losses_T[rows], want_grad)
        if want_grad:
            torch.mm(logits_CV, w, out=dx_TD[rows])
            accumulate(dw_VD, logits_CV, x_CD)
    return losses_T.sum(), dx_TD, dw_VD.to(w_VD.dtype)


def losses_and_dlogits(logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor, want_grad: bool) -> None:
    """Fill `losses_C`; with `want_grad`, put the gradients of the logits in their place. Rows may be apart."""
    C, V = logits_CV.shape
    one_block = V <= _REGISTER_ROW
    BV, warps = block_and_warps(V)
    loss_kernel[(C,)](
        logits_CV, targets_C, losses_C, V, logits_CV.stride(0),
        WANT_GRAD=want_grad, ONE_BLOCK=one_block, BV=BV, num_warps=warps,
    )  # fmt: skip


def block_and_warps(V: int) -> tuple[int, int]:
    """Logits that a program holds at a time, and its warps: 32 logits a thread, 16 of a row that is read twice.

    On A100 and H100 that makes two rows of more than 8,192 logits a multiprocessor, and nothing spills (ahead.py).
    """
    if V > _REGISTER_ROW:
        return 8192, 16
    BV = max(128, power_of_2(V))
    return BV, max(1, BV // 1024)


def chunk_tokens(T: int) -> int:
    """Tokens of a chunk: equal shares of T, none larger than CHUNK_TOKENS, in multiples of a tile's 128 rows."""
    n_chunks = max(1, cdiv(T, CHUNK_TOKENS))
    share = cdiv(T, n_chunks)
    return max(1, share if n_chunks == 1 else min(CHUNK_TOKENS, cdiv(share, 128) * 128))
