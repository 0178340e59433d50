"""Output layer and cross-entropy in one pass over chunks of tokens; the [T, V] logits never exist at once.

Shape suffixes as in reference.py; C tokens of one chunk.
"""

import torch
from torch import Tensor

from moe.kernels.loss import CHUNK_ELEMENTS, IGNORE_INDEX


def linear_cross_entropy(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log softmax(x @ w.T)[target] in at least float32, and its gradients (empty unless wanted).

    x may be narrower than w (bfloat16 under autocast): the products then run in x's dtype. The softmax and the sum of
    w's gradient are at least float32.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    w = w_VD.to(x_TD.dtype)
    total = x_TD.new_zeros((), dtype=wide)
    dx_TD = torch.empty_like(x_TD) if want_grad else x_TD.new_empty(0)
    chunk = max(1, CHUNK_ELEMENTS // len(w_VD))
    n_chunks = -(-len(x_TD) // chunk)
    dw_VD = accumulator(w_VD, x_TD.dtype, n_chunks) if want_grad else w_VD.new_empty(0)
    for start in range(0, len(x_TD), chunk):
        rows = slice(start, start + chunk)
        x_CD, targets_C = x_TD[rows], targets_T[rows]
        valid_C = targets_C != IGNORE_INDEX
        # A target outside the vocabulary, which the op lets come here where looking would wait, makes the sum NaN.
        known_C = (targets_C >= 0) & (targets_C < len(w))
        targets_C1 = torch.where(known_C, targets_C, 0).unsqueeze(1)
        logp_CV = torch.log_softmax((x_CD @ w.t()).to(wide), dim=1)
        logp_C = torch.where(known_C, logp_CV.gather(1, targets_C1).squeeze(1), float("nan"))
        total -= torch.where(valid_C, logp_C, 0.0).sum()
        if want_grad:
            # d total / d logits = softmax - one_hot(target), and nothing where the target is ignored; leaving those
            # tokens out of the two small products saves a pass over the logits.
            dlogits_CV = logp_CV.exp_().scatter_add_(1, targets_C1, logp_CV.new_full(targets_C1.shape, -1.0))
            dlogits_CV = dlogits_CV.to(x_CD.dtype)
            kept_C1 = valid_C.to(x_CD.dtype).unsqueeze(1)
            torch.mm(dlogits_CV, w, out=dx_TD[rows]).mul_(kept_C1)
            accumulate(dw_VD, dlogits_CV, x_CD * kept_C1)
    return total, dx_TD, dw_VD.to(w_VD.dtype)


def accumulator(w_VD: Tensor, dtype: torch.dtype, n_chunks: int) -> Tensor:
    """Zeros to sum the gradient of w in: at least float32, but for one chunk of w's own dtype, rounded once anyway."""
    narrow = n_chunks <= 1 and w_VD.dtype == dtype
    wide = torch.promote_types(w_VD.dtype, torch.float32)
    return w_VD.new_zeros(w_VD.shape, dtype=dtype if narrow else wide)


def accumulate(dw_VD: Tensor, dlogits_CV: Tensor, x_CD: Tensor) -> None:
    """Add a chunk's share to the gradient of w."""
    if dw_VD.dtype == x_CD.dtype:
        dw_VD.addmm_(dlogits_CV.t(), x_CD)
    elif x_CD.is_cuda and torch.version.hip is None and dw_VD.dtype == torch.float32:
        # cuBLAS adds a product of narrow matrices to a wide one as it writes it.
        torch.addmm(dw_VD, dlogits_CV.t(), x_CD, out_dtype=torch.float32, out=dw_VD)
    else:
        dw_VD += dlogits_CV.t() @ x_CD
