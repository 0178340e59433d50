"""Parameters and forward FLOPs of a configuration, counted by formula.

Attention counts 2 d q + 2 d kv per layer, where the query width q = heads x head width is free of the model width d;
an expert 3 d f (gated) or 2 d f; the router d E. Tests hold the counts against the parameters of the built model, and
the FLOPs against torch's counter.
"""

from dataclasses import dataclass
from typing import Literal

from moe.config import Config

ActiveConvention = Literal["none", "output", "both"]


@dataclass(frozen=True)
class Params:
    """Parameter counts of a whole model, all layers together.

    `active` is what one token uses, under the three conventions in use for the embeddings: "none" of them, the
    "output" layer only (it is multiplied with, the input embedding is looked up), or "both". With tied embeddings
    the one matrix is counted once, as `embedding`; `head` is then 0 and "output" equals "both".
    """

    total: int
    embedding: int
    head: int
    attention: int
    expert: int  # one of the experts, in all layers
    experts: int  # all of them
    router: int
    norms: int
    active: dict[ActiveConvention, int]


def params(cfg: Config) -> Params:
    """Count the parameters of `cfg`."""
    d, layers = cfg.d_model, cfg.n_layers
    q = cfg.attention.n_heads * cfg.attention.head_dim
    kv = cfg.attention.n_kv_heads * cfg.attention.head_dim
    matrices = 3 if cfg.experts.activation == "swiglu" else 2  # gate, up, down or up, down

    embedding = cfg.vocab_size * d
    head = 0 if cfg.tie_embeddings else embedding
    attention = layers * (2 * d * q + 2 * d * kv)
    expert = layers * matrices * d * cfg.experts.d_ff
    experts = cfg.experts.n_experts * expert
    router = layers * d * cfg.experts.n_experts
    norms = (2 * layers + 1) * d  # two a layer and the final one

    used = attention + cfg.experts.top_k * expert + router + norms
    return Params(
        total=embedding + head + attention + experts + router + norms,
        embedding=embedding,
        head=head,
        attention=attention,
        expert=expert,
        experts=experts,
        router=router,
        norms=norms,
        active={"none": used, "output": used + cfg.vocab_size * d, "both": used + embedding + head},
    )


def flops_per_token(cfg: Config, context: int = 0, causal: bool = True) -> int:
    """Forward FLOPs of one token; a multiply-add is 2. Training costs three times this (backward = 2 x forward).

    2 x the active parameters that multiply (output layer included, input embedding and norms not), plus 4 q ctx per
    layer for scores and weighted values. ctx is `context`, the sequence length, or half of it with `causal` (the mean
    over the positions of what they may see); 0 is the convention "2 N" / "6 N" that leaves attention out. Norms,
    softmax, rotations and activations are not counted, as is usual.
    """
    counts = params(cfg)
    return _flops(cfg, counts.active["output"] - counts.norms, context, causal)


def dense_flops_per_token(cfg: Config, context: int = 0, causal: bool = True) -> int:
    """As `flops_per_token`, for the dense model of the same size: every expert serves every token."""
    counts = params(cfg)
    idle = (cfg.experts.n_experts - cfg.experts.top_k) * counts.expert
    return _flops(cfg, counts.active["output"] - counts.norms + idle, context, causal)


def _flops(cfg: Config, multiplied: int, context: int, causal: bool) -> int:
    q = cfg.attention.n_heads * cfg.attention.head_dim
    # 4 q context is even, so half of it stays a whole number.
    attention = cfg.n_layers * 4 * q * context // (2 if causal else 1)
    return 2 * multiplied + attention
