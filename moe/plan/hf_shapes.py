"""The shape of a published model from its Hugging Face config.json, counted as its checkpoint holds it.

Vision towers, audio encoders and multi-token-prediction layers are left out: what is counted is the text decoder.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe.errors import ConfigError
from moe.io.toml import shown
from moe.plan.shape import Attention, Layer, Mlp, Shape

_MISSING: Any = object()
MOST_LAYERS = 100_000


class _Reader:
    """Typed reading of a config.json; every complaint names file, key, value and remedy."""

    def __init__(self, content: Mapping[str, Any], place: str) -> None:
        self.content, self.place = content, place

    def fail(self, key: str, rule: str) -> ConfigError:
        value = self.content.get(key, _MISSING)
        return ConfigError(f"{self.place}: {key} {'is missing' if value is _MISSING else f'= {shown(value)}'}: {rule}")

    def int(self, *keys: str, default: int | None = None, least: int = 1, most: int = 10**12) -> int:
        """The first of `keys` that is there, a whole number from `least` to `most`."""
        for key in keys:
            value = self.content.get(key)
            if value is None:
                continue
            if type(value) is float and value.is_integer():
                value = int(value)
            if type(value) is not int or not least <= value <= most:
                raise self.fail(key, f"must be a whole number of at least {least}, and at most {most:,}")
            return value
        if default is None:
            close = difflib.get_close_matches(keys[0], self.content, n=1, cutoff=0.75)
            raise self.fail(keys[0], "it is needed" + (f"; did you mean it by {close[0]!r}?" if close else ""))
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "must be a string")
        return value or default

    def list(self, key: str) -> list[Any]:
        value = self.content.get(key)
        if value is not None and not isinstance(value, list):
            raise self.fail(key, "must be a list")
        return value or []

    def section(self, key: str) -> "_Reader":
        value = self.content.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "must be a section")
        return _Reader(value or {}, f"{self.place}, {key}")


def load_hf(path: str | Path) -> Shape:
    """The shape in a config.json, or in the directory that holds one.

    Raises:
        ConfigError: no such file, not JSON, an unknown family, a key missing or impossible.
    """
    place = Path(path)
    if place.is_dir():
        place = place / "config.json"
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{place}: no such file; give a config.json or the directory that holds one") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not a JSON file: {error}") from None
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: must hold an object, as a Hugging Face config.json does")
    name = place.parent.name if place.name == "config.json" else place.stem
    return shape_from_hf(content, name or place.stem, str(place))


def shape_from_hf(content: Mapping[str, Any], name: str = "model", place: str = "config.json") -> Shape:
    """The shape that the content of a config.json describes.

    Raises:
        ConfigError: an unknown family, a key missing or impossible.
    """
    c = _Reader(content, place)
    family = c.text("model_type", "")
    if isinstance(content.get("text_config"), dict):  # a text decoder inside a multi-modal model
        c = c.section("text_config")
        family = c.text("model_type", family)
    if family not in FAMILIES:
        close = difflib.get_close_matches(family, FAMILIES, n=1, cutoff=0.6)
        raise ConfigError(
            f"{place}: model_type = {family!r}: not a family whose tensors are known here"
            f"{f'; did you mean {close[0]!r}?' if close else ''}; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[family](c, family, name)


# ------------------------------------------------------------------------------------------------- Llama's descendants


def _llama_like(c: _Reader, family: str, name: str) -> Shape:
    """RMS norms, rotary positions, gated MLPs; dense or with routed experts in some or all layers."""
    d, n_layers = c.int("hidden_size"), c.int("num_hidden_layers", most=MOST_LAYERS)
    windows = _windows(c, family, n_layers)
    # phimoe: LayerNorms with biases; Grok: four norms a layer; PaLM: attention and MLP side by side behind one norm
    norms = {"phimoe": 4, "grok-1": 4, "palm": 1}.get(family, 2) * d
    routed = _routed_layers(c, family, n_layers)
    expert = _expert_mlp(c, family, d) if any(routed) else None
    layers = []
    for i in range(n_layers):
        mlp = expert if expert and routed[i] else _dense_mlp(c, family, d)
        layers.append(Layer(_attention(c, family, d, windows[i]), mlp, norms))
    vocab = c.int("vocab_size")
    return Shape(
        name,
        d,
        vocab,
        c.int("max_position_embeddings", "max_sequence_length", default=8192),
        tuple(layers),
        tied=c.flag("tie_word_embeddings", default=family == "grok-1"),
        final_norms=(2 if family == "phimoe" else 1) * d,
        head_biases=vocab if c.flag("lm_head_bias", default=False) else 0,
    )


def _attention(c: _Reader, family: str, d: int, window: int) -> Attention:
    heads = c.int("num_attention_heads")
    if family in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        return _latent_attention(c, heads)
    if c.content.get("head_dim") is None and d % heads:
        raise c.fail("num_attention_heads", f"does not divide hidden_size = {d}, and there is no head_dim")
    head_dim = c.int("head_dim", default=d // heads)
    kv_heads = c.int("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise c.fail("num_key_value_heads", f"must divide num_attention_heads = {heads}")
    q, kv = heads * head_dim, kv_heads * head_dim
    biases = norms = 0
    if family in ("qwen2", "qwen2_moe"):
        biases = q + 2 * kv if c.flag("qkv_bias", default=True) else 0
    elif c.flag("attention_bias", default=family == "gpt_oss"):
        biases = q + 2 * kv + (0 if family == "glm4_moe" else d)
    if family == "gpt_oss":
        biases += heads  # attention sinks, one a head
    if family in ("qwen3", "qwen3_moe", "dots1") or (family == "glm4_moe" and c.flag("use_qk_norm", default=False)):
        norms = 2 * head_dim
    elif family == "olmoe":
        norms = q + kv
    return Attention(heads, kv_heads, head_dim, window=window, biases=biases, norms=norms)


def _latent_attention(c: _Reader, heads: int) -> Attention:
    rope, nope = c.int("qk_rope_head_dim"), c.int("qk_nope_head_dim")
    q_rank, kv_rank = c.int("q_lora_rank", default=0, least=0), c.int("kv_lora_rank")
    v_dim = c.int("v_head_dim")
    return Attention(
        heads, heads, nope + rope, v_dim, q_rank=q_rank, kv_rank=kv_rank, rope_dim=rope, norms=q_rank + kv_rank
    )


def _windows(c: _Reader, family: str, n_layers: int) -> list[int]:
    """What each layer's tokens see: 0 for all before them, or a window."""
    width = c.int("sliding_window", "attention_chunk_size", default=0, least=0)
    kinds = c.list("layer_types")
    if kinds and len(kinds) != n_layers:
        raise c.fail("layer_types", f"has {len(kinds)} entries for num_hidden_layers = {n_layers}")
    if family == "llama4":
        step = c.int("no_rope_layer_interval", default=4)
        rope = c.list("no_rope_layers") or [int((i + 1) % step != 0) for i in range(n_layers)]
        return [width if kept else 0 for kept in rope][:n_layers]
    if kinds:
        return [width if kind in ("sliding_attention", "chunked_attention") else 0 for kind in kinds]
    if family == "gpt_oss":
        return [width if i % 2 == 0 else 0 for i in range(n_layers)]
    if family.startswith("qwen") and not c.flag("use_sliding_window", default=False):
        return [0] * n_layers
    return [width] * n_layers


