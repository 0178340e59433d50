"""The one description of a model and of how to train it: frozen dataclasses, strict TOML, the replica rule.

Every default is the full GPT-4 shape of the article at 8k context, so a TOML file only says what differs. Loading is
strict: an unknown key, a wrong type or an impossible value raises `ConfigError`, which names the field, the value
and what would be right (moe/io/toml.py). No package is imported.

The comment beside or above a field is its meaning in docs/configuration.md, which docs/generated.py makes of them.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe.errors import ConfigError
from moe.io.toml import did_you_mean, from_table, parse_value, read_file, require, shortened, shown, to_lines

CONFIG_DIR = Path(__file__).parent / "configs"

LARGEST = 1e30  # of a number that is no count: float32 holds it, and its product with a tensor's usual scale


def _positive(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value > 0, section + name, value, "must be greater than 0")
        most, rule = (2**31, "must be below 2^31") if isinstance(value, int) else (LARGEST, f"must be below {LARGEST}")
        require(value < math.inf, section + name, value, "must be finite")
        require(value < most, section + name, value, rule)


def _not_negative(section: str, owner: object, rule: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(0 <= value < math.inf, section + name, value, f"must be 0 or more{rule}")
        require(isinstance(value, int) or value < LARGEST, section + name, value, f"must be below {LARGEST}")


# --------------------------------------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, rotate-half form (Su et al. 2021), and its scaling to longer contexts.

    "linear" scaling: Chen et al. 2023; "yarn", which also warms the attention temperature: Peng et al. 2023.
    """

    theta: float = 10_000.0  # base of the rotations: pair i of a head turns by theta^(-2i / head_dim) per position
    # to a longer context: "linear" divides positions, "yarn" scales by wavelength
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0  # how many times the context grows; 1 with scaling "none"
    original_max_seq_len: int = 8192  # the context of the pre-trained model, for "yarn"
    beta_fast: float = 32.0  # "yarn": pairs that turn more often than this within it keep their frequency
    beta_slow: float = 1.0  # "yarn": pairs that turn less often than this are slowed by the whole factor

    def __post_init__(self) -> None:
        _positive("attention.rope.", self, "theta", "factor", "original_max_seq_len", "beta_fast", "beta_slow")
        for name in ("theta", "factor", "beta_fast", "beta_slow"):  # their powers and products stay in float32's range
            value = getattr(self, name)
            require(1e-30 <= value <= 1e30, f"attention.rope.{name}", value, "must be between 1e-30 and 1e30")
        require(
            self.scaling != "none" or self.factor == 1.0,
            "attention.rope.factor",
            self.factor,
            'has no effect with scaling = "none"; set scaling to "linear" or "yarn"',
        )
        if self.scaling == "yarn":
            rule = 'must be greater than 1 with scaling = "yarn", which divides by its logarithm'
            require(self.theta > 1, "attention.rope.theta", self.theta, rule)
            rule = f"must not be less than beta_slow = {self.beta_slow}"
            require(self.beta_fast >= self.beta_slow, "attention.rope.beta_fast", self.beta_fast, rule)


@dataclass(frozen=True)
class AttentionConfig:
    """Attention with any number of key/value heads; one is the article's multi-query attention."""

    n_heads: int = 168  # query heads; n_heads x head_dim is free of d_model
    n_kv_heads: int = 1  # key/value heads, a divisor of n_heads: 1 is multi-query attention
    head_dim: int = 128  # width of a head, even
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        _positive("attention.", self, "n_heads", "n_kv_heads", "head_dim")
        require(
            self.head_dim % 2 == 0,
            "attention.head_dim",
            self.head_dim,
            f"rotary embedding turns pairs, so it must be even; the nearest is {self.head_dim + 1}",
        )
        require(
            self.n_heads % self.n_kv_heads == 0,
            "attention.n_kv_heads",
            self.n_kv_heads,
            f"must divide n_heads = {self.n_heads}; the nearest that does is "
            f"{_nearest_divisor(self.n_heads, self.n_kv_heads)}",
        )


