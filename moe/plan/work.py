"""What a step has to compute and to move, component by component: the floor beside a measured time.

FLOPs are those of the algorithm (a multiply-add is 2; nothing computed twice counts). Bytes are what has to cross the
memory bus at least: each weight and each tensor between two components once, caches infinite within a component. Norms'
and activations' FLOPs are left out, as is usual. Components carry the names of moe/profile/stopwatch.py.

T tokens, R = T * top_k routed rows, D, q, kv, F, E, V as in counts.py; formulas are per layer, times the L layers, or
the M of them that have experts.
"""

from dataclasses import dataclass
from typing import Literal

from moe.config import Config
from moe.plan.counts import params
from moe.plan.flops import BACKWARD, TRAINING, head_flops, layer_flops
from moe.plan.shape import Layer, shape_of
from moe.plan.sizes import WIDE, update_bytes
from moe.plan.weights import attention_weights, head_weights, mlp_weights, router_weights

What = Literal["forward", "backward", "train", "decode"]

# Newton-Schulz of train/muon.py on an [s, l] matrix, s <= l: the Gram matrix and its application take 4 s^2 l, and five
# steps of 34 s^3 in all stand between.
_MUON_CUBES = 34


@dataclass(frozen=True)
class Work:
    """FLOP, bytes moved, and whether the FLOP are float32's (`wide`) whatever dtype the step computes in."""

    flop: float
    bytes: float
    wide: bool = False


def step_work(
    cfg: Config,
    batch: int,
    seq_len: int,
    what: What,
    *,
    activation_bytes: int,
    weight_bytes: int,
    context: int = 0,
    experts: float | None = None,
    gathered: bool = True,
) -> dict[tuple[str, str], Work]:
    """The work of one step on one device: (component, phase) -> Work.

    Args:
        batch: sequences. seq_len: tokens of each that are computed: 1 in "decode".
        what: "forward" gives logits; "backward" is forward and backward of the loss; "train" the optimizer, too.
        activation_bytes: per element of what flows between components.
        weight_bytes: per element of a weight as it is stored, and of its gradient.
        context: positions in the cache before these tokens.
        experts: of a layer that get a token; None for all.
        gathered: whether rows are copied into the order of the experts, rather than gathered inside the product.
    """
    L, M, D, V = cfg.n_layers, cfg.n_moe_layers, cfg.d_model, cfg.vocab_size
    shape = shape_of(cfg)
    layer = shape.main
    E, K, F, J = layer.mlp.n_experts, layer.mlp.top_k, layer.mlp.d_ff, (layer.mlp.matrices - 1) * layer.mlp.d_ff
    q, kv = layer.attention.q, layer.attention.kv
    T, R = batch * seq_len, batch * seq_len * K
    a, w = activation_bytes, weight_bytes
    touched = E if experts is None else experts
    learns = what in ("backward", "train")
    # Causal; those of the cache are read once each.
    flops = layer_flops(D, layer, 2 * context + (2 if seq_len == 1 else seq_len))
    dense, routing, head = attention_weights(D, layer.attention), router_weights(D, layer.mlp), head_weights(shape)
    projected = 2 * (D + q + kv)  # elements that go into and come out of them, per token
    work = {
        ("embedding", "forward"): Work(0, T * D * (w + a)),
        ("norm", "forward"): Work(0, (2 * L + 1) * 2 * T * D * a),
        ("projections", "forward"): Work(L * T * flops.projections, L * (dense * w + T * projected * a)),
        ("attention", "forward"): Work(L * T * flops.scores, L * (T * (2 * q + 2 * kv) + batch * context * 2 * kv) * a),
        ("router", "forward"): Work(M * T * flops.router, M * (T * D * a + routing * w + T * E * WIDE), wide=True),
        ("up", "forward"): Work(
            M * T * flops.up, M * (touched * D * J * w + (R * D + R * F + (R * J if learns else 0)) * a)
        ),
        ("down", "forward"): Work(M * T * flops.down, M * (touched * F * D * w + R * (F + D) * a)),
        ("combine", "forward"): Work(0, M * (R + T) * D * a),
        ("head", "forward"): Work(T * head_flops(shape), head * w + T * (D + V) * a),
    }
    if gathered and what != "decode":
        work["permute", "forward"] = Work(0, M * (T + R) * D * a)
    if cfg.dense is not None:
        work |= _plain_mlps(shape.layers[0], D, cfg.dense.layers, T, a, w, learns)
    if not learns:
        return work
    again = BACKWARD * T
    # The loss and all gradients of the output layer come from one pass, which never stores the logits.
    work["head", "forward"] = Work(TRAINING * T * head_flops(shape), 2 * head * w + 2 * T * D * a)
    work |= {
        ("embedding", "backward"): Work(0, head * w + T * D * a),
        ("norm", "backward"): Work(0, (2 * L + 1) * 3 * T * D * a),
        ("projections", "backward"): Work(L * again * flops.projections, L * (2 * dense * w + 2 * T * projected * a)),
        ("attention", "backward"): Work(L * again * flops.scores, L * T * 4 * (q + kv) * a),
        ("router", "backward"): Work(
            M * again * flops.router, M * (2 * T * D * a + 2 * routing * w + T * E * WIDE), wide=True
        ),
        # dy and the pre-activations come in; their gradient and the weighted activations go out, and come in again.
        ("down", "backward"): Work(
            M * again * flops.down, M * (2 * E * F * D * w + (2 * R * D + 2 * R * J + 2 * R * F) * a)
        ),
        ("up", "backward"): Work(M * again * flops.up, M * (2 * E * D * J * w + (2 * R * J + 2 * R * D) * a)),
        ("combine", "backward"): Work(0, M * (R + T) * D * a),
    }
    if gathered:
        work["permute", "backward"] = Work(0, 2 * M * (T + R) * D * a)
    if what == "train":
        work["optimizer", "update"] = _optimizer(cfg)
    return work


def _plain_mlps(layer: Layer, D: int, n: int, T: int, a: int, w: int, learns: bool) -> dict[tuple[str, str], Work]:
    """The MLPs of `n` layers without experts: two products, of which the gate is a part of the first."""
    F, J = layer.mlp.d_ff, (layer.mlp.matrices - 1) * layer.mlp.d_ff
    flops, weights = layer_flops(D, layer, 0), mlp_weights(D, layer.mlp)
    forward = T * (flops.up + flops.down)
    found = {("mlp", "forward"): Work(n * forward, n * (weights * w + T * (2 * D + J + F) * a))}
    if learns:
        # The output's gradient, what was saved and both products' results come in or go out; the weights' gradients.
        found["mlp", "backward"] = Work(BACKWARD * n * forward, n * (2 * weights * w + T * (2 * D + 4 * J) * a))
    return found


def _optimizer(cfg: Config) -> Work:
    """Everything in float32."""
    counts = params(cfg)
    if cfg.train.optimizer == "adamw":
        return Work(0, update_bytes("adamw") * counts.total)
    flop, D = 0, cfg.d_model
    for layer, n in shape_of(cfg).kinds.items():
        a, m, experts = layer.attention, layer.mlp, max(1, layer.mlp.n_experts)
        matrices = [(a.q, D, 2), (a.kv, D, 2), ((m.matrices - 1) * m.d_ff, D, experts), (D, m.d_ff, experts)]
        flop += n * sum(k * (4 * min(s) ** 2 * max(s) + _MUON_CUBES * min(s) ** 3) for *s, k in matrices)
    muon = counts.block_matrices
    moved = update_bytes("muon") * muon + update_bytes("adamw") * (counts.total - muon)
    return Work(flop, moved, wide=True)
