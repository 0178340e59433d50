"""Mixtral's `config.json` and our `Config`, each made of the other. Needs no transformers."""

import math
from collections.abc import Mapping
from typing import Any

from moe.config import AttentionConfig, Config, ExpertsConfig, RopeConfig, RouterConfig, TrainConfig
from moe.errors import ConfigError, HFError
from moe.io.toml import shown

# What a key missing from a Mixtral config.json means: the defaults of transformers' MixtralConfig.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
}
_THETA = 1e6
# A table of our own in config.json, which transformers keeps and does not read: how the model was trained to see text.
_OURS, _SEEN = "gpt4_moe", ("document_mask", "seq_len")


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The content of Mixtral's `config.json` for the same function from tokens to logits.

    Mixtral's balance loss is `top_k` when even and ours is 1, hence the division. `router.z_loss` and most of `train`
    only matter in training and have no place in it; the mask and the window that scores depend on stand apart, as
    "gpt4_moe", where they are not the default.

    Raises:
        HFError: experts.activation is not "swiglu", there are dense layers, or router.bias_update_rate is not 0.
    """
    if cfg.experts.activation != "swiglu":
        raise HFError(
            f"experts.activation = {cfg.experts.activation!r}: Mixtral's experts have three matrices (swiglu), "
            "these two; keep the checkpoint with moe.save"
        )
    if cfg.dense is not None:
        raise HFError(
            f"dense.layers = {cfg.dense.layers}: every layer of Mixtral has experts; keep the checkpoint with moe.save"
        )
    if cfg.router.bias_update_rate != 0:
        raise HFError(
            f"router.bias_update_rate = {cfg.router.bias_update_rate}: the router's bias_E chooses experts and Mixtral "
            "has none; keep the checkpoint with moe.save, or train with router.balance_loss and bias_update_rate = 0"
        )
    attention, experts = cfg.attention, cfg.experts
    seen = {key: getattr(cfg.train, key) for key in _SEEN if getattr(cfg.train, key) != getattr(TrainConfig(), key)}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": experts.d_ff,
        "hidden_act": "silu",
        "num_local_experts": experts.n_experts,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": cfg.router.balance_loss / experts.top_k,
        "router_jitter_noise": 0.0,
        "attention_dropout": 0.0,
        "max_position_embeddings": cfg.max_seq_len,
        "sliding_window": None,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_rope_to_hf(attention.rope),
        **({_OURS: seen} if seen else {}),
    }


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """As transformers 5 reads it (`rope_parameters`), and as 4 does, which would else take other frequencies."""
    scaling: dict[str, Any] = {}
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "yarn":
        scaling |= {
            "original_max_position_embeddings": rope.original_max_seq_len,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta, **scaling},
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
    }


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The `Config` of a Mixtral `config.json`, in the form of transformers 4 or 5; the reverse of `config_to_hf`.

    Raises:
        HFError: another model family, or a setting that this program has no counterpart for.
    """
    _refuse(hf)
    full = _Settings({**_DEFAULTS, "num_local_experts": hf.get("num_experts", 8), **hf}, "")
    try:
        heads, top_k = full.whole("num_attention_heads"), full.whole("num_experts_per_tok")
        return Config(
            name="mixtral",
            d_model=full.whole("hidden_size"),
            n_layers=full.whole("num_hidden_layers"),
            vocab_size=full.whole("vocab_size"),
            max_seq_len=full.whole("max_position_embeddings"),
            tie_embeddings=full.get("tie_word_embeddings", bool, "true or false"),
            norm_eps=full.number("rms_norm_eps"),
            attention=AttentionConfig(
                n_heads=heads,
                n_kv_heads=full.whole("num_key_value_heads", heads),
                head_dim=full.whole("head_dim", full.whole("hidden_size") // max(heads, 1)),
                rope=_rope_from_hf(full),
            ),
            router=RouterConfig(balance_loss=full.number("router_aux_loss_coef") * top_k, z_loss=0.0),
            experts=ExpertsConfig(
                n_experts=full.whole("num_local_experts"), top_k=top_k, d_ff=full.whole("intermediate_size")
            ),
            train=_train_from_hf(full),
        )
    except ConfigError as error:
        raise HFError(f"config.json describes a model that cannot be: {error}") from error


def _train_from_hf(full: "_Settings") -> TrainConfig:
    given = dict.get(full, _OURS) or {}
    if not isinstance(given, Mapping):
        raise HFError(f"{_OURS} = {given!r}: must be a table")
    ours = _Settings(given, f"{_OURS}.")
    mask = ours.get("document_mask", bool, "true or false", False)
    return TrainConfig(document_mask=mask, seq_len=ours.whole("seq_len", 0))


class _Settings(dict[str, Any]):
    """A table of config.json whose values are looked up by type; `section` is what stands before its keys."""

    def __init__(self, table: Mapping[str, Any], section: str) -> None:
        super().__init__(table)
        self.section = section

    def get(self, key: str, kind: type, rule: str, default: Any = None) -> Any:  # type: ignore[override]
        """The value, or `default` where there is none or null; else it must be of `kind` (bool is no number)."""
        value = self[key] if dict.get(self, key) is not None else default
        wide = float if kind is float and type(value) is int and abs(value) < 2**63 else type(value)
        if wide is not kind or (kind is float and not math.isfinite(value)):
            raise ConfigError(f"{self.section}{key} = {shown(value)}: must be {rule}")
        return kind(value)

    def whole(self, key: str, default: int | None = None) -> int:
        return self.get(key, int, "a whole number", default)

    def number(self, key: str, default: float | None = None) -> float:
        return self.get(key, float, "a number", default)


def _refuse(hf: Mapping[str, Any]) -> None:
    """Raises HFError for the first setting without a counterpart."""
    for field, ok, remedy in (
        ("model_type", ("mixtral",), "only Mixtral's architecture is this program's; convert the weights yourself"),
        ("hidden_act", ("silu", "swish", None), "the experts here are SwiGLU, whose gate is silu"),
        ("attention_bias", (False, None), "attention has no biases here"),
        ("partial_rotary_factor", (1, None), "whole heads are rotated here"),
        ("quantization_config", (None,), "save the model dequantised, in bfloat16 or float32"),
        ("attention_dropout", (0, None), "there is no dropout here; inference does not use it: set it to 0"),
        ("router_jitter_noise", (0, None), "there is no jitter here; inference does not use it: set it to 0"),
    ):
        if hf.get(field) not in ok:
            raise HFError(f"{field} = {hf.get(field)!r}: {remedy}")
    experts = hf.get("num_experts")  # transformers' other name for it
    if experts is not None and hf.get("num_local_experts", experts) != experts:
        raise HFError(f"num_experts = {experts!r}, but num_local_experts = {hf['num_local_experts']!r}: remove one")
    window, context = hf.get("sliding_window"), hf.get("max_position_embeddings", _DEFAULTS["max_position_embeddings"])
    if window is not None and not (type(window) is type(context) is int and window >= context):
        raise HFError(
            f"sliding_window = {window!r} is below max_position_embeddings = {context!r}: attention here sees "
            f"everything; set max_position_embeddings to {window!r} in config.json for the same results up to that "
            "length"
        )


def _rope_from_hf(full: _Settings) -> RopeConfig:
    """Of `rope_scaling` (transformers 4) or `rope_parameters` (5), which may both be there if they agree."""
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = dict.get(full, name)
        if given:
            if not isinstance(given, Mapping):
                raise HFError(f"{name} = {given!r}: must be a table")
            found[name] = _rope_of(_Settings({k: v for k, v in given.items() if v is not None}, f"{name}."), full)
    if len(set(found.values())) == 2:
        raise HFError("rope_scaling and rope_parameters say different things: remove the one that is not meant")
    return next(iter(found.values()), RopeConfig(theta=full.number("rope_theta", _THETA)))


def _rope_of(rope: _Settings, full: _Settings) -> RopeConfig:
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind not in ("default", "linear", "yarn"):
        raise HFError(f"{rope.section}rope_type = {kind!r}: there are only default, linear and yarn here")
    theta = rope.number("rope_theta", full.number("rope_theta", _THETA))
    if theta != full.number("rope_theta", theta):
        raise HFError(f"{rope.section}rope_theta = {theta}, but rope_theta = {full['rope_theta']}: remove one")
    context = full.whole("max_position_embeddings")
    original = rope.whole("original_max_position_embeddings", full.whole("original_max_position_embeddings", context))
    if kind == "yarn" and original != full.whole("original_max_position_embeddings", original):
        raise HFError(f"{rope.section}original_max_position_embeddings = {original}, and another outside: remove one")
    factor = rope.number("factor", context / max(original, 1) if kind == "yarn" else 1.0)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    temperature = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    for field, ok in (("attention_factor", temperature), ("truncate", True), ("partial_rotary_factor", 1.0)):
        value = rope.pop(field, ok)
        if not isinstance(value, float | int) or not math.isclose(value, ok, rel_tol=1e-6):
            raise HFError(f"{rope.section}{field} = {value!r}: here it is always {ok!r}")
    known = {"rope_theta", "original_max_position_embeddings", "factor", "beta_fast", "beta_slow"}
    rest = {key: value for key, value in rope.items() if key not in known}
    if rest:
        raise HFError(f"{rope.section[:-1]} has {rest}: there is no counterpart here; remove it if it has no effect")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    return RopeConfig(theta, "yarn", factor, original, fast, slow)
