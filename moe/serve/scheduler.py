"""Which tokens of which requests the next pass of the model computes. No torch.

There is no prefill and no decoding: every request's `computed` catches up with its tokens and drafts, many at a time
where it is behind (a prompt, a preempted request), one at a time once it is not, and all share the pass's budget of
tokens (the rule is vLLM's). A request that cannot get a block takes it from the last in rank, which loses its keys and
values, and computes them again later: its tokens stay.
"""

import heapq
from bisect import insort
from dataclasses import dataclass, field

from moe.errors import ConfigError, QueueFullError
from moe.serve.blocks import BlockPool, block_hash
from moe.serve.request import Request


@dataclass(frozen=True, slots=True)
class Work:
    """One request's share of a pass: its tokens and drafts [start, start + n)."""

    request: Request
    start: int
    n: int
    n_drafts: int  # how many of them are drafts: the last
    samples: bool  # whether they reach the newest token, so that the logits of it and of the drafts are wanted

    @property
    def token_ids(self) -> list[int]:
        """What goes into the model."""
        r = self.request
        end = self.start + self.n
        return r.tokens[self.start : end] + r.drafts[: self.n_drafts]


@dataclass(slots=True)
class StepPlan:
    """What one pass computes, in rank order, and who had to make room for it."""

    works: list[Work] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass."""
        return sum(work.n for work in self.works)


class Scheduler:
    """Requests waiting and running, over one pool of blocks.

    Call `plan`, run the pass, then `advance` once for each of its works, and `finish` for requests that are done.

    Args:
        max_batch_tokens: tokens of one pass at most.
        max_running: requests that hold blocks at the same time, at most.
        max_waiting: beyond it `add` raises; None: no limit.

    Raises:
        ConfigError: a limit below 1.
    """

    def __init__(
        self, pool: BlockPool, *, max_batch_tokens: int, max_running: int, max_waiting: int | None = None
    ) -> None:
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_running", max_running)):
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")
        self.pool = pool
        self.max_batch_tokens, self.max_running, self.max_waiting = max_batch_tokens, max_running, max_waiting
        self.running: list[Request] = []  # in rank order
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # a heap by rank
        self._arrived = 0

    @property
    def n_waiting(self) -> int:
        """Requests that hold no blocks yet, or no more."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting

    def add(self, request: Request) -> None:
        """Takes a request. One that has its `number` already, as a further answer to a prompt, is always taken.

        Raises:
            ConfigError: one that would not fit if it were alone.
            QueueFullError: too many wait already.
        """
        # The newest token's keys and values are never needed.
        needed = self.pool.blocks_for(max(request.limit - 1, request.prompt_length))
        if needed > self.pool.n_blocks:
            raise ConfigError(
                f"request {request.id}: {request.prompt_length} tokens and up to "
                f"{request.limit - request.prompt_length} new ones need {needed} blocks of {self.pool.block_size}, and "
                f"the pool has {self.pool.n_blocks}; ask for fewer (max_tokens), or give the engine more num_blocks"
            )
        if request.number < 0:
            if self.max_waiting is not None and self.n_waiting >= self.max_waiting:
                raise QueueFullError(f"{self.n_waiting} requests wait, the most that are let wait; try again later")
            request.number, self._arrived = self._arrived, self._arrived + request.params.n
        heapq.heappush(self._waiting, (request.rank, request))

    # ---------------------------------------------------------------------------------------------------- a step

    def plan(self, budget: int | None = None) -> StepPlan:
        """Blocks are taken and the pass is planned. Without work the plan is empty.

        A pass that fails may be planned anew: nothing has changed before `advance`, but for who holds which blocks.

        Args:
            budget: tokens of this pass at most, where they are to be fewer than `max_batch_tokens`.
        """
        plan = StepPlan()
        self._make_way(plan)
        left, enough = self._serve_running(plan, min(budget or self.max_batch_tokens, self.max_batch_tokens))
        if enough:  # else what came free is needed by those who run
            self._admit(plan, left)
        return plan

    def advance(self, work: Work, accepted: list[int]) -> None:
        """After the pass: the request's new tokens, of which all but the last are its first drafts.

        Args:
            accepted: empty where `work.samples` is false; one token more than drafts were accepted, or fewer where
                the text ends before.
        """
        r = work.request
        r.drafts = []
        if not r.blocks:  # aborted while the pass ran
            return
        r.tokens += accepted
        # The keys and values of refused drafts are in the cache, and will be written over.
        r.computed = min(work.start + work.n, len(r.tokens) - bool(accepted))
        self._remember(r)

    def reserve(self, r: Request, n: int) -> int:
        """Blocks for the newest token and up to `n` drafts of a running request: for how many drafts there are.

        A guess is worth no one's blocks: as many as there are running requests stay free.
        """
        spare = max(0, self.pool.n_free - len(self.running))
        n = min(n, (len(r.blocks) + spare) * self.pool.block_size - r.computed - 1)
        return n if n > 0 and self._grow(r, 1 + n) else 0

    def finish(self, request: Request) -> None:
        """The request is done, or is to be: its blocks come free. One that is unknown here is left alone."""
        if request in self.running:
            self.running.remove(request)
            self._drop(request)
        elif entry := next((e for e in self._waiting if e[1] is request), None):
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)

    # ---------------------------------------------------------------------------------------------------- parts

    def _make_way(self, plan: StepPlan) -> None:
        """Who is to go first does, before one of lower priority that runs already."""
        while self._waiting and self.running:
            best, worst = self._waiting[0][1], self.running[-1]
            full = len(self.running) == self.max_running or self.pool.n_free < self._blocks_to_begin(best)
            if best.priority >= worst.priority or not full:
                return
            self._preempt(worst, plan)

    def _serve_running(self, plan: StepPlan, left: int) -> tuple[int, bool]:
        """Returns what is left of the budget, and whether all who run had blocks."""
        i, preempted = 0, len(plan.preempted)
        while i < len(self.running) and left:
            r = self.running[i]
            n = min(len(r.tokens) + len(r.drafts) - r.computed, left)
            while not self._grow(r, n):
                if r.drafts:  # a guess is worth no one's blocks
                    r.drafts = []
                    n = min(len(r.tokens) - r.computed, left)
                    continue
                victim = self.running[-1]
                self._preempt(victim, plan)
                if victim is r:
                    return left, False
            plan.works.append(_work(r, n))
            left -= n
            i += 1
        return left, len(plan.preempted) == preempted

    def _admit(self, plan: StepPlan, left: int) -> None:
        while self._waiting and left and len(self.running) < self.max_running:
            r = self._waiting[0][1]
            self._match(r)
            n = min(len(r.tokens) - r.computed, left)
            if not self._grow(r, n):
                self._drop(r)
                return
            heapq.heappop(self._waiting)
            insort(self.running, r, key=lambda one: one.rank)
            plan.works.append(_work(r, n))
            left -= n

    def _match(self, r: Request) -> None:
        """Hold the blocks of the longest cached prefix, but of the last token at least the logits are computed."""
        if not self.pool.prefix_cache or not r.reusable:
            return
        self._hash(r, (len(r.tokens) - 1) // self.pool.block_size)
        r.blocks = self.pool.match(r.hashes[: (len(r.tokens) - 1) // self.pool.block_size])
        r.remembered = len(r.blocks)
        r.computed = r.remembered * self.pool.block_size
        if not r.preemptions:
            r.cached_tokens = r.computed

    def _grow(self, r: Request, n: int) -> bool:
        """Whether the request holds, or now has, the blocks for `n` tokens more."""
        more = self.pool.blocks_for(r.computed + n) - len(r.blocks)
        taken = self.pool.take(more) if more > 0 else []
        if taken is None:
            return False
        r.blocks += taken
        return True

    def _blocks_to_begin(self, r: Request) -> int:
        return self.pool.blocks_for(min(len(r.tokens), self.max_batch_tokens))

    def _preempt(self, r: Request, plan: StepPlan) -> None:
        self.running.remove(r)
        self._drop(r)
        r.preemptions += 1
        plan.preempted.append(r)
        heapq.heappush(self._waiting, (r.rank, r))

    def _drop(self, r: Request) -> None:
        self.pool.release(r.blocks)
        r.blocks, r.drafts, r.computed, r.remembered = [], [], 0, 0

    def _hash(self, r: Request, n: int) -> None:
        """Name the first `n` blocks."""
        size = self.pool.block_size
        for i in range(len(r.hashes), n):
            before = r.hashes[-1] if r.hashes else b""
            r.hashes.append(block_hash(before, r.tokens[i * size : (i + 1) * size], r.salt))

    def _remember(self, r: Request) -> None:
        """Blocks that are full of accepted tokens may serve others."""
        full = r.computed // self.pool.block_size
        if not self.pool.prefix_cache or full == r.remembered:
            return
        self._hash(r, full)
        for i in range(r.remembered, full):
            self.pool.remember(r.blocks[i], r.hashes[i])
        r.remembered = full


def _work(r: Request, n: int) -> Work:
    reached = r.computed + n - len(r.tokens)
    return Work(r, r.computed, n, max(0, reached), reached >= 0)
