"""The routed expert MLP as a torch op: fakes, autograd, autocast, and the choice of an implementation.

Shape suffixes as in reference.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.kernels import cards, tiles
from moe.kernels.arguments import (
    autocast,
    can_read,
    check_device,
    check_ids,
    check_kinds,
    checked_ids,
    no_second_derivative,
    on_device_of,
    transformed,
    undispatched,
)
from moe.kernels.cards import PRECISIONS
from moe.kernels.experts import grouped, inference, reference
from moe.kernels.experts.quantized import QuantizedExperts
from moe.kernels.experts.reference import ACTIVATIONS
from moe.kernels.quantization import LARGEST

IMPLEMENTATIONS = ("reference", "grouped", "triton")


def expert_mlp(
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str = "swiglu",
    impl: str | None = None,
    *,
    b_in_EGF: Tensor | None = None,
    b_out_ED: Tensor | None = None,
    recompute: bool = False,
    precision: str | None = None,
) -> Tensor:
    """The routed expert MLP: y[t] = sum over k of weights[t, k] * MLP_{ids[t, k]}(x[t]). Dropless.

    Args:
        x_TD: tokens, [T, D] floating point, T may be 0. Strides, here and below, may be any: what an implementation
            cannot read where it is, it copies.
        w_in_EGFD: [E, G, F, D], G = 1 for "gelu" and else 2: gate, then up. A view of weights stored transposed, or
            with gate and up in turns, is read where it is.
        w_out_EDF: [E, D, F].
        weights_TK: routing weights, [T, K] floating point, commonly float32.
        ids_TK: chosen experts, [T, K] int64 in [0, E). One that a row names twice serves it twice, by both weights.
        activation: "swiglu", silu(gate) * up; "gelu" in the tanh form; "swiglu_oai", gpt-oss's clamped form.
        impl: "reference" (any device and dtype), "grouped" (bfloat16, on CPU float32 too; D and F multiples of 16
            bytes; no biases), "triton" (CUDA: bfloat16, float16, float32; on CPU in Triton's interpreter), or None for
            the fastest that is eligible.
        b_in_EGF: biases of the up product.
        b_out_ED: biases of the down product.
        recompute: keep x alone for the backward, which then computes the pre-activations again, to the same bits
            ("reference" always does).
        precision: how "triton" multiplies float32 operands: "ieee", exactly; "tf32", on tensor cores, of each operand
            its upper 10 bits of 23; "tf32x3", the same of what is left over, too: near exact. None is as torch is set
            (torch.backends.cuda.matmul.fp32_precision), which the other implementations always are. AMD's GPUs have
            "ieee", and gfx942 "tf32".

    Returns:
        y_TD in the dtype of x (under autocast in autocast's dtype, but for float64).

    Under torch.func's transforms (grad, vmap, jvp, ...) and forward-mode differentiation every expert is computed for
    every token, whatever `impl`: right, and slow.

    Raises:
        ValueError: shapes, dtypes, devices, `impl` or `precision` that do not fit, or, on a CPU, an id outside [0, E)
            (elsewhere: an assertion on the device). The message says which and why.
    """
    x_TD, w_in_EGFD, w_out_EDF, b_in_EGF, b_out_ED = autocast(
        x_TD.device.type, x_TD, w_in_EGFD, w_out_EDF, b_in_EGF, b_out_ED
    )
    _check_expert_mlp(x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK, activation, b_in_EGF, b_out_ED)
    inputs = (x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK)
    impl = _choose(impl, x_TD, w_in_EGFD, activation, b_in_EGF is not None or b_out_ED is not None)
    if precision is not None and (precision not in PRECISIONS or impl != "triton"):
        raise ValueError(
            f"precision = {precision!r}: must be None or, where the implementation is triton (here it is {impl}), one "
            f"of {', '.join(PRECISIONS)}"
        )
    asked = precision is not None and x_TD.dtype == torch.float32 and x_TD.device.type == "cuda"
    if asked and (reason := cards.why_not_precision(x_TD.device, precision)):
        raise ValueError(f"precision = {precision!r}: for float32 {reason}; or None, which takes what there is")
    if transformed():
        ids_TK = checked_ids(ids_TK, len(w_in_EGFD), "ids")
        return reference.expert_mlp_everywhere(*inputs[:4], ids_TK, activation, b_in_EGF, b_out_ED)
    # Without a backward nothing is kept for one.
    differentiable = (*inputs[:4], b_in_EGF, b_out_ED)
    recompute |= not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable))
    if recompute and impl == "triton" and not torch.is_grad_enabled() and undispatched(*differentiable):
        return _forward(*inputs, b_in_EGF, b_out_ED, activation, impl, True, precision)[0]
    return _expert_mlp(*inputs, b_in_EGF, b_out_ED, activation, impl, recompute, precision)[0]


def expert_mlp_inference(
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`expert_mlp` for a decoding loop that has seen its shapes and dtypes fit: without autograd and autocast.

    Also without torch's dispatcher, whose cost shows when single tokens are decoded (40 us, as much as all launches).
    Ids are checked as ever.

    Args:
        batch_invariant: a token's result has the same bits whatever other tokens there are. Where the Triton kernels
            run, with contiguous weights.

    Raises:
        ValueError: as `expert_mlp` does, and where `batch_invariant` cannot be.
    """
    inputs = (x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK)
    if ACTIVATIONS.get(activation) != w_in_EGFD.shape[1]:
        _check_expert_mlp(*inputs, activation, None, None)  # which says why
    on_cpu = can_read(ids_TK)
    if on_cpu and ids_TK.shape == (1, 2) and grouped.takes_two(ids_TK, len(w_in_EGFD)):
        return grouped.one_token_top2(*inputs, activation)
    impl = _choose(None, x_TD, w_in_EGFD, activation, biases=False)
    if batch_invariant and not (impl == "triton" and w_in_EGFD.is_contiguous() and w_out_EDF.is_contiguous()):
        raise ValueError(
            f"batch_invariant = True needs contiguous weights and the Triton kernels; this is {impl} on {x_TD.device}"
        )
    if impl == "triton":
        run = inference.forward if undispatched(*inputs[:4]) else inference.expert_mlp_inference
        return run(x_TD, w_in_EGFD, None, w_out_EDF, None, weights_TK, ids_TK, activation, impl, batch_invariant)
    if impl == "grouped" and undispatched(*inputs[:4]):
        return _forward(*inputs, None, None, activation, impl, False, None)[0]
    return _expert_mlp(*inputs, None, None, activation, impl, True, None)[0]


def expert_mlp_quantized(
    x_TD: Tensor,
    experts: QuantizedExperts,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str,
    impl: str | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`expert_mlp` with weights of eight bits, as `quantize_experts` makes them; it has no backward.

    Args:
        x_TD: tokens, [T, D] floating point.
        experts: contiguous, on the device of x.
        weights_TK: routing weights, [T, K] floating point.
        ids_TK: chosen experts, [T, K] int64 in [0, E).
        activation: as of `expert_mlp`.
        impl: "reference" (any device; computes in float32 or more), "triton" (products of bfloat16 or float16, summed
            in float32, rescaled then), or None: triton on CUDA.
        batch_invariant: a token's result has the same bits whatever other tokens there are; "triton" only.

    Returns:
        y_TD in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or `impl` that do not fit, or, on a CPU, an id outside [0, E) (elsewhere: an
            assertion on the device). The message says which and why.
    """
    w_in, s_in, w_out, s_out = experts
    check_kinds(x=x_TD, weights=weights_TK, ids=ids_TK, s_in=s_in, s_out=s_out)
    check_device(x=x_TD, w_in=w_in, w_out=w_out, s_in=s_in)
    _check_shapes(x_TD, w_in, w_out, weights_TK, ids_TK, activation)
    if w_in.dtype not in LARGEST or w_out.dtype != w_in.dtype:
        raise ValueError(
            f"w_in {w_in.dtype} and w_out {w_out.dtype}: must both be one of {', '.join(map(str, LARGEST))}; "
            "quantize_experts makes them"
        )
    if s_in.shape != w_in.shape[:-1] or s_out.shape != w_out.shape[:-1] or not all(t.is_contiguous() for t in experts):
        raise ValueError(
            f"s_in {list(s_in.shape)} and s_out {list(s_out.shape)} must have one scale for each output channel of "
            f"w_in {list(w_in.shape)} and w_out {list(w_out.shape)}, all contiguous; quantize_experts makes them"
        )
    if impl not in (None, "reference", "triton"):
        raise ValueError(f'impl = {impl!r}: must be "reference" or "triton", or None for the fastest')
    reason = tiles.why_not_triton(x_TD) or _why_not_e4m3(x_TD, w_in)
    if impl == "triton" and reason:
        raise ValueError(f'impl = "triton": {reason}; use "reference"')
    impl = impl or ("reference" if reason or x_TD.device.type == "cpu" else "triton")
    if batch_invariant and impl != "triton":
        raise ValueError(f"batch_invariant = True needs the Triton kernels; this is {impl} on {x_TD.device}")
    inputs = (x_TD, w_in, s_in, w_out, s_out, weights_TK, ids_TK)
    run = inference.forward if undispatched(*inputs) else inference.expert_mlp_inference
    return run(*inputs, activation, impl, batch_invariant)


def expert_mlp_forward(
    x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor, activation: str
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """`expert_mlp` without autograd, for ops around it: y, what `expert_mlp_gradients` reads, and the implementation.

    Raises as `expert_mlp` does.
    """
    _check_expert_mlp(x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK, activation, None, None)
    impl = _choose(None, x_TD, w_in_EGFD, activation, biases=False)
    inputs = (x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK)
    y, *saved = _expert_mlp(*inputs, None, None, activation, impl, False, None)
    return y, tuple(saved), impl


def expert_mlp_gradients(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    saved: Sequence[Tensor],
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w_in, w_out and weights; `saved` and `impl` as `expert_mlp_forward` gave them."""
    inputs = (dy_TD, x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK)
    dx, dw_in, dw_out, dweights, _, _ = _expert_mlp_backward(*inputs, *saved, None, None, activation, impl, None)
    return dx, dw_in, dw_out, dweights


def _choose(impl: str | None, x_TD: Tensor, w_in_EGFD: Tensor, activation: str, biases: bool) -> str:
    if impl is None:
        if tiles.why_not_triton(x_TD) is None and x_TD.device.type != "cpu":
            return "triton"
        if x_TD.device.type == "cuda" and cards.why_not(x_TD.device):
            return "reference"  # of such cards the grouped product is not known to run either
        return "reference" if _why_not_grouped(x_TD, w_in_EGFD, activation, biases) else "grouped"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}: must be one of {', '.join(IMPLEMENTATIONS)}, or None for the fastest")
    reason = None
    if impl == "grouped":
        reason = _why_not_grouped(x_TD, w_in_EGFD, activation, biases)
    elif impl == "triton":
        reason = tiles.why_not_triton(x_TD)
    if reason:
        raise ValueError(f'impl = "{impl}": {reason}; use "reference"')
    return impl


def _why_not_e4m3(x_TD: Tensor, w_in_EGFD: Tensor) -> str | None:
    """Why Triton cannot read weights; None where it can."""
    if w_in_EGFD.dtype != torch.float8_e4m3fn or x_TD.device.type != "cuda" or tiles.INTERPRETED:
        return None
    return cards.why_not_e4m3(x_TD.device)


def _why_not_grouped(x_TD: Tensor, w_in_EGFD: Tensor, activation: str, biases: bool) -> str | None:
    """Why torch's grouped product cannot run. Where it can, it is the fastest on CPU (benchmarks/expert_cpu.py)."""
    if biases:
        return "it takes no biases"
    if activation == "swiglu_oai":
        return "it does not know swiglu_oai"
    on_cpu = x_TD.device.type == "cpu"
    if x_TD.dtype != torch.bfloat16 and not (on_cpu and x_TD.dtype == torch.float32):
        return f"on {x_TD.device.type} it needs bfloat16{' or float32' if on_cpu else ''}, not {x_TD.dtype}"
    for name, width in (("D", x_TD.shape[1]), ("F", w_in_EGFD.shape[2])):
        if width * x_TD.element_size() % 16:
            return f"{name} = {width} must be a multiple of {16 // x_TD.element_size()} in {x_TD.dtype}"
    return None


def _check_expert_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    b_in: Tensor | None,
    b_out: Tensor | None,
) -> None:
    check_kinds(x=x, w_in=w_in, w_out=w_out, weights=weights, ids=ids, b_in=b_in, b_out=b_out)
    _check_shapes(x, w_in, w_out, weights, ids, activation)
    for name, bias, shape in (("b_in", b_in, w_in.shape[:3]), ("b_out", b_out, w_out.shape[:2])):
        if bias is not None and (bias.shape != shape or bias.dtype != x.dtype):
            raise ValueError(f"{name} must be {list(shape)} {x.dtype}; got {list(bias.shape)} {bias.dtype}")
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(f"x, w_in and w_out must have one dtype; got {x.dtype}, {w_in.dtype}, {w_out.dtype}")


def _check_shapes(x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor, ids: Tensor, activation: str) -> None:
    reference.check_activation(activation)
    if x.ndim != 2 or w_in.ndim != 4 or w_out.ndim != 3 or ids.ndim != 2 or weights.shape != ids.shape:
        raise ValueError(
            "expert_mlp wants x [T, D], w_in [E, G, F, D], w_out [E, D, F], weights and ids [T, K]; got "
            f"{', '.join(str(list(t.shape)) for t in (x, w_in, w_out, weights, ids))}"
        )
    if 0 in w_in.shape or ids.shape[1] == 0:
        raise ValueError(f"w_in {list(w_in.shape)} or ids {list(ids.shape)}: only the number of tokens may be 0")
    n_experts, n_gates, n_hidden, width = w_in.shape
    if n_gates != ACTIVATIONS[activation]:
        raise ValueError(f"w_in has G = {n_gates}, but {activation} needs G = {ACTIVATIONS[activation]}")
    if x.shape[1] != width or w_out.shape != (n_experts, width, n_hidden) or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"shapes do not fit together: x {list(x.shape)}, w_in {list(w_in.shape)}, w_out {list(w_out.shape)}, "
            f"ids {list(ids.shape)}"
        )


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    ids: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    impl: str,
    recompute: bool,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y and what the backward reads: pre-activations, sorted order, where the experts' rows end or begin."""
    if impl != "triton" or ids.device.type == "cpu":  # elsewhere its kernels assert as much
        check_ids(ids, len(w_in), "ids")
    b_in, b_out = _contiguous(b_in), _contiguous(b_out)
    if impl == "reference":
        y = reference.expert_mlp(x, w_in, w_out, weights, ids, activation, b_in, b_out)
        return y, x.new_empty(0), ids.new_empty(0), ids.new_empty(0, dtype=torch.int32)
    if impl == "grouped":
        y, h, order, ends = grouped.forward(x, w_in, w_out, weights, ids, activation)
        return y, h.new_empty(0) if recompute else h, order, ends
    from moe.kernels.experts import triton_mlp as fused

    experts = fused.Experts(w_in, w_out, b_in, b_out, precision)
    with on_device_of(x):
        return fused.forward(x, experts, weights, ids, activation, not recompute)