def _routed_layers(c: _Reader, family: str, n_layers: int) -> list[bool]:
    """Which layers have routed experts."""
    if family in ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "dots1"):
        if c.content.get("n_routed_experts") is None:
            return [False] * n_layers
        first, step = c.int("first_k_dense_replace", default=0, least=0), c.int("moe_layer_freq", default=1)
        return [i >= first and i % step == 0 for i in range(n_layers)]
    if family in ("qwen2_moe", "qwen3_moe"):
        step, only_dense = c.int("decoder_sparse_step", default=1), set(c.list("mlp_only_layers"))
        return [i not in only_dense and (i + 1) % step == 0 for i in range(n_layers)]
    if family == "llama4":
        if c.list("moe_layers"):
            return [i in set(c.list("moe_layers")) for i in range(n_layers)]
        step = c.int("interleave_moe_layer_step", default=1)
        return [(i + 1) % step == 0 for i in range(n_layers)]
    return [family in ("mixtral", "olmoe", "phimoe", "gpt_oss", "grok-1", "granitemoe")] * n_layers


def _expert_mlp(c: _Reader, family: str, d: int) -> Mlp:
    n = c.int("num_local_experts", "num_experts", "n_routed_experts")
    k = c.int("num_experts_per_tok", "experts_per_token", "num_selected_experts")
    if k > n:
        raise c.fail("num_experts_per_tok", f"must not be greater than the {n} experts")
    f = c.int("moe_intermediate_size", "intermediate_size")
    shared, gate, biases, router_biases = 0, False, 0, 0
    if family == "qwen2_moe":
        shared, gate = c.int("shared_expert_intermediate_size"), True
    elif family == "llama4":
        shared = f
    elif family in ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "dots1"):
        shared = f * c.int("n_shared_experts", default=0, least=0)
        # The bias that balances the load (Wang et al. 2024) is a tensor of the checkpoint.
        router_biases = n if family != "deepseek_v2" else 0
    elif family == "gpt_oss":
        biases, router_biases = 2 * f + d, n
    return Mlp(f, True, n, k, shared, gate, biases, router_biases)


