"""Elements of one layer's matrices, by component: the one place that has these formulas.

`counts` sums them into parameters and shows them, `flops` multiplies with them, `memory` divides them over GPUs,
`serving` reads them. Biases and norms are in the shape itself (moe/plan/shape.py).
"""

import functools
from dataclasses import dataclass

from moe.plan.quantities import evaluate
from moe.plan.shape import Attention, Mlp, Shape


@dataclass(frozen=True)
class Formula:
    """Arithmetic over whole numbers, as text: it is evaluated for a count, and shown with the numbers put in."""

    text: str
    inputs: dict[str, int]

    def value(self) -> int:
        """What comes out."""
        return evaluate(self.text, self.inputs)


def attention(d: int, a: Attention) -> Formula:
    """The projections of queries, keys, values and outputs.

    Multi-head latent attention: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C.
    """
    if not a.kv_rank:
        if a.v_dim == a.head_dim:
            return Formula("2 * d * q + 2 * d * kv", {"q": a.q, "kv": a.kv, "d": d})
        inputs = {"q": a.q, "kv": a.kv, "v": a.v_dim, "kv_heads": a.n_kv_heads, "heads": a.n_heads, "d": d}
        return Formula("d * (q + kv) + d * v * (kv_heads + heads)", inputs)
    queries = "d * q_rank + q_rank * q" if a.q_rank else "d * q"
    inputs = {"q_rank": a.q_rank, "kv_rank": a.kv_rank, "rope": a.rope_dim, "nope": a.head_dim - a.rope_dim}
    inputs |= {"heads": a.n_heads, "v": a.v_dim, "q": a.q, "d": d}
    return Formula(f"{queries} + d * (kv_rank + rope) + kv_rank * heads * (nope + v) + heads * v * d", inputs)


def mlp(d: int, m: Mlp) -> Formula:
    """The dense MLP, or one of the experts."""
    return Formula("matrices * d * f", {"matrices": m.matrices, "d": d, "f": m.d_ff})


def shared(d: int, m: Mlp) -> Formula:
    """The shared experts and their gate; nothing where there are none."""
    inputs = {"matrices": m.matrices, "d": d, "f": m.shared_d_ff, "gate": int(m.shared_gate)}
    return Formula("matrices * d * f + gate * d", inputs)


def router(d: int, m: Mlp) -> Formula:
    """The router; nothing in a dense layer."""
    return Formula("d * experts", {"d": d, "experts": m.n_experts})


@functools.cache
def attention_weights(d: int, a: Attention) -> int:
    """Elements of `attention`."""
    return attention(d, a).value()


@functools.cache
def mlp_weights(d: int, m: Mlp) -> int:
    """Elements of `mlp`."""
    return mlp(d, m).value()


@functools.cache
def shared_weights(d: int, m: Mlp) -> int:
    """Elements of `shared`."""
    return shared(d, m).value()


@functools.cache
def router_weights(d: int, m: Mlp) -> int:
    """Elements of `router`."""
    return router(d, m).value()


def head_weights(shape: Shape) -> int:
    """Elements of the output layer's matrix, which is there to multiply with even where it is tied to the embedding."""
    return shape.vocab_size * shape.d_model
