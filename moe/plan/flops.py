"""FLOP of a token, by component: the one place that counts them. A multiply-add is 2.

Norms, softmax, rotations, activations and biases are not counted, as is usual. Tests hold the counts against torch's
own counter.
"""

from dataclasses import dataclass

from moe.plan.bounds import whole
from moe.plan.models import Model, load_shape
from moe.plan.shape import Attention, Layer, Shape
from moe.plan.weights import attention_weights, head_weights, mlp_weights, router_weights, shared_weights

BACKWARD = 2  # forward passes that a backward costs: the gradients of what goes in, and those of the weights
TRAINING = 1 + BACKWARD


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOP of one token in one layer.

    `up` (with the gate) and `down` are the matrices of the experts that serve the token, or of the dense MLP.
    """

    projections: int
    scores: int  # and weighted values
    router: int
    up: int
    down: int
    shared: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.projections + self.scores + self.router + self.up + self.down + self.shared


def layer_flops(d: int, layer: Layer, seen_twice: int) -> LayerFlops:
    """Forward FLOP of one token that sees half of `seen_twice` positions. Twice, since halves of an odd number of
    positions are usual, and FLOP stay whole."""
    a, m = layer.attention, layer.mlp
    products = 2 * (m.top_k if m.n_experts else 1) * mlp_weights(d, m)
    down = products // m.matrices
    return LayerFlops(
        projections=2 * attention_weights(d, a),
        scores=scores_width(a) * seen_twice,
        router=2 * router_weights(d, m),
        up=products - down,
        down=down,
        shared=2 * shared_weights(d, m),
    )


def scores_width(a: Attention) -> int:
    """Elements of all heads' queries and values: half the FLOP that a token takes for each position that it sees."""
    return a.n_heads * (a.head_dim + a.v_dim)


def head_flops(shape: Shape) -> int:
    """Forward FLOP of one token in the output layer."""
    return 2 * head_weights(shape)


def seen_twice(context: int, window: int, causal: bool = True) -> int:
    """Twice the positions that a token sees, on average over a sequence of `context`."""
    if not window or window >= context:
        return context if causal else 2 * context
    if not causal:
        return 2 * window
    # The first `window` positions see half of it on average, the rest all of it.
    return round(window * (2 * context - window) / context)


def flops_per_token(model: Model, context: int = 0, causal: bool = True) -> int:
    """Forward FLOP of one token, all layers and the output layer. Training costs `TRAINING` times this.

    2 x the active parameters that multiply (output layer included; input embedding, norms and biases not), plus 4 q ctx
    per layer for scores and weighted values. ctx is `context`, the sequence length, or half of it with `causal` (the
    mean over the positions of what they may see); 0 is the convention "2 N" / "6 N" that leaves attention out.
    """
    whole(0, context=context)
    shape = load_shape(model)
    return head_flops(shape) + sum(n * flops.total for flops, n in _layers(shape, context, causal))


def attention_flops(model: Model, context: int, causal: bool = True) -> int:
    """Of these, attention scores and weighted values."""
    whole(0, context=context)
    return sum(n * flops.scores for flops, n in _layers(load_shape(model), context, causal))


def routed_flops(model: Model) -> int:
    """Of these, the routed experts."""
    shape = load_shape(model)
    return sum(
        n * (flops.up + flops.down)
        for layer, n in shape.kinds.items()
        if layer.mlp.n_experts and (flops := layer_flops(shape.d_model, layer, 0))
    )


def dense_flops_per_token(model: Model, context: int = 0, causal: bool = True) -> int:
    """As `flops_per_token`, for the dense model of the same size: every expert serves every token."""
    shape = load_shape(model)
    idle = sum(
        n * 2 * (layer.mlp.n_experts - layer.mlp.top_k) * mlp_weights(shape.d_model, layer.mlp)
        for layer, n in shape.kinds.items()
    )
    return flops_per_token(shape, context, causal) + idle


def _layers(shape: Shape, context: int, causal: bool) -> list[tuple[LayerFlops, int]]:
    """The FLOP of each kind of layer, and how many layers there are of it."""
    return [
        (layer_flops(shape.d_model, layer, seen_twice(context, layer.attention.window, causal)), n)
        for layer, n in shape.kinds.items()
    ]
