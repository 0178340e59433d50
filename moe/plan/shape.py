"""The shape of any decoder, as far as its cost depends on it: layers of attention and MLP, embeddings, vocabulary.

`shape_of` makes one from a configuration of this library; hf_shapes.py makes one from a Hugging Face config.json;
models.py takes either, by name or path.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from moe.config import Config


@dataclass(frozen=True)
class Attention:
    """One layer's attention. Widths in elements; the query width is free of the model width.

    `kv_rank` > 0 is multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values are made
    from a latent vector of that rank, which is what the cache holds, together with `rope_dim` rotated elements that all
    heads share; `head_dim` then includes `rope_dim`. `q_rank` > 0: queries come through a latent of that rank.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int = 0  # 0: as head_dim
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    window: int = 0  # positions that a token sees; 0: all before it
    biases: int = 0  # vectors that are added: biases, sinks; in elements
    norms: int = 0  # of queries, keys, latents; in elements

    @property
    def q(self) -> int:
        """The query width."""
        return self.n_heads * self.head_dim

    @property
    def kv(self) -> int:
        """The key width."""
        return self.n_kv_heads * self.head_dim

    @property
    def v_dim(self) -> int:
        """Width of a value head."""
        return self.v_head_dim or self.head_dim

    @property
    def cached(self) -> int:
        """Elements that the KV cache holds per token and layer."""
        return self.kv_rank + self.rope_dim if self.kv_rank else self.n_kv_heads * (self.head_dim + self.v_dim)

    def seen(self, context: int) -> int:
        """Positions that the last token of `context` sees."""
        return min(context, self.window) if self.window else context


@dataclass(frozen=True)
class Mlp:
    """One layer's MLP: dense (`n_experts` 0) of width `d_ff`, or routed experts of that width, with shared ones."""

    d_ff: int
    gated: bool = True
    n_experts: int = 0
    top_k: int = 0
    shared_d_ff: int = 0  # widths of the shared experts together
    shared_gate: bool = False  # a gate of one output on the shared experts
    biases: int = 0  # of the dense MLP, or of each expert
    router_biases: int = 0

    @property
    def matrices(self) -> int:
        """Weight matrices of one expert: gate, up and down, or up and down."""
        return 3 if self.gated else 2


@dataclass(frozen=True)
class Layer:
    """One block; `norms` counts the elements of its norms of the residual stream."""

    attention: Attention
    mlp: Mlp
    norms: int


@dataclass(frozen=True)
class Shape:
    """A whole decoder."""

    name: str
    d_model: int
    vocab_size: int
    max_seq_len: int
    layers: tuple[Layer, ...]
    tied: bool = False
    positions: int = 0  # rows of a learned position embedding
    final_norms: int = 0  # elements of the norms outside the blocks
    head_biases: int = 0

    def __repr__(self) -> str:
        """Each kind of block once, with how many there are of it."""
        own = ("name", "d_model", "vocab_size", "max_seq_len", "tied", "positions", "final_norms", "head_biases")
        layers = " + ".join(f"{n} x {layer}" for layer, n in self.kinds.items())
        return f"Shape({', '.join(f'{name}={getattr(self, name)!r}' for name in own)}, layers={layers})"

    @property
    def n_layers(self) -> int:
        """How many blocks."""
        return len(self.layers)

    @cached_property
    def kinds(self) -> dict[Layer, int]:
        """Each different kind of block, and how many there are of it."""
        return dict(Counter(self.layers))

    @cached_property
    def main(self) -> Layer:
        """The most frequent kind of block with routed experts, or the most frequent one where none has."""
        kinds = self.kinds
        return max(kinds, key=lambda layer: (layer.mlp.n_experts > 0, kinds[layer]))

    @property
    def n_experts(self) -> int:
        """Routed experts in a layer; 0 for a dense model."""
        return self.main.mlp.n_experts

    @property
    def top_k(self) -> int:
        """Routed experts that serve a token; 0 for a dense model."""
        return self.main.mlp.top_k


def shape_of(cfg: Config) -> Shape:
    """The shape of one of our configurations."""
    a, e = cfg.attention, cfg.experts
    attention, gated = Attention(a.n_heads, a.n_kv_heads, a.head_dim), e.activation == "swiglu"
    mlps = {"moe": Mlp(e.d_ff, gated, e.n_experts, e.top_k)}
    if cfg.dense is not None:
        mlps["dense"] = Mlp(cfg.dense.d_ff, gated)
    return Shape(
        cfg.name,
        cfg.d_model,
        cfg.vocab_size,
        cfg.max_seq_len,
        tuple(Layer(attention, mlps[kind], norms=2 * cfg.d_model) for kind in cfg.layer_kinds),
        cfg.tie_embeddings,
        final_norms=cfg.d_model,
    )


def dense(
    name: str,
    d_model: int,
    n_layers: int,
    *,
    n_heads: int = 0,
    n_kv_heads: int = 0,
    head_dim: int = 128,
    d_ff: int = 0,
    gated: bool = False,
    vocab_size: int = 51_200,
    max_seq_len: int = 2048,
    tied: bool = True,
) -> Shape:
    """A dense decoder without biases; as many heads as fill the width and d_ff 4 d_model where they are not given."""
    heads = n_heads or d_model // head_dim
    attention = Attention(heads, n_kv_heads or heads, head_dim)
    layer = Layer(attention, Mlp(d_ff or 4 * d_model, gated), norms=2 * d_model)
    return Shape(name, d_model, vocab_size, max_seq_len, (layer,) * n_layers, tied, final_norms=d_model)
