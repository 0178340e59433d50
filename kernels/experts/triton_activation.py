"""The experts' nonlinearities and their derivatives, for the kernels."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


# The names of ops.ACTIVATIONS, as the kernels know them.
SWIGLU = tl.constexpr(0)
GELU = tl.constexpr(1)
SWIGLU_OAI = tl.constexpr(2)
ACTIVATION_CODES = {"swiglu": SWIGLU.value, "gelu": GELU.value, "swiglu_oai": SWIGLU_OAI.value}


@triton.jit
def activate(g, u, ACT: tl.constexpr):
    """act(gate, up); GELU, which has no gate, takes its input as `g`."""
    if ACT == SWIGLU:
        y = g * sigmoid(g) * u
    elif ACT == GELU:
        # tanh form: 1/2 (1 + tanh(z)) = sigmoid(2 z).
        y = g * sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        # gpt-oss: both clamped at 7, sigmoid slope 1.702, up + 1.
        g = tl.minimum(g, 7.0)
        u = tl.minimum(tl.maximum(u, -7.0), 7.0)
        y = g * sigmoid(1.702 * g) * (u + 1.0)
    return y


@triton.jit
def activate_backward(g, u, ACT: tl.constexpr):
    """act, d act / d gate, d act / d up."""
    if ACT == SWIGLU:
        s = sigmoid(g)
        y = g * s * u
        dg = s * u * (1.0 + g * (1.0 - s))
        du = g * s
    elif ACT == GELU:
        s = sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        y = g * s
        dg = s + g * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        du = g
    else:
        open_g = g <= 7.0
        open_u = (u >= -7.0) & (u <= 7.0)
        g = tl.minimum(g, 7.0)
        u = tl.minimum(tl.maximum(u, -7.0), 7.0)
        s = sigmoid(1.702 * g)
        y = g * s * (u + 1.0)
        dg = tl.where(open_g, s * (u + 1.0) * (1.0 + 1.702 * g * (1.0 - s)), 0.0)
        du = tl.where(open_u, g * s, 0.0)
    return y, dg, du
