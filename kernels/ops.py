"""The public ops of this folder: torch custom ops with fakes, autograd and autocast, each picking its implementation.

They work under `torch.compile(fullgraph=True)` and activation checkpointing. Shape suffixes as in reference.py.
"""

import torch
from torch import Tensor

from moe.kernels import cross_entropy, grouped, reference

ACTIVATIONS = {"swiglu": 2, "gelu": 1}  # name -> G, the number of F-wide input projections
IMPLEMENTATIONS = ("reference", "grouped")


# ------------------------------------------------------------------------------------------------------- expert MLP


def expert_mlp(
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str = "swiglu",
    impl: str | None = None,
) -> Tensor:
    """The routed expert MLP: y[t] = sum over k of weights[t, k] * MLP_{ids[t, k]}(x[t]). Dropless.

    Args:
        x_TD: tokens, [T, D] floating point.
        w_in_EGFD: [E, G, F, D], G = 2 (gate, then up) for "swiglu" and 1 for "gelu".
        w_out_EDF: [E, D, F].
        weights_TK: routing weights, [T, K] floating point, commonly float32.
        ids_TK: chosen experts, [T, K] int64 in [0, E).
        activation: "swiglu", silu(gate) * up, or "gelu" in the tanh form.
        impl: "reference" (any device and dtype), "grouped" (CPU: any dtype; CUDA: bfloat16), or None for the fastest
            that is eligible.

    Returns:
        y_TD in the dtype of x (under autocast: in autocast's dtype).

    Raises:
        ValueError: shapes, dtypes or `impl` that do not fit; the message says which and why.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, w_in_EGFD, w_out_EDF = x_TD.to(dtype), w_in_EGFD.to(dtype), w_out_EDF.to(dtype)
    _check_expert_mlp(x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK, activation)
    inputs = (x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK)
    impl = _choose(impl, x_TD)
    if _is_plain_cpu_inference(inputs):
        if impl == "grouped" and ids_TK.shape == (1, 2):
            return grouped.one_token_top2(*inputs, activation)
        return _forward(*inputs, activation, impl)[0]
    return _expert_mlp(*inputs, activation, impl)[0]


def _is_plain_cpu_inference(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the op may be called without torch's dispatcher, whose cost shows when a CPU decodes single tokens."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in inputs)
    )


def _choose(impl: str | None, x_TD: Tensor) -> str:
    if impl is None:
        # On CPU `reference` is slower at every T measured (benchmarks/expert_cpu.py); grouped_mm on CUDA knows
        # bfloat16 only.
        return "grouped" if x_TD.device.type == "cpu" or x_TD.dtype == torch.bfloat16 else "reference"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}: must be one of {', '.join(IMPLEMENTATIONS)}, or None for the fastest")
    if impl == "grouped" and x_TD.device.type != "cpu" and x_TD.dtype != torch.bfloat16:
        raise ValueError(
            f'impl = "grouped": on {x_TD.device.type} it needs bfloat16, not {x_TD.dtype}; use "reference"'
        )
    return impl


def _check_expert_mlp(x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, ids: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if x.ndim != 2 or w_in.ndim != 4 or w_out.ndim != 3 or ids.ndim != 2 or weights.shape != ids.shape:
        raise ValueError(
            "expert_mlp wants x [T, D], w_in [E, G, F, D], w_out [E, D, F], weights and ids [T, K]; got "
            f"{', '.join(str(list(t.shape)) for t in (x, w_in, w_out, weights, ids))}"
        )
    n_experts, n_gates, n_hidden, width = w_in.shape
    if n_gates != ACTIVATIONS[activation]:
        raise ValueError(f"w_in has G = {n_gates}, but {activation} needs G = {ACTIVATIONS[activation]}")
    if x.shape[1] != width or w_out.shape != (n_experts, width, n_hidden) or len(ids) != len(x):
        raise ValueError(
            f"shapes do not fit together: x {list(x.shape)}, w_in {list(w_in.shape)}, w_out {list(w_out.shape)}, "
            f"ids {list(ids.shape)}"
        )
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(f"x, w_in and w_out must have one dtype; got {x.dtype}, {w_in.dtype}, {w_out.dtype}")
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64; got {ids.dtype}")


@torch.library.custom_op("gpt4_moe::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, ids: Tensor, activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y and what the backward reads: pre-activations, sorted order, ends of the experts' rows."""
    return _forward(x, w_in, w_out, weights, ids, activation, impl)


