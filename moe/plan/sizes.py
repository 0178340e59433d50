"""Bytes: of an element, of a parameter's optimizer state, of what a block keeps for its backward pass.

The one place that has them; `memory` divides them over GPUs, `device` adds what our own implementation keeps besides,
`work` and `roofline` move them.
"""

from moe.errors import ConfigError
from moe.plan.quantities import Quantity, Sheet
from moe.plan.shape import Layer

# Bytes of a stored element. MX formats hold 4-bit numbers in blocks of 32 with a scale of 8 bits.
BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5, "mxfp4": 4.25 / 8}
WIDE, NARROW = 4, 2  # of float32, and of what flows between layers: bfloat16

# Moving averages that an optimizer keeps of every parameter, in float32.
MOMENTS = {"adamw": 2, "muon": 1, "sgd": 0}


def element_bytes(dtype: str) -> float:
    """Bytes of one element.

    Raises:
        ConfigError: no such dtype.
    """
    if dtype not in BYTES:
        raise ConfigError(f"dtype = {dtype!r}: must be one of {', '.join(BYTES)}")
    return BYTES[dtype]


def moment_bytes(optimizer: str) -> int:
    """Of a parameter's moving averages."""
    return WIDE * MOMENTS[optimizer]


def state_bytes(optimizer: str) -> int:
    """Of a parameter's state beside a narrow weight that computes: a float32 master, and the averages.

    Raises:
        ConfigError: no such optimizer.
    """
    if optimizer not in MOMENTS:
        raise ConfigError(f"optimizer = {optimizer!r}: must be one of {', '.join(MOMENTS)}")
    return WIDE + moment_bytes(optimizer)


def update_bytes(optimizer: str) -> int:
    """Read and written for a parameter's update, all of it in float32: parameter, gradient and averages come in, all
    but the gradient go out."""
    return 3 * WIDE + 2 * moment_bytes(optimizer)


def saved_elements(d: int, layer: Layer) -> dict[str, Quantity]:
    """Elements per token that a block keeps for its backward pass, with a fused expert MLP and flash attention.

    `residual`: the inputs of both norms and what they give. `queries`: they and attention's output. `keys`: keys and
    values, or the latent. `routed`: the pre-activations of the experts that serve the token, or of the dense MLP; and
    `shared`: those of the shared experts. No scores, and no activations: they are computed again.
    """
    a, m, sheet = layer.attention, layer.mlp, Sheet()
    gates = m.matrices - 1
    sheet.derive("residual", "x", "4 * d", d=d)
    sheet.derive("queries", "x", "2 * q", q=a.q)
    sheet.derive("keys", "x", "cached", cached=a.cached)
    sheet.derive("routed", "x", "k * gates * f", k=max(1, m.top_k), gates=gates, f=m.d_ff)
    sheet.derive("shared", "x", "gates * f", gates=gates, f=m.shared_d_ff)
    return dict(sheet)
