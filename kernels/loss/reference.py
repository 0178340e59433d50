"""Output layer and cross-entropy in plain torch: the specification and the tests' oracle.

Autograd differentiates it, in float64 too. Shape suffixes: T tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.loss import IGNORE_INDEX


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over the tokens of -log softmax(x @ w.T)[target]; targets of -100 count nothing."""
    logits_TV = F.linear(x_TD, w_VD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE_INDEX, reduction="sum")
