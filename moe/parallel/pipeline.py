"""A pipeline: the layers of a model in stages over the ranks of `pp`, run by torch.distributed.pipelining's schedules.

A stage is a `Transformer` that lacks parts. Tokens, targets and documents are on every rank; hidden states go from
stage to stage, in pieces of the sequence under tensor parallelism; the last stage gives the loss. The routers' losses
of a stage stay in it: their gradient is put into the backward at its output, so nothing more crosses a boundary.

Shape suffixes: B sequences of a microbatch, S positions, D model width, L layers with experts, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining.schedules as schedules
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from moe.config import Config
from moe.errors import ConfigError
from moe.experts import expert_counts
from moe.model import Counts, Sums, Transformer, objective
from moe.parallel.apply import parallelize
from moe.parallel.degrees import SCHEDULES, V_SHAPED, Degrees
from moe.parallel.mesh import Meshes
from moe.parallel.step import Batch, Done, counts_of, finish_gradients, piece
from moe.weights import init_weights


def split(cfg: Config, degrees: Degrees) -> list[range]:
    """The layers of each stage: `stage_layers`, or evenly, the embedding and the output layer counting as one each."""
    counts = list(degrees.stage_layers)
    if not counts:
        n = degrees.stages
        each, more = divmod(cfg.n_layers + 2, n)
        counts = [each + (i < more) for i in range(n)]
        counts[0] -= 1
        counts[-1] -= 1
        for i, short in enumerate(counts):  # of a single unit the embedding takes all, and more
            if short < 0:
                counts[i] = 0
                counts[max(range(n), key=lambda j: counts[j])] += short
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + n) for start, n in zip(starts, counts, strict=True)]


def stages_of(rank: int, degrees: Degrees) -> list[int]:
    """Which stages a rank of `pp` has."""
    if degrees.schedule in V_SHAPED:
        return [rank, degrees.stages - 1 - rank]
    return list(range(rank, degrees.stages, degrees.pp))


class _Stage(Transformer):
    """A part of a model that takes and gives tensors, as schedules want, and remembers what routers did.

    Attributes:
        counts: of the whole batch that a step is of.
        collected: for each microbatch its sums and its layers' routed tokens.
    """

    counts: Counts
    collected: list[tuple[Sums, list[Tensor]]]
    positions: Any

    def _check_input(self, tokens: Tensor, *others: Any) -> None:
        if self.embedding is not None:  # hidden states are a piece of the sequence, whose targets are not
            super()._check_input(tokens, *others)

    def forward(  # type: ignore[override]
        self, x: Tensor, targets_BS: Tensor | None = None, documents_BS: Tensor | None = None
    ) -> Tensor:
        """Tokens or hidden states -> hidden states, or the part of the objective that ends here, [1]."""
        self.positions.documents_BS = documents_BS
        out = super().forward(x, targets_BS if self.head is not None else None)
        sums = _own_sums(self, out)
        E = self.cfg.experts.n_experts
        routed = [expert_counts(r.ids_TK.reshape(1, -1), E)[0] for r in out.routing]
        lm = None if sums.lm is None else sums.lm.detach()
        self.collected.append((Sums(lm, sums.balance.detach(), sums.z.detach()), routed))
        ours = objective(self.cfg.router, sums, self.counts) if sums.lm is not None else _router_part(self, sums)
        # Schedules that take a backward apart detach a stage's output, which may therefore be no view.
        return torch.stack([ours]) if self.head is not None else _Added.apply(out.hidden_BSD, ours)  # type: ignore


def _own_sums(stage: _Stage, out: Any) -> Sums:
    """The stage's share of the sums: a mean over layers is over all of the model's, and of cp every rank has all."""
    part = len(out.routing) / max(1, stage.cfg.n_moe_layers) / stage.positions.group.size()
    return Sums(out.sums.lm, out.sums.balance * part, out.sums.z * part)


def _router_part(stage: _Stage, sums: Sums) -> Tensor:
    nothing = sums._replace(lm=sums.balance.new_zeros(()))
    return objective(stage.cfg.router, nothing, stage.counts)


class _Added(torch.autograd.Function):
    """x, whose backward is also that of a loss: as Megatron's auxiliary losses are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.ones_like(ctx.saved_tensors[0])


def part_of(cfg: Config, layers: range, first: bool, last: bool) -> Transformer:
    """A stage on the meta device: of the model only these layers, and of its ends what belongs to them."""
    with torch.device("meta"):
        model = Transformer(cfg)
    part: Any = model
    if not first:
        part.embedding = None
    if not last:
        part.norm = part.head = None
    for i in range(cfg.n_layers):
        if i not in layers:
            part.blocks[i] = None
    part.__class__ = _Stage
    part.collected = []
    return part


