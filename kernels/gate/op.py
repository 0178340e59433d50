"""The top-k gate as a torch op: fake, autograd, and the choice of an implementation.

Shape suffixes as in reference.py.
"""

import torch
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.arguments import (
    check_device,
    check_kinds,
    checked_choice,
    no_second_derivative,
    on_device_of,
    transformed,
)
from moe.kernels.gate import reference


def topk_gate(
    logits_TE: Tensor,
    top_k: int,
    bias_E: Tensor | None = None,
    impl: str | None = None,
    *,
    given_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts per token and weigh them by a softmax over the chosen logits.

    Args:
        logits_TE: [T, E] floating point, T may be 0. A NaN counts as larger than all numbers, and makes its row's
            weights NaN if it is chosen; the ids are valid ones in any case.
        top_k: in 1 .. E.
        bias_E: added to the softmax scores for choosing only.
        impl: "reference", "triton" (float32 on CUDA, or the interpreter: one launch), or None for the fastest.
        given_TK: a choice made before, int64 [T, K] in [0, E), its experts different in each row; it is weighed, to the
            last bit as if it had been chosen here.

    Returns:
        weights_TK in the dtype of the logits, each row summing to 1, and ids_TK int64, in falling order of score; ties
        go to the lower expert.

    Raises:
        ValueError: an argument that does not fit, `impl` that cannot run here, or, on a CPU, ids in `given_TK` that are
            outside or twice in a row (elsewhere: an assertion on the device). The message says which and why.
    """
    check_kinds(logits=logits_TE, bias_E=bias_E)
    check_device(logits=logits_TE, given_TK=given_TK)
    if logits_TE.ndim != 2:
        raise ValueError(f"topk_gate wants logits [T, E]; got {list(logits_TE.shape)}")
    n_tokens, n_experts = logits_TE.shape
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k = {top_k!r}: must be an integer in 1 .. {n_experts}, the number of experts")
    if bias_E is not None and bias_E.shape != (n_experts,):
        raise ValueError(f"bias_E must be [{n_experts}], one per expert; got {list(bias_E.shape)}")
    if given_TK is not None and (given_TK.shape != (n_tokens, top_k) or given_TK.dtype != torch.int64):
        raise ValueError(f"given_TK must be int64 [{n_tokens}, {top_k}]; got {given_TK.dtype} {list(given_TK.shape)}")
    reason = tiles.why_not_triton(logits_TE)
    if reason is None and logits_TE.dtype != torch.float32:
        reason = f"the gate needs float32, not {logits_TE.dtype}"
    if impl not in (None, "reference", "triton"):
        raise ValueError(f'impl = {impl!r}: must be "reference" or "triton", or None for the fastest')
    if impl == "triton" and reason:
        raise ValueError(f'impl = "triton": {reason}; use "reference"')
    if transformed():
        impl = "reference"
    on_cpu = logits_TE.device.type == "cpu"
    fused = impl == "triton" or (impl is None and reason is None and not on_cpu)
    if given_TK is not None and (on_cpu or not fused):  # else the kernel asserts as much
        given_TK = checked_choice(given_TK, n_experts, "given_TK")
    if fused:
        return _topk_gate(logits_TE, bias_E, given_TK, top_k)
    return reference.topk_gate(logits_TE, top_k, bias_E, given_TK)


@torch.library.custom_op("gpt4_moe::topk_gate", mutates_args=())
def _topk_gate(logits: Tensor, bias: Tensor | None, given: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    from moe.kernels.gate import triton_gate

    with on_device_of(logits):
        return triton_gate.gate(logits, top_k, bias, given)


@_topk_gate.register_fake
def _(logits, bias, given, top_k):
    shape = logits.shape[0], top_k
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("gpt4_moe::topk_gate_backward", mutates_args=())
def _topk_gate_backward(dweights: Tensor, weights: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    from moe.kernels.gate import triton_gate

    with on_device_of(weights):
        return triton_gate.gate_backward(dweights, weights, ids, n_experts)


@_topk_gate_backward.register_fake
def _(dweights, weights, ids, n_experts):
    return weights.new_empty(weights.shape[0], n_experts)


_topk_gate_backward.register_autograd(lambda _ctx, *second: no_second_derivative(*second))


def _topk_gate_setup(ctx, inputs, output) -> None:
    ctx.n_experts = inputs[0].shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])


def _topk_gate_autograd(ctx, dweights: Tensor | None, _ids: None):
    if dweights is None:
        return (None,) * 4
    return _topk_gate_backward(dweights, *ctx.saved_tensors, ctx.n_experts), None, None, None


_topk_gate.register_autograd(_topk_gate_autograd, setup_context=_topk_gate_setup)
