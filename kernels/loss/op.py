"""Output layer and cross-entropy as one torch op: fake, autograd, and the choice of an implementation.

Shape suffixes as in reference.py.
"""

import torch
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.arguments import autocast, check_kinds, no_second_derivative, on_device_of, transformed
from moe.kernels.loss import IGNORE_INDEX, chunked, reference


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, impl: str | None = None) -> Tensor:
    """Sum over the tokens of -log softmax(x @ w.T)[target], without ever holding [T, V] logits.

    A chunk of tokens at a time; where a gradient is wanted it is computed in the same pass, while the chunk's logits
    exist, so the backward only scales it.

    Args:
        x_TD: [T, D] floating point, T may be 0. w_VD: [V, D] floating point, used in the dtype of x. targets_T: [T]
            int64 in [0, V); -100 counts nothing. Strides may be any.
        impl: "torch" (any device and dtype), "triton" (CUDA: bfloat16, float16, float32; on CPU in Triton's
            interpreter), or None for the faster one that is eligible.

    Returns:
        The sum, a scalar of at least float32. A target outside the vocabulary is an error on a CPU, and makes the sum
        NaN elsewhere, where an error would wait for the device, and in Triton, its interpreter included.

    Under torch.func's transforms and forward-mode differentiation the logits are held at once, as in reference.py.

    Raises:
        ValueError: shapes, dtypes, devices or `impl` that do not fit, or, on a CPU, a target outside the vocabulary.
            The message says which and why.
    """
    check_kinds(x=x_TD, w=w_VD, targets=targets_T)
    (x_TD,) = autocast(x_TD.device.type, x_TD)
    if x_TD.ndim != 2 or w_VD.ndim != 2 or x_TD.shape[1] != w_VD.shape[1] or targets_T.shape != x_TD.shape[:1]:
        raise ValueError(
            "linear_cross_entropy wants x [T, D], w [V, D] and targets [T]; got "
            f"{', '.join(str(list(t.shape)) for t in (x_TD, w_VD, targets_T))}"
        )
    if 0 in w_VD.shape:
        raise ValueError(f"w {list(w_VD.shape)}: only the number of tokens may be 0")
    if impl not in (None, "torch", "triton"):
        raise ValueError(f'impl = {impl!r}: must be "torch" or "triton", or None for the faster')
    reason = tiles.why_not_triton(x_TD)
    if impl == "triton" and reason:
        raise ValueError(f'impl = "triton": {reason}; use "torch"')
    if impl is None:
        impl = "triton" if reason is None and x_TD.device.type != "cpu" else "torch"
    if transformed():
        return reference.linear_cross_entropy(x_TD, w_VD.to(x_TD.dtype), checked_targets(targets_T, len(w_VD)))
    want_grad = torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad)
    return _linear_cross_entropy(x_TD, w_VD, targets_T, want_grad, impl)[0]


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.device.type == "cpu":
        outside = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
        if outside.any():
            t = outside.nonzero()[0, -1].item()
            raise ValueError(
                f"target {targets[outside][0]} of token {t} is outside the vocabulary of {vocab_size} ids: the text "
                f"was encoded with another tokenizer; where there is no target, give {IGNORE_INDEX}"
            )


@torch.library.custom_op("gpt4_moe::checked_targets", mutates_args=())
def checked_targets(targets: Tensor, vocab_size: int) -> Tensor:
    """A copy of targets that are -100 or, on a CPU, in [0, V)."""
    _check_targets(targets, vocab_size)
    return targets.clone(memory_format=torch.contiguous_format)


@checked_targets.register_fake
def _(targets, vocab_size):
    return targets.new_empty(targets.shape)


@checked_targets.register_vmap
def _(info, dims, targets, vocab_size):
    return checked_targets(targets.movedim(dims[0], 0), vocab_size), 0


@torch.library.custom_op("gpt4_moe::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, want_grad: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "torch":
        _check_targets(targets, len(w))
        return chunked.linear_cross_entropy(x, w, targets, want_grad)
    from moe.kernels.loss import triton_chunked

    with on_device_of(x):
        return triton_chunked.linear_cross_entropy(x, w, targets, want_grad)


@_linear_cross_entropy.register_fake
def _(x, w, targets, want_grad, impl):
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    if not want_grad:
        return total, x.new_empty(0), w.new_empty(0)
    return total, torch.empty_like(x), w.new_empty(w.shape)


@torch.library.custom_op("gpt4_moe::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(dtotal: Tensor, dx: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """An op of its own, so that whoever differentiates it again learns that it cannot be."""
    return (dx * dtotal).to(dx.dtype), (dw * dtotal).to(dw.dtype)


@_linear_cross_entropy_backward.register_fake
def _(dtotal, dx, dw):
    return torch.empty_like(dx), torch.empty_like(dw)


_linear_cross_entropy_backward.register_autograd(lambda _ctx, *second: no_second_derivative(*second))


def _linear_cross_entropy_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _linear_cross_entropy_autograd(ctx, dtotal: Tensor | None, *_unused: None):
    if dtotal is None:
        return (None,) * 5
    return *_linear_cross_entropy_backward(dtotal, *ctx.saved_tensors), None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_autograd, setup_context=_linear_cross_entropy_setup)