class Pipeline:
    """The stages of this rank, and the schedule that runs them.

    Args:
        seed: of the weights, which are those of one process with this seed.
        dtype: of the weights.

    Attributes:
        parts: the stages, parallelized; an optimizer for each, or one for all.

    Raises:
        ConfigError: as `Degrees.check`.
    """

    def __init__(self, cfg: Config, meshes: Meshes, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        degrees = meshes.degrees
        degrees.check(cfg)
        self.cfg, self.meshes, self.dtype = cfg, meshes, dtype
        self.layers = split(cfg, degrees)
        self.group = meshes.dense["pp"].get_group()
        self.places = stages_of(self.group.rank(), degrees)
        self.parts: list[Any] = []
        for i in self.places:
            part = part_of(cfg, self.layers[i], i == 0, i == degrees.stages - 1)
            part = parallelize(part.to(dtype), meshes)
            part.to_empty(device=meshes.device)
            init_weights(part, seed)
            self.parts.append(part)
        self._schedules: dict[tuple[int, int], Any] = {}

    @property
    def microbatches(self) -> int:
        """Of a step, unless its batch is of another size than the schedule's least."""
        return self.meshes.degrees.microbatches or self.meshes.degrees.stages

    def parameters(self) -> list[torch.nn.Parameter]:
        """Of all stages of this rank."""
        return [p for part in self.parts for p in part.parameters()]

    def forward_backward(self, batch: Batch, counts: Counts | None = None) -> Done:
        """As `moe.parallel.step.forward_backward`; the batch of this rank is cut into microbatches.

        Raises:
            ConfigError: it does not divide into them.
        """
        counts = counts_of(batch.targets_BS, self.meshes) if counts is None else counts
        cp = self.meshes.dense["cp"]
        tokens_BS, targets_BS = (piece(x, cp) for x in (batch.tokens_BS, batch.targets_BS))
        if len(tokens_BS) % self.microbatches:
            raise ConfigError(
                f"{len(tokens_BS)} sequences of a rank: do not divide into microbatches = {self.microbatches}"
            )
        size = len(tokens_BS) // self.microbatches, tokens_BS.shape[1]
        if size not in self._schedules:
            self._schedules[size] = self._schedule(*size)
        for part in self.parts:
            part.counts, part.collected = counts, []
        how: dict[str, Any] = {"targets_BS": targets_BS}
        if batch.documents_BS is not None:
            how["documents_BS"] = batch.documents_BS
        last = self.meshes.degrees.stages - 1 in self.places
        if last:
            how |= {"target": targets_BS, "losses": []}
        self._schedules[size].step(*((tokens_BS,) if 0 in self.places else ()), **how)
        finish_gradients(self.parameters())
        return self._done(counts)

    def _schedule(self, B: int, S: int) -> Any:
        degrees, device = self.meshes.degrees, self.meshes.device
        tokens = torch.zeros(B, S, dtype=torch.int64, device=device)
        hidden = torch.zeros(B, S // degrees.tp, self.cfg.d_model, dtype=self.dtype, device=device, requires_grad=True)
        loss, stages = torch.zeros(1, dtype=self.dtype, device=device, requires_grad=True), []
        for i, part in zip(self.places, self.parts, strict=True):
            stages.append(
                PipelineStage(
                    part, i, degrees.stages, device, group=self.group,
                    input_args=(tokens if i == 0 else hidden,),
                    output_args=(loss if i == degrees.stages - 1 else hidden,),
                )
            )  # fmt: skip
        name, each = SCHEDULES[degrees.schedule]
        made: Callable[..., Any] = getattr(schedules, name)
        return made(
            stages[0] if each == 1 else stages, n_microbatches=self.microbatches, loss_fn=_whole, scale_grads=False
        )

    def _done(self, counts: Counts) -> Done:
        """Of all stages and ranks."""
        cfg, device = self.cfg, self.meshes.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        routed_LE = torch.zeros(cfg.n_moe_layers, cfg.experts.n_experts, dtype=torch.int64, device=device)
        with_experts = [i for i, kind in enumerate(cfg.layer_kinds) if kind == "moe"]
        for place, part in zip(self.places, self.parts, strict=True):
            mine = [with_experts.index(i) for i in self.layers[place] if i in with_experts]
            for own, routed in part.collected:
                sums += torch.stack([torch.zeros_like(own.z) if x is None else x for x in own]).to(sums)
                for row, counts_E in zip(mine, routed, strict=True):
                    routed_LE[row] += counts_E
        dist.all_reduce(sums, group=self.meshes.tokens.get_group())
        dist.all_reduce(sums, group=self.group)
        dist.all_reduce(routed_LE, group=self.meshes.data.get_group())
        dist.all_reduce(routed_LE, group=self.group)
        return Done(Sums(*sums.unbind()), counts, routed_LE)


def _whole(loss: Tensor, _targets: Tensor) -> Tensor:
    return loss.sum()