@dataclass(frozen=True)
class RouterConfig:
    """What keeps the expert loads even: loss weights, and the rate of bias-based (auxiliary-loss-free) balancing."""

    balance_loss: float = 0.01  # weight of the balance loss in the objective; 0 turns it off
    z_loss: float = 0.001  # weight of the z-loss; 0 turns it off
    bias_update_rate: float = 0.0  # step of the bias that balances without a loss; 0 turns it off

    def __post_init__(self) -> None:
        _not_negative("router.", self, "; 0 turns it off", "balance_loss", "z_loss", "bias_update_rate")


@dataclass(frozen=True)
class ExpertsConfig:
    """The expert MLPs of each layer."""

    n_experts: int = 16  # experts in each layer
    top_k: int = 2  # experts that serve a token
    d_ff: int = 28_672  # hidden width of an expert
    # "swiglu" has a gate and an up product, "gelu" (tanh form) one product
    activation: Literal["swiglu", "gelu"] = "swiglu"

    def __post_init__(self) -> None:
        _positive("experts.", self, "n_experts", "top_k", "d_ff")
        require(
            self.top_k <= self.n_experts,
            "experts.top_k",
            self.top_k,
            f"must not be greater than experts.n_experts = {self.n_experts}",
        )


@dataclass(frozen=True)
class DenseConfig:
    """Plain MLPs instead of experts in the first layers, as in DeepSeekMoE (Dai et al. 2024, section 4.1.2).

    The section is absent by default: all layers have experts.
    """

    layers: int  # the first layers have a plain MLP
    d_ff: int  # hidden width of these MLPs

    def __post_init__(self) -> None:
        _positive("dense.", self, "layers", "d_ff")


@dataclass(frozen=True)
class TrainConfig:
    """How `moe train` trains."""

    steps: int = 1000  # optimizer steps, where `tokens` is empty
    tokens: int | str = ""  # length in tokens: "3M", "13T"; "epochs": once through the epochs; "": `steps` decides
    # how often each source is read, {text = 2, code = 4}; 1 if not named, 0 leaves it out
    epochs: dict[str, int] = field(default_factory=dict, hash=False)
    seq_len: int = 0  # tokens of a sequence; 0: max_seq_len
    document_mask: bool = False  # attention stays inside each document
    batch_size: int = 16  # sequences of an optimizer step
    batch_ramp: str = ""  # takes its place: "0:64k 2M:128k" is 64,000 tokens a step, from 2 million on 128,000
    micro_batch: int = 0  # sequences in the model at a time, a divisor of batch_size; 0: all
    # "muon" for the blocks' matrices, AdamW for the rest; or AdamW for all
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3  # peak rate of AdamW
    muon_lr: float = 0.02  # peak rate of Muon
    muon_momentum: float = 0.95  # momentum of Muon
    embedding_lr: float = 1.0  # the embedding's rate, as a multiple of lr
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's averages of the gradient and of its square
    weight_decay: float = 0.1  # decoupled, on matrices only
    schedule: Literal["cosine", "wsd"] = "cosine"  # "cosine" falls over all tokens, "wsd" holds and falls at the end
    warmup: int = 100  # steps, of the first batch size, over which rates rise
    min_lr: float = 0.1  # what rates end at, as a share of their peak
    decay: float = 0.2  # "wsd": the last share of the tokens, over which rates fall
    grad_clip: float = 1.0  # largest norm of the gradient of all parameters
    # of matrix products; "auto": bf16 where the device has units for it (moe/device.py)
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # memory for time, see moe/recompute.py
    compile: bool = False  # torch.compile
    seed: int = 0  # of the weights and of the order of the data
    eval_every: int = 250  # steps between scores of held-out text; 0: only at the end
    eval_tokens: int = 65_536  # held-out tokens of such a score; 0: none are made
    final_eval_tokens: int = 0  # held-out tokens of the score at the end; 0: all
    sample_every: int = 0  # steps between samples of what the model writes; 0: only at the end
    save_every: int = 250  # steps between checkpoints; 0: only at the end
    log_every: int = 10  # steps between records in metrics.jsonl

    def __post_init__(self) -> None:
        _positive("train.", self, "steps", "batch_size", "lr", "muon_lr", "embedding_lr", "grad_clip", "log_every")
        intervals = "eval_every", "eval_tokens", "final_eval_tokens", "sample_every", "save_every"
        _not_negative("train.", self, "", "seq_len", "micro_batch", "warmup", *intervals, "weight_decay")
        for name in ("min_lr", "decay"):
            require(0 <= getattr(self, name) <= 1, f"train.{name}", getattr(self, name), "is a fraction: 0 to 1")
        require(0 <= self.muon_momentum < 1, "train.muon_momentum", self.muon_momentum, "must be in [0, 1)")
        require(all(0 <= b < 1 for b in self.betas), "train.betas", self.betas, "each must be in [0, 1)")
        require(
            self.micro_batch == 0 or self.batch_size % self.micro_batch == 0,
            "train.micro_batch",
            self.micro_batch,
            f"must divide train.batch_size = {self.batch_size}",
        )
        for source, times in self.epochs.items():
            require(times >= 0, f"train.epochs.{source}", times, "must be 0 (leave it out) or more")
        if self.tokens not in ("", "epochs"):
            require(parse_tokens("train.tokens", self.tokens) > 0, "train.tokens", self.tokens, "must be more than 0")
        self.ramp()

    def ramp(self) -> list[tuple[int, int]]:
        """`batch_ramp` as (tokens done, tokens a step from there on), the first at 0; empty without one.

        Raises:
            ConfigError: not of that form, not beginning at 0, not rising, or a batch of nothing.
        """
        sizes: list[tuple[int, int]] = []
        for part in self.batch_ramp.split():
            begin, colon, size = part.partition(":")
            require(bool(colon), "train.batch_ramp", self.batch_ramp, 'must be like "0:64k 2M:128k 8M:256k"')
            sizes.append((parse_tokens("train.batch_ramp", begin), parse_tokens("train.batch_ramp", size)))
        begins = [begin for begin, _ in sizes]
        ok = not sizes or (begins[0] == 0 and begins == sorted(set(begins)) and all(size > 0 for _, size in sizes))
        require(ok, "train.batch_ramp", self.batch_ramp, "must begin at 0 tokens, go up, and have batches above 0")
        return sizes


