"""The routing of what an engine serves, in the profiler's format: a pass a request, each of its positions once.

A request's pass holds its prompt and its answer, but for the last token, which no pass of the model has to compute.
Drafts that were refused are not in it, nor is anything twice that was computed again after a preemption. A prefix that
came from the cache is in it, too: what was chosen for it is kept beside the keys and values, slot by slot.

Shape suffixes: L layers, T tokens of a pass, S positions of a request, P slots of the cache, K experts per token.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.profile import Recorder
from moe.serve.engine import Engine, Step
from moe.serve.request import Request


@contextmanager
def record(engine: Engine, path: str | os.PathLike[str]) -> Iterator[Recorder]:
    """Records what `engine` computes inside the block.

    `Recorder.missing` counts positions whose routing is not known: of a prefix that was cached before the block began.
    Such a request's pass is of its other positions.

    Args:
        path: a new or empty directory.

    Raises:
        TraceError: something is there.
    """
    with Recorder(path, engine.model.cfg.experts.n_experts) as recorder:
        watch = _Watch(engine, recorder)
        try:
            with engine.listening(watch):
                yield recorder
        finally:
            watch.flush()


@dataclass(slots=True)
class _Held:
    """What is known of a request so far."""

    end: int = 0  # positions before it are here, or missing
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class _Watch:
    """Listens to an engine's steps."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self.recorder, pool = recorder, engine.scheduler.pool
        self.block_size, self.n_slots = pool.block_size, pool.n_blocks * pool.block_size
        self.ids_PLK: Tensor | None = None
        self.weights_PLK: Tensor | None = None
        self.known_P = torch.zeros(self.n_slots, dtype=torch.bool)
        self.held: dict[Request, _Held] = {}

    def __call__(self, step: Step) -> None:
        if not step.routing:
            return
        ids_TLK = torch.stack([ids for ids, _ in step.routing], 1).cpu()
        weights_TLK = torch.stack([weights for _, weights in step.routing], 1).cpu()
        if self.ids_PLK is None or self.weights_PLK is None:
            shape = (self.n_slots, *ids_TLK.shape[1:])
            self.ids_PLK, self.weights_PLK = ids_TLK.new_zeros(shape), weights_TLK.new_zeros(shape)
        row = 0
        for work, blocks in zip(step.works, step.blocks, strict=True):
            end = work.start + work.n
            slots_S = self._slots(blocks, end)
            new = slots_S[work.start :]
            self.ids_PLK[new], self.weights_PLK[new] = (x[row : row + work.n] for x in (ids_TLK, weights_TLK))
            self.known_P[new] = True
            row += work.n
            r = work.request
            # What follows the last of these is not computed, or was a draft that is refused.
            self._take(r, slots_S, min(end, len(r.tokens) - work.samples))
            if r.finish_reason is not None:
                self._add(self.held.pop(r))

    def flush(self) -> None:
        """What is known of requests that are not done."""
        for held in self.held.values():
            self._add(held)
        self.held.clear()

    def _slots(self, blocks: Sequence[int], end: int) -> Tensor:
        used = torch.tensor(blocks[: -(-end // self.block_size)])
        return (used.unsqueeze(1) * self.block_size + torch.arange(self.block_size)).flatten()[:end]

    def _take(self, r: Request, slots_S: Tensor, end: int) -> None:
        """The request's positions up to `end`, those that are not here yet."""
        held = self.held.setdefault(r, _Held())
        if end <= held.end:
            return
        assert self.ids_PLK is not None
        assert self.weights_PLK is not None
        at = slots_S[held.end : end]
        known = self.known_P[at]
        held.ids.append(self.ids_PLK[at[known]])
        held.weights.append(self.weights_PLK[at[known]])
        held.tokens += torch.tensor(r.tokens[held.end : end])[known].tolist()
        self.recorder.missing += int((~known).sum())
        held.end = end

    def _add(self, held: _Held) -> None:
        if held.tokens:
            shape_12 = torch.tensor([[1, len(held.tokens)]], dtype=torch.int32)
            self.recorder.add_rows(torch.cat(held.ids), torch.cat(held.weights), torch.tensor(held.tokens), shape_12)