_expert_mlp = torch.library.custom_op("gpt4_moe::expert_mlp", _forward, mutates_args=())


@_expert_mlp.register_fake
def _(x, w_in, w_out, weights, ids, b_in, b_out, activation, impl, recompute, precision=None):
    # new_empty(shape), here and below: results are contiguous whatever the layout of the inputs, and fakes must say so.
    y, n_rows = x.new_empty(x.shape), ids.numel()
    if impl == "reference":
        return y, x.new_empty(0), ids.new_empty(0), ids.new_empty(0, dtype=torch.int32)
    if impl == "grouped":
        h = x.new_empty(0) if recompute else x.new_empty(n_rows, *w_in.shape[1:3])
        return y, h, ids.new_empty(n_rows), ids.new_empty(len(w_in), dtype=torch.int32)
    h = x.new_empty(0 if recompute else n_rows, w_in.shape[1] * w_in.shape[2])
    return y, h, ids.new_empty(2, n_rows, dtype=torch.int32), ids.new_empty(len(w_in) + 1, dtype=torch.int32)


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
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    impl: str,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w_in, w_out, weights, b_in, b_out; empty for a bias that is not there."""
    b_in, b_out = _contiguous(b_in), _contiguous(b_out)
    if impl == "grouped":
        found = grouped.backward(dy.contiguous(), x, w_in, w_out, weights, h, order, ends, activation)
        found = (*found, None, None)
    elif impl == "reference":
        found = reference.expert_mlp_backward(dy, x, w_in, w_out, weights, ids, activation, b_in, b_out)
    else:
        from moe.kernels.experts import triton_mlp as fused

        experts = fused.Experts(w_in, w_out, b_in, b_out, precision)
        with on_device_of(x):
            found = fused.backward(dy, x, experts, weights, h, order, ends, activation)
    dx, dw_in, dw_out, dweights, db_in, db_out = found
    none = x.new_empty(0)
    return dx, dw_in, dw_out, dweights, none if db_in is None else db_in, none.clone() if db_out is None else db_out


@_expert_mlp_backward.register_fake
def _(dy, x, w_in, w_out, weights, ids, h, order, ends, b_in, b_out, activation, impl, precision=None):
    biases = (x.new_empty(0 if b is None else b.shape) for b in (b_in, b_out))
    return *(t.new_empty(t.shape) for t in (x, w_in, w_out, weights)), *biases


_expert_mlp_backward.register_autograd(lambda _ctx, *second: no_second_derivative(*second))


def _expert_mlp_setup(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.impl, _, ctx.precision = inputs
    # Only y has a gradient: without this, autograd would fill zeros of the size of the pre-activations.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _expert_mlp_autograd(ctx, dy: Tensor | None, *_unused: None):
    if dy is None:
        return (None,) * 11
    x, w_in, w_out, weights, ids, b_in, b_out, *saved = ctx.saved_tensors
    *gradients, db_in, db_out = _expert_mlp_backward(
        dy, x, w_in, w_out, weights, ids, *saved, b_in, b_out, ctx.activation, ctx.impl, ctx.precision
    )
    biases = (None if b is None else db for b, db in ((b_in, db_in), (b_out, db_out)))
    return *gradients, None, *biases, None, None, None, None


_expert_mlp.register_autograd(_expert_mlp_autograd, setup_context=_expert_mlp_setup)