def parse_tokens(name: str, text: int | str) -> int:
    """A number of tokens: "64k", "2.5M", "13T" (powers of 1000) or plain digits. Raises ConfigError for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGBT]?)", str(text), re.ASCII)
    value = float(match[1]) * _TOKEN_UNITS[match[2]] if match else math.inf
    if match and value < 2**63 and value == round(value):
        return round(value)
    raise ConfigError(
        f'{name} = {shown(text)}: must be a number of tokens such as "500000", "64k", "2.5M", "10G", "13T"'
    )


_TOKEN_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


# ------------------------------------------------------------------------------------------------------------- root


@dataclass(frozen=True)
class Config:
    """A decoder and its training recipe. `Config()` is the article's GPT-4: 1.8T parameters, 8k context."""

    name: str = "gpt4-8k"  # of the model, and of the run's directory if none is given
    d_model: int = 10_752  # width of the residual stream
    n_layers: int = 120  # layers
    vocab_size: int = 100_352  # ids of the embedding and of the output layer
    max_seq_len: int = 8192  # positions that the model can take
    tie_embeddings: bool = False  # the output layer's weight is the embedding's
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    dense: DenseConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _positive("", self, "d_model", "n_layers", "vocab_size", "max_seq_len", "norm_eps")
        require(self.n_layers <= 100_000, "n_layers", self.n_layers, "must be at most 100,000")
        a, e, dense = self.attention, self.experts, self.dense
        for name, value, elements in (
            ("vocab_size", self.vocab_size, self.vocab_size),
            ("attention.n_heads", a.n_heads, a.n_heads * a.head_dim),
            ("experts.d_ff", e.d_ff, 2 * e.n_experts * e.d_ff),
            ("dense.d_ff", dense.d_ff if dense else 0, 2 * dense.d_ff if dense else 0),
        ):
            rule = f"makes a weight of 2^{(elements * self.d_model).bit_length() - 1} numbers or more: more than can be"
            require(elements * self.d_model < 2**60, name, value, rule)
        require(
            self.train.seq_len <= self.max_seq_len,
            "train.seq_len",
            self.train.seq_len,
            f"must not be greater than max_seq_len = {self.max_seq_len}",
        )
        if self.dense is not None:
            require(
                self.dense.layers < self.n_layers,
                "dense.layers",
                self.dense.layers,
                f"must leave a layer with experts: less than n_layers = {self.n_layers}",
            )

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """What each layer has after its attention: "moe" or "dense"."""
        n_dense = self.dense.layers if self.dense is not None else 0
        return ("dense",) * n_dense + ("moe",) * (self.n_layers - n_dense)

    @property
    def n_moe_layers(self) -> int:
        """Layers with experts."""
        return self.layer_kinds.count("moe")

    def scaled(
        self,
        *,
        d_model: int,
        n_layers: int,
        vocab_size: int | None = None,
        max_seq_len: int | None = None,
        name: str | None = None,
    ) -> "Config":
        """A replica: the same architecture at another width and depth, with the article's ratios kept.

        The query width is 2 d_model, heads are 64 wide below d_model 1536 and 128 from there on, an expert's d_ff is
        8/3 d_model (SwiGLU) or 4 d_model (GELU: the same parameter count). Experts, top-k, key/value heads and the
        number of dense layers stay; their d_ff keeps its ratio to an expert's.

        Raises:
            ConfigError: `d_model` is not a multiple of 96 (192 from 1536 on), where all of these are whole numbers.
        """
        multiple = 96 if d_model < 1536 else 192
        require(
            d_model > 0 and d_model % multiple == 0,
            "d_model",
            d_model,
            f"the replica rule needs a multiple of {multiple} (d_ff = 8/3 d_model, query width 2 d_model); the nearest "
            f"is {max(96, round(d_model / multiple) * multiple)}",
        )
        head_dim = 64 if d_model < 1536 else 128
        d_ff = 8 * d_model // 3 if self.experts.activation == "swiglu" else 4 * d_model
        attention = dataclasses.replace(self.attention, n_heads=2 * d_model // head_dim, head_dim=head_dim)
        dense = self.dense and dataclasses.replace(self.dense, d_ff=round(self.dense.d_ff * d_ff / self.experts.d_ff))
        return dataclasses.replace(
            self,
            name=name or f"{self.name}-{d_model}x{n_layers}",
            d_model=d_model,
            n_layers=n_layers,
            vocab_size=vocab_size or self.vocab_size,
            max_seq_len=max_seq_len or self.max_seq_len,
            attention=attention,
            experts=dataclasses.replace(self.experts, d_ff=d_ff),
            dense=dense,
        )

    def with_overrides(self, assignments: Iterable[str]) -> "Config":
        """A copy with settings changed by `key=value` strings such as `train.lr=3e-4` (values as in TOML).

        Raises:
            ConfigError: not of the form key=value, an unknown key, or a value that cannot be.
        """
        table: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or not key.strip():
                raise ConfigError(f"setting {shortened(assignment)!r}: must be key=value, such as train.lr=3e-4")
            *sections, leaf = key.strip().split(".")
            place = table
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise ConfigError(f"setting {shortened(assignment)!r}: {section} is a setting, not a section")
            place[leaf] = parse_value(text.strip())
        return from_table(Config, table, base=self)

    def to_toml(self) -> str:
        """Every setting as TOML text that `load_config` reads back to an equal `Config`."""
        return "\n".join(to_lines(self, "")) + "\n"


# ---------------------------------------------------------------------------------------------------------- reading


def load_config(name_or_path: str | os.PathLike[str]) -> Config:
    """Read a shipped configuration by name ("gpt4-8k") or any TOML file by path.

    Raises:
        ConfigError: no such name or file, not TOML, unknown key, wrong type, impossible value.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = CONFIG_DIR / f"{name_or_path}.toml"
        if not path.is_file():
            names = shipped()
            raise ConfigError(
                f"no shipped configuration is called {str(name_or_path)!r}"
                f"{did_you_mean(str(name_or_path), names)}; there are: {', '.join(names)}; "
                "or give a path to a .toml file"
            )
    table = read_file(path)
    try:
        return from_table(Config, {"name": path.stem, **table})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def shipped() -> list[str]:
    """The names that `load_config` accepts."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.toml"))


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
