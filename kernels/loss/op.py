"""Output layer and cross-entropy as one torch op: fake, autograd, and the choice of an implementation.

Shape suffixes as in reference.py.
"""

import torch
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.loss import chunked


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, impl: str | None = None) -> Tensor:
    """Sum over the tokens of -log softmax(x @ w.T)[target], without ever holding [T, V] logits.

    A chunk of tokens at a time; where a gradient is wanted it is computed in the same pass, while the chunk's logits
    exist, so the backward only scales it.

    Args:
        x_TD: [T, D] floating point. w_VD: [V, D]. targets_T: [T] int64; -100 counts nothing.
        impl: "torch" (any device and dtype), "triton" (CUDA: bfloat16, float16, float32; on CPU in Triton's
            interpreter), or None for the faster one that is eligible.

    Returns:
        The sum, a scalar of at least float32. A target outside the vocabulary is an error on a CPU, and makes the sum
        NaN in Triton.

    Raises:
        ValueError: shapes, dtypes or `impl` that do not fit; the message says which and why.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
    if x_TD.ndim != 2 or w_VD.ndim != 2 or x_TD.shape[1] != w_VD.shape[1] or targets_T.shape != x_TD.shape[:1]:
        raise ValueError(
            "linear_cross_entropy wants x [T, D], w [V, D] and targets [T]; got "
            f"{', '.join(str(list(t.shape)) for t in (x_TD, w_VD, targets_T))}"
        )
    if targets_T.dtype != torch.int64:
        raise ValueError(f"targets must be int64; got {targets_T.dtype}")
    if impl not in (None, "torch", "triton"):
        raise ValueError(f'impl = {impl!r}: must be "torch" or "triton", or None for the faster')
    reason = tiles.why_not_triton(x_TD)
    if impl == "triton" and reason:
        raise ValueError(f'impl = "triton": {reason}; use "torch"')
    if impl is None:
        impl = "triton" if reason is None and x_TD.device.type != "cpu" else "torch"
    want_grad = torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad)
    return _linear_cross_entropy(x_TD, w_VD, targets_T, want_grad, impl)[0]


@torch.library.custom_op("gpt4_moe::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, want_grad: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "torch":
        return chunked.linear_cross_entropy(x, w, targets, want_grad)
    from moe.kernels.loss import triton_chunked

    return triton_chunked.linear_cross_entropy(x, w, targets, want_grad)


@_linear_cross_entropy.register_fake
def _(x, w, targets, want_grad, impl):
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    if not want_grad:
        return total, x.new_empty(0), w.new_empty(0)
    return total, torch.empty_like(x), w.new_empty(w.shape)


def _linear_cross_entropy_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _linear_cross_entropy_autograd(ctx, dtotal: Tensor | None, *_unused: None):
    if dtotal is None:
        return (None,) * 5
    dx, dw = ctx.saved_tensors
    return (dx * dtotal).to(dx.dtype), (dw * dtotal).to(dw.dtype), None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_autograd, setup_context=_linear_cross_entropy_setup)
