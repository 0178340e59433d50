"""The gate in plain torch: the specification, the path for any device and dtype, the tests' oracle.

Autograd differentiates it, in float64 too. Shape suffixes: T tokens, E experts, K experts per token (top-k).
"""

from torch import Tensor


def topk_gate(
    logits_TE: Tensor, top_k: int, bias_E: Tensor | None = None, given_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts per token and weigh them by a softmax over the chosen logits.

    That equals a softmax over all experts, renormalised over the chosen. Ties go to the lower expert index. `bias_E`
    is added to the softmax scores for choosing only, never to the weights (Wang et al. 2024, arXiv:2408.15664).
    `given_TK` is the choice already made; what is left are its weights.

    Returns:
        weights_TK in the dtype of the logits, each row summing to 1, and ids_TK int64, in falling order of score.
    """
    if given_TK is not None:
        return logits_TE.gather(1, given_TK).softmax(-1), given_TK
    scores_TE = logits_TE if bias_E is None else logits_TE.softmax(-1) + bias_E
    # A stable sort, because topk leaves the order of ties open and so differs between devices.
    scores_TE, ids_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    ids_TK = ids_TE[:, :top_k].contiguous()
    chosen_TK = scores_TE[:, :top_k] if bias_E is None else logits_TE.gather(1, ids_TK)
    return chosen_TK.softmax(-1), ids_TK
