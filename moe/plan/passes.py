"""What one pass of a serving engine computes and moves on one device, from the tokens that are in it.

`serving.stage_loads` is the same of an even batch, over many devices; here each request has tokens and positions of its
own, and the experts that the pass touched may have been counted rather than expected. Every weight that is used is read
once; keys and values are read up to each request's last position; activations, norms and embeddings are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe.plan.experts import touched
from moe.plan.flops import head_flops, layer_flops, scores_width
from moe.plan.shape import Shape
from moe.plan.sizes import WIDE
from moe.plan.weights import attention_weights, head_weights, mlp_weights, router_weights, shared_weights

Span = tuple[int, int]  # one request's share: the position of its first token, and how many there are


@dataclass(frozen=True)
class Bytes:
    """Of one element: of weights other than the experts', of the experts', and of keys and values."""

    weights: float = WIDE
    experts: float = WIDE
    kv: float = WIDE


@dataclass(frozen=True)
class PassLoad:
    """FLOP, and bytes by what they are."""

    flop: float
    weights: float
    experts: float
    kv: float

    @property
    def bytes(self) -> float:
        """All of them."""
        return self.weights + self.experts + self.kv

    def floor(self, flop_per_second: float, bytes_per_second: float) -> float:
        """Seconds that it takes at least (Williams et al. 2009)."""
        return max(self.flop / flop_per_second, self.bytes / bytes_per_second)


def pass_load(shape: Shape, spans: Sequence[Span], wanted: int, distinct: Sequence[float], size: Bytes) -> PassLoad:
    """The load of one pass.

    Args:
        spans: of the requests. wanted: positions whose logits are computed.
        distinct: experts that get a token, in each layer that has experts; as `expected_experts` says, or as counted.
    """
    tokens = sum(n for _, n in spans)
    read = sum(start + n for start, n in spans)  # positions, the new ones written
    seen = sum(n * (2 * start + n + 1) for start, n in spans)  # twice the positions that the tokens see
    counts = iter(distinct)
    flop = float(head_flops(shape) * wanted)
    weights = float(head_weights(shape) if wanted else 0)
    experts = kv = 0.0
    for layer in shape.layers:
        a, m = layer.attention, layer.mlp
        each = layer_flops(shape.d_model, layer, 0)
        flop += each.total * tokens + scores_width(a) * seen
        weights += attention_weights(shape.d_model, a) + shared_weights(shape.d_model, m)
        weights += router_weights(shape.d_model, m) if m.n_experts else mlp_weights(shape.d_model, m)
        experts += next(counts) * mlp_weights(shape.d_model, m) if m.n_experts else 0
        kv += a.cached * read
    return PassLoad(flop, weights * size.weights, experts * size.experts, kv * size.kv)


def expected_experts(shape: Shape, tokens: float) -> list[float]:
    """Distinct experts of each layer that has some, under even and independent routing: E (1 - (1 - k/E)^T)."""
    return [touched(m.n_experts, m.top_k, tokens) for m in (layer.mlp for layer in shape.layers) if m.n_experts]


def most_experts(shape: Shape, tokens: int) -> list[float]:
    """The most that so many tokens can reach, min(k T, E): what vLLM's roofline takes for the number of them."""
    return [min(m.top_k * tokens, m.n_experts) for m in (layer.mlp for layer in shape.layers) if m.n_experts]
