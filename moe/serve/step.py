"""What the engine tells of its work: a record of each pass, and counts of all."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.serve.scheduler import Work


@dataclass(frozen=True, slots=True)
class Step:
    """One pass that went through, for `Engine.listeners`.

    Attributes:
        number: 1 for the engine's first.
        works: what it computed, in rank order.
        accepted: of each work's drafts, how many.
        propose_s, schedule_s, forward_s, sample_s: seconds of guessing the drafts that were in it, of planning, of the
            model, and of choosing tokens. On CUDA the model's time is in part in the next one's, who waits for it.
        routing: for each MoE layer the chosen experts and their weights, (ids_TK, weights_TK), of the pass's tokens in
            the order of the works; empty where `Engine.runner.record` is off.
        blocks: of the cache, that each work's request held during the pass.
    """

    number: int
    works: Sequence[Work]
    accepted: Sequence[int]
    propose_s: float
    schedule_s: float
    forward_s: float
    sample_s: float
    routing: Sequence[tuple[Tensor, Tensor]]
    blocks: Sequence[Sequence[int]]

    @property
    def n_tokens(self) -> int:
        """Tokens that went through the model."""
        return sum(work.n for work in self.works)

    @property
    def drafted(self) -> list[int]:
        """How many of each work's tokens were drafts."""
        return [work.n_drafts for work in self.works]

    @property
    def contexts(self) -> list[int]:
        """How many positions the last token of each work saw."""
        return [work.start + work.n for work in self.works]

    @property
    def experts(self) -> float | None:
        """Distinct experts that the tokens touched, the mean of the layers; None where it was not recorded."""
        if not self.routing:
            return None
        ids_LR = torch.stack([ids_TK.flatten() for ids_TK, _ in self.routing])
        touched_LE = torch.zeros(len(ids_LR), int(ids_LR.max()) + 1, dtype=torch.bool, device=ids_LR.device)
        return touched_LE.scatter_(1, ids_LR, True).sum().item() / len(ids_LR)


@dataclass(slots=True)
class Stats:
    """Counts since the engine was made."""

    steps: int = 0
    tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    out_of_memory: int = 0
    finished: dict[str, int] = field(default_factory=dict)
