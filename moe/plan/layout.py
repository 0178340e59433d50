"""How a model is laid out over GPUs, for training or for serving, from strict TOML.

Routed experts divide over `ep` x `expert_tp` GPUs; everything else over `tp`. Within one pipeline stage there are
`tp` x `cp` x `dp` GPUs, and expert parallelism takes its ranks from these (ep x expert_tp divides them).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe.config import CONFIG_DIR
from moe.errors import ConfigError
from moe.io.toml import did_you_mean, from_table
from moe.plan.bounds import whole
from moe.plan.hardware import read_table
from moe.plan.quantities import Quantity, assumed, quantity
from moe.plan.shape import Shape
from moe.plan.sizes import element_bytes

LAYOUT_DIR = CONFIG_DIR / "layouts"


@dataclass(frozen=True)
class Layout:
    """Parallel degrees, batch and storage. `assumed` names the settings that its source does not state, and why.

    `interleave`: model chunks per pipeline stage (virtual stages). `recompute`: "full" keeps only each block's input,
    "selective" all but what attention makes, "none" everything. `stage_layers`: layers of each stage, where they are
    not spread evenly. `batch_tokens`: tokens of an optimizer step. `kv_sharding`: "heads" splits the KV cache by heads
    over tp, which replicates a single head; "batch" splits it by sequences. `zero`: 0 none, 1 optimizer states, 2 and
    gradients, 3 and weights, over data parallel ranks.
    """

    name: str = "layout"
    hardware: str = "a100-80"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 0  # 0: as tp
    zero: Literal[0, 1, 2, 3] = 1
    interleave: int = 1
    schedule: Literal["gpipe", "1f1b", "zero-bubble"] = "1f1b"
    recompute: Literal["full", "selective", "none"] = "full"
    sequence_parallel: bool = True
    micro_batch: int = 1
    seq_len: int = 8192
    batch_tokens: int = 0
    stage_layers: tuple[int, ...] = ()
    weights: str = "bf16"
    gradients: str = "bf16"
    kv_cache: str = "bf16"
    kv_sharding: Literal["heads", "batch"] = "heads"
    assumed: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "cp", "ep", "interleave", "micro_batch", "seq_len"):
            whole(1, 10**9, **{name: getattr(self, name)})
        whole(0, 10**9, expert_tp=self.expert_tp)
        whole(0, 10**15, batch_tokens=self.batch_tokens)
        for name in ("weights", "gradients", "kv_cache"):
            element_bytes(getattr(self, name))
        ranks = self.tp * self.cp * self.dp
        self._require(
            ranks % self.expert_ranks == 0,
            "ep",
            f"ep x expert_tp = {self.expert_ranks} must divide the {ranks} GPUs of a stage (tp x cp x dp)",
        )
        self._require(
            not self.stage_layers or len(self.stage_layers) == self.pp,
            "stage_layers",
            f"must have pp = {self.pp} entries, or be [] to spread the layers evenly",
        )
        self._require(all(n >= 0 for n in self.stage_layers), "stage_layers", "entries must be 0 or more")
        self._require(
            self.pp > 1 or self.interleave == 1, "interleave", "needs a pipeline: pp of at least 2, or set it to 1"
        )
        for name in self.assumed:
            if name not in _SETTINGS:
                raise ConfigError(f"assumed: {name!r} is not a setting of a layout{did_you_mean(name, _SETTINGS)}")

    def _require(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{name} = {getattr(self, name)!r}: {rule}")

    @property
    def expert_ranks(self) -> int:
        """GPUs over which one layer's routed experts are divided."""
        return self.ep * (self.expert_tp or self.tp)

    @property
    def expert_dp(self) -> int:
        """Copies of each routed expert: the GPUs over which its gradient is reduced."""
        return self.tp * self.cp * self.dp // self.expert_ranks

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tp * self.cp * self.pp * self.dp

    def value(self, name: str) -> Quantity:
        """A setting as a quantity that remembers whether it is assumed."""
        unit = {"batch_tokens": "token", "seq_len": "token"}.get(name, "")
        q = quantity(getattr(self, name), unit, key=f"layout.{name}")
        return assumed(q, f"layout.{name}", note=self.assumed[name]) if name in self.assumed else q

    def layers_of(self, shape: Shape) -> tuple[range, ...]:
        """The layers of each stage.

        Raises:
            ConfigError: the layers do not divide over the stages, or `stage_layers` is for another number of them.
        """
        counts = self.stage_layers
        if counts:
            self._require(sum(counts) == shape.n_layers, "stage_layers", f"must sum to {shape.n_layers} layers")
        else:
            chunks = self.pp * self.interleave
            if shape.n_layers % chunks:
                fits = [n for n in range(1, shape.n_layers + 1) if shape.n_layers % (n * self.interleave) == 0]
                nearest = min(fits, key=lambda n: abs(n - self.pp))
                raise ConfigError(
                    f"pp = {self.pp}: {shape.n_layers} layers do not divide into pp x interleave = {chunks} chunks; "
                    f"give stage_layers, or pp = {nearest}"
                )
            counts = (shape.n_layers // self.pp,) * self.pp
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return tuple(range(start, start + n) for start, n in zip(starts, counts, strict=True))

    def check(self, shape: Shape) -> None:
        """Whether `shape` can be laid out so.

        Raises:
            ConfigError: heads, widths, experts or layers that do not divide; the message names the nearest that do.
        """
        expert_tp = self.expert_tp or self.tp
        a, m = shape.main.attention, shape.main.mlp
        for name, degree, what, n in (
            ("tp", self.tp, "query heads", a.n_heads),
            ("tp", self.tp, "d_model", shape.d_model),
            ("expert_tp", expert_tp, "d_ff", m.d_ff),
            ("ep", self.ep, "experts", max(1, m.n_experts)),
        ):
            if n % degree:
                fits = [i for i in range(1, n + 1) if n % i == 0]
                nearest = min(fits, key=lambda i: abs(i - degree))
                raise ConfigError(
                    f"{name} = {degree}: does not divide {n:,} {what}; the nearest that does is {nearest}"
                )
        self.layers_of(shape)

    def micro_batches(self) -> int:
        """Micro-batches of one data parallel replica in a step, rounded to a whole number.

        Raises:
            ConfigError: no batch is set, or it is smaller than one micro-batch on each replica.
        """
        self._require(self.batch_tokens > 0, "batch_tokens", "set the tokens of an optimizer step")
        n = round(self.batch_tokens / (self.seq_len * self.micro_batch * self.dp))
        least = self.seq_len * self.micro_batch * self.dp
        self._require(
            n >= 1, "batch_tokens", f"must be at least {least:,}: one micro-batch on each of {self.dp} replicas"
        )
        return n

    def replace(self, **changes: Any) -> "Layout":
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)


_SETTINGS = [f.name for f in dataclasses.fields(Layout)]


def load_layout(name_or_path: str | Path) -> Layout:
    """Read a shipped layout by name ("gpt4-train") or a TOML file by path.

    Raises:
        ConfigError: no such name or file, an unknown key, a wrong type, a layout that cannot be.
    """
    table, place = read_table(name_or_path, LAYOUT_DIR, "layout")
    try:
        return layout_from(table, Path(place).stem)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def layout_from(table: dict[str, Any], name: str = "layout", base: Layout | None = None) -> Layout:
    """A layout from a table of settings, strictly; what the table lacks comes from `base` or the defaults.

    Raises:
        ConfigError: an unknown key, a wrong type, a layout that cannot be.
    """
    if "name" in table:
        raise ConfigError("unknown key 'name': a layout is called as its file is")
    # 60e6 is a whole number of tokens.
    values = {key: int(v) if type(v) is float and v.is_integer() else v for key, v in table.items()}
    return from_table(Layout, values if base is not None else {"name": name, **values}, base=base)