def _dense_mlp(c: _Reader, family: str, d: int) -> Mlp:
    f = c.int("intermediate_size_mlp", "intermediate_size") if family == "llama4" else c.int("intermediate_size")
    return Mlp(f, biases=2 * f + d if c.flag("mlp_bias", default=False) else 0)


# ------------------------------------------------------------------------------------------------------ other families


def _dbrx(c: _Reader, family: str, name: str) -> Shape:
    d, heads = c.int("d_model"), c.int("n_heads")
    attention, ffn = c.section("attn_config"), c.section("ffn_config")
    mlp = Mlp(ffn.int("ffn_hidden_size"), True, ffn.int("moe_num_experts"), ffn.int("moe_top_k"))
    layer = Layer(Attention(heads, attention.int("kv_n_heads", default=heads), d // heads), mlp, norms=2 * d)
    layers = (layer,) * c.int("n_layers", most=MOST_LAYERS)
    tied = c.flag("tie_word_embeddings", default=False)
    return Shape(name, d, c.int("vocab_size"), c.int("max_seq_len"), layers, tied, final_norms=d)


def _mpt(c: _Reader, family: str, name: str) -> Shape:
    """MPT as llm-foundry builds it: biases and learned positions unless turned off, tied embeddings."""
    d, heads = c.int("d_model"), c.int("n_heads")
    attention = c.section("attn_config")
    multi_query = attention.text("attn_type", "multihead_attention") == "multiquery_attention"
    kv_heads = 1 if multi_query else attention.int("kv_n_heads", default=heads)
    biased = not c.flag("no_bias", default=False)
    head_dim, f = d // heads, d * c.int("expansion_ratio", default=4)
    attention_biases = (heads + 2 * kv_heads) * head_dim + d if biased else 0
    layer = Layer(
        Attention(heads, kv_heads, head_dim, biases=attention_biases),
        Mlp(f, gated=False, biases=f + d if biased else 0),
        norms=(4 if biased else 2) * d,
    )
    length = c.int("max_seq_len", default=2048)
    learned = c.flag("learned_pos_emb", default=True) and not attention.flag("alibi", default=False)
    tied = c.flag("tie_word_embeddings", default=True)
    layers = (layer,) * c.int("n_layers", most=MOST_LAYERS)
    positions, final = length if learned else 0, (2 if biased else 1) * d
    return Shape(name, d, c.int("vocab_size"), length, layers, tied, positions, final)


def _gpt2(c: _Reader, family: str, name: str) -> Shape:
    d, heads = c.int("n_embd"), c.int("n_head")
    f = c.int("n_inner", default=4 * d)
    layer = Layer(Attention(heads, heads, d // heads, biases=4 * d), Mlp(f, gated=False, biases=f + d), norms=4 * d)
    length = c.int("n_positions", default=1024)
    layers = (layer,) * c.int("n_layer", most=MOST_LAYERS)
    tied = c.flag("tie_word_embeddings", default=True)
    return Shape(name, d, c.int("vocab_size"), length, layers, tied, positions=length, final_norms=2 * d)


_LLAMA_LIKE = (
    *("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe"),
    *("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "dots1", "gpt_oss", "grok-1", "llama4", "palm"),
)
# The families whose tensors are known; llama4_text is the inside of llama4, and some ports write grok for grok-1.
FAMILIES: dict[str, Callable[[_Reader, str, str], Shape]] = {
    **{family: _llama_like for family in _LLAMA_LIKE},
    "llama4_text": lambda c, _family, name: _llama_like(c, "llama4", name),
    "grok": lambda c, _family, name: _llama_like(c, "grok-1", name),
    "dbrx": _dbrx,
    "mpt": _mpt,
    "gpt2": _gpt2,
}