def _forward(
    x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, ids: Tensor, activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "reference":
        y = reference.expert_mlp(x, w_in, w_out, weights, ids, activation)
        return y, x.new_empty(0), ids.new_empty(0), ids.new_empty(0, dtype=torch.int32)
    forward = grouped.grouped_mm_forward if _takes_grouped_mm(x, w_in, w_out) else grouped.loop_forward
    return forward(x, w_in, w_out, weights, ids, activation)


def _takes_grouped_mm(x: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    """Whether torch's grouped product takes the operands: not float64, and rows that begin at multiples of 16 bytes.

    On CPU it then is the faster body at every size (benchmarks/expert_cpu.py).
    """
    dtypes = (torch.bfloat16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16,)
    rows = (x.shape[1], w_in.shape[2], w_out.shape[2])
    return x.dtype in dtypes and all(n * x.element_size() % 16 == 0 for n in rows)


@_expert_mlp.register_fake
def _(
    x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, ids: Tensor, activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # new_empty(shape), here and below: results are contiguous whatever the layout of the inputs, and fakes must say so.
    if impl == "reference":
        return x.new_empty(x.shape), x.new_empty(0), ids.new_empty(0), ids.new_empty(0, dtype=torch.int32)
    h = x.new_empty(ids.numel(), *w_in.shape[1:3])
    return x.new_empty(x.shape), h, ids.new_empty(ids.numel()), ids.new_empty(len(w_in), dtype=torch.int32)


@torch.library.custom_op("gpt4_moe::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    ids: Tensor,
    h: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "reference":
        return reference.expert_mlp_backward(dy, x, w_in, w_out, weights, ids, activation)
    backward = grouped.grouped_mm_backward if _takes_grouped_mm(x, w_in, w_out) else grouped.loop_backward
    return backward(dy.contiguous(), x, w_in, w_out, weights, h, order, ends, activation)


@_expert_mlp_backward.register_fake
def _(dy, x, w_in, w_out, weights, ids, h, order, ends, activation, impl):
    return tuple(t.new_empty(t.shape) for t in (x, w_in, w_out, weights))


def _expert_mlp_setup(ctx, inputs, output) -> None:
    x, w_in, w_out, weights, ids, ctx.activation, ctx.impl = inputs
    # Only y has a gradient: without this, autograd would fill zeros of the size of the pre-activations.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_in, w_out, weights, ids, *output[1:])


def _expert_mlp_autograd(ctx, dy: Tensor | None, *_unused: None):
    if dy is None:
        return (None,) * 7
    gradients = _expert_mlp_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.impl)
    return *gradients, None, None, None


_expert_mlp.register_autograd(_expert_mlp_autograd, setup_context=_expert_mlp_setup)


# -------------------------------------------------------------------------------------- output layer + cross-entropy


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over the tokens of -log softmax(x @ w.T)[target], without ever holding [T, V] logits.

    A chunk of tokens at a time; where a gradient is wanted it is computed in the same pass, while the chunk's logits
    exist, so the backward only scales it.

    Args:
        x_TD: [T, D] floating point. w_VD: [V, D]. targets_T: [T] int64; -100 counts nothing.

    Returns:
        The sum, a scalar of at least float32.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
    want_grad = torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad)
    return _linear_cross_entropy(x_TD, w_VD, targets_T, want_grad)[0]


@torch.library.custom_op("gpt4_moe::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    return cross_entropy.linear_cross_entropy(x, w, targets, want_grad)


@_linear_cross_entropy.register_fake
def _(x: Tensor, w: Tensor, targets: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return (total, torch.empty_like(x), torch.empty_like(w)) if want_grad else (total, x.new_empty(0), w.new_empty(0))


def _linear_cross_entropy_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _linear_cross_entropy_autograd(ctx, dtotal: Tensor | None, *_unused: None):
    if dtotal is None:
        return (None,) * 4
    dx, dw = ctx.saved_tensors
    return (dx * dtotal).to(dx.dtype), (dw * dtotal).to(dw.dtype), None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_autograd, setup_context=_linear_cross_entropy_setup)
