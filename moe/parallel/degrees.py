"""Over how many ranks each kind of parallelism divides a model, and whether a model can be divided so. No torch.

Ranks form two meshes over the same processes. What every token passes lies on (pp, dp_replicate, dp_shard, cp, tp); the
experts, of which a rank holds some, on (pp, dp_replicate, efsdp, ep, tp): expert parallelism takes its ranks from those
that hold different tokens, dp_shard x cp, and what is left of them shards the same experts once more.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moe.config import Config
from moe.errors import ConfigError
from moe.io.toml import did_you_mean
from moe.plan.layout import Layout

# The names of torch.distributed.pipelining's schedules here, and how many stages each rank has at least.
SCHEDULES = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved-1f1b": ("ScheduleInterleaved1F1B", 2),
    "looped-bfs": ("ScheduleLoopedBFS", 2),
    "interleaved-zero-bubble": ("ScheduleInterleavedZeroBubble", 2),
    "zbv": ("ScheduleZBVZeroBubble", 2),
    "dualpipev": ("ScheduleDualPipeV", 2),
}
# Whose stages lie on the ranks there and back again: rank 0 has the first and the last.
V_SHAPED = ("zbv", "dualpipev")
DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


@dataclass(frozen=True)
class Degrees:
    """The degrees, and how a pipeline and data parallelism go about it.

    `tp` divides heads, hidden widths and the vocabulary, and the sequence between them; `ep` the experts; `cp` the
    sequence; `pp` the layers; `dp_shard` the batch, and the weights too (FSDP); `dp_replicate` the batch alone.
    `schedule`: of a pipeline, one of `SCHEDULES`; `microbatches` of it, 0 for as many as there are stages;
    `stage_layers`: the layers of each stage, () for an even spread in which the embedding and the output layer count as
    one each. `zero`: 3, weights are gathered for each pass over a block and dropped behind it; 2, they stay from the
    forward to the backward, as where a pipeline comes back to them soon (the article's ZeRO-1 behaves so).

    Raises:
        ConfigError: a degree below 1, an unknown schedule, degrees that no meshes are made of.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    microbatches: int = 0
    stage_layers: tuple[int, ...] = ()
    zero: Literal[2, 3] = 3

    def __post_init__(self) -> None:
        for name in DEGREES:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.microbatches >= 0, "microbatches", self.microbatches, "must be at least 0, which chooses")
        _require(self.zero in (2, 3), "zero", self.zero, "must be 2 or 3")
        if self.schedule not in SCHEDULES:
            close = did_you_mean(self.schedule, [*SCHEDULES])
            raise ConfigError(f"schedule = {self.schedule!r}: must be one of {', '.join(SCHEDULES)}{close}")
        with_tokens = self.dp_shard * self.cp
        if with_tokens % self.ep:
            raise ConfigError(
                f"ep = {self.ep}: experts are divided over ranks that hold different tokens, so it must divide "
                f"dp_shard x cp = {with_tokens}; the nearest that does is {_nearest(with_tokens, self.ep)}"
            )
        if self.stage_layers and len(self.stage_layers) != self.stages:
            raise ConfigError(
                f"stage_layers = {list(self.stage_layers)}: {self.schedule} over pp = {self.pp} has {self.stages} "
                "stages"
            )

    @classmethod
    def parse(cls, text: str, **settings: object) -> "Degrees":
        """From such as "tp=2,pp=2,ep=2"; "dp" is `dp_shard`, which is as `ep` where neither it nor `cp` is given.

        Raises:
            ConfigError: also of a name or a number that is none.
        """
        found: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.replace(" ", ",").split(","))):
            name, _, number = part.partition("=")
            name = {"dp": "dp_shard", "fsdp": "dp_shard"}.get(name.strip(), name.strip())
            if name not in DEGREES:
                raise ConfigError(f"mesh {text!r}: {name!r} is no degree{did_you_mean(name, [*DEGREES])}; as tp=2,pp=2")
            if not number.strip().isdecimal():
                raise ConfigError(f"mesh {text!r}: {name} = {number.strip()!r} must be a whole number")
            if name in found:
                raise ConfigError(f"mesh {text!r}: {name} is given twice")
            found[name] = int(number)
        if not {"dp_shard", "cp"} & set(found):
            found["dp_shard"] = found.get("ep", 1)
        return cls(**found, **settings)  # type: ignore[arg-type]

    @classmethod
    def from_layout(cls, layout: Layout) -> "Degrees":
        """Those of a planner's layout.

        Raises:
            ConfigError: a layout of another division of the experts, or with a schedule that is not run here.
        """
        if layout.expert_tp not in (0, layout.tp):
            raise ConfigError(f"expert_tp = {layout.expert_tp}: experts are divided over tp = {layout.tp} here")
        schedule = {"gpipe": "gpipe", "1f1b": "1f1b", "zero-bubble": "interleaved-zero-bubble"}[layout.schedule]
        if layout.interleave > 1 and schedule != "interleaved-zero-bubble":
            schedule = "interleaved-1f1b"
        return cls(
            pp=layout.pp, dp_shard=layout.dp, cp=layout.cp, tp=layout.tp, ep=layout.ep, schedule=schedule,
            stage_layers=layout.stage_layers if SCHEDULES[schedule][1] == 1 else (), zero=3 if layout.zero == 3 else 2,
        )  # fmt: skip

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks with sequences of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def efsdp(self) -> int:
        """Ranks over which the same experts are sharded once more."""
        return self.dp_shard * self.cp // self.ep

    @property
    def stages(self) -> int:
        """Of the pipeline, over all of its ranks."""
        return self.pp * SCHEDULES[self.schedule][1] if self.pp > 1 else 1

    def check(self, cfg: Config, *, batch_size: int | None = None, seq_len: int | None = None) -> None:
        """Whether a model can be divided so: before any process starts.

        Args:
            batch_size: sequences of an optimizer step; None: any.
            seq_len: positions of a sequence; None: `cfg.max_seq_len`.

        Raises:
            ConfigError: it names the degree, what it does not divide, and the nearest that does.
        """
        length = cfg.max_seq_len if seq_len is None else seq_len
        whole = [
            ("tp", "query heads (attention.n_heads)", cfg.attention.n_heads),
            ("tp", "expert widths (experts.d_ff)", cfg.experts.d_ff),
            ("tp", "ids (vocab_size)", cfg.vocab_size),
            ("ep", "experts (experts.n_experts)", cfg.experts.n_experts),
            ("cp", "positions of a sequence", length),
        ]
        if cfg.dense is not None:
            whole.append(("tp", "widths of plain MLPs (dense.d_ff)", cfg.dense.d_ff))
        for name, what, n in whole:
            degree = getattr(self, name)
            if n % degree:
                raise ConfigError(
                    f"{name} = {degree}: does not divide {n:,} {what}; the nearest that does is {_nearest(n, degree)}"
                )
        if (length // self.cp) % self.tp:
            near = _nearest(length // self.cp, self.tp)
            raise ConfigError(
                f"tp = {self.tp}: does not divide the {length // self.cp} positions of a rank, and the sequence is "
                f"divided between layers; the nearest that does is {near}"
            )
        self._check_stages(cfg)
        if batch_size is not None and batch_size % self.batch_unit:
            ways = self.batch_unit
            raise ConfigError(
                f"batch_size = {batch_size}: does not divide into dp x microbatches = {ways} parts; the nearest that "
                f"does is {max(1, round(batch_size / ways)) * ways}"
            )

    @property
    def batch_unit(self) -> int:
        """Sequences that a batch is a multiple of: one for each data parallel rank and microbatch of the pipeline."""
        return self.dp * (self.microbatches or self.stages)

    def _check_stages(self, cfg: Config) -> None:
        n = cfg.n_layers
        if self.stage_layers:
            _require(
                sum(self.stage_layers) == n and min(self.stage_layers) >= 0,
                "stage_layers", list(self.stage_layers), f"must be counts that sum to {n} layers",
            )  # fmt: skip
        elif n + 2 < self.stages:
            per = self.stages // self.pp
            raise ConfigError(
                f"pp = {self.pp}: {self.stages} stages of {n} layers, an embedding and an output layer; at most "
                f"{(n + 2) // per} can have something to do"
            )
        if self.pp > 1 and cfg.tie_embeddings:
            raise ConfigError(f"pp = {self.pp}: tie_embeddings = true shares a weight of the first and the last stage")


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r}: {rule}")


def _nearest(n: int, degree: int) -> int:
    """The divisor of n that is nearest to `degree`, the smaller of two."""
    divisors = {d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
    return min(divisors, key=lambda d: (abs(d - degree), d))
