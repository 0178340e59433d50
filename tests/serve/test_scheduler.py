"""The scheduler with a model that is a hash: what a pass would read is where it must be, and no block is lost."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError, QueueFullError
from moe.serve.blocks import BlockPool, block_hash
from moe.serve.request import Request, SamplingParams
from moe.serve.scheduler import Scheduler, StepPlan, Work

VOCAB = 5


def next_token(tokens: list[int]) -> int:
    """A model: its next token depends on every token before."""
    return random.Random(str(tokens)).randrange(VOCAB)


def answer(prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
    return tokens


def request(name: object, prompt: list[int], new: int, **settings: object) -> Request:
    return Request(str(name), len(prompt), list(prompt), SamplingParams(), len(prompt) + new, **settings)  # type: ignore[arg-type]


class Machine:
    """Runs plans: keeps for each slot of the cache which tokens, up to its own, were its keys and values made of."""

    def __init__(self, scheduler: Scheduler, n_drafts: int = 0, seed: int = 0) -> None:
        self.scheduler, self.n_drafts, self.rng = scheduler, n_drafts, random.Random(seed)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.passes: list[StepPlan] = []

    def step(self) -> list[Request]:
        plan, size = self.scheduler.plan(), self.scheduler.pool.block_size
        self.passes.append(plan)
        assert plan.n_tokens <= self.scheduler.max_batch_tokens
        assert len({id(w.request) for w in plan.works}) == len(plan.works)
        done = []
        for work in plan.works:
            r = work.request
            seen = (r.tokens + r.drafts)[: work.start + work.n]
            assert work.token_ids == seen[work.start :]
            for position in range(work.start, work.start + work.n):
                self.slots[r.blocks[position // size], position % size] = tuple(seen[: position + 1])
        for work in plan.works:  # all write before any reads, as in a pass
            r = work.request
            seen = (r.tokens + r.drafts)[: work.start + work.n]
            for position in range(len(seen)):
                assert self.slots[r.blocks[position // size], position % size] == tuple(seen[: position + 1])
        for work in plan.works:
            r, accepted = work.request, self.accepted(work)
            self.scheduler.advance(work, accepted)
            assert r.computed == min(work.start + work.n, len(r.tokens) - bool(accepted))
            if len(r.tokens) == r.limit:
                self.scheduler.finish(r)
                done.append(r)
            elif accepted:
                r.drafts = self.guess(r)
        self.scheduler.pool.check()
        held = Counter(b for r in self.scheduler.running for b in r.blocks)
        assert [held[b] for b in range(self.scheduler.pool.n_blocks)] == self.scheduler.pool._holders
        return done

    def accepted(self, work: Work) -> list[int]:
        """Drafts that are right, and the token after them."""
        r, new = work.request, []
        if not work.samples:
            return new
        for draft in [*r.drafts[: work.n_drafts], None]:
            if len(r.tokens) + len(new) == r.limit:
                break
            new.append(next_token(r.tokens + new))
            if new[-1] != draft:
                break
        return new

    def guess(self, r: Request) -> list[int]:
        """Drafts, right more often than not, never beyond the end."""
        right = answer(r.tokens, r.limit)[len(r.tokens) :]
        n = min(self.n_drafts, max(0, len(right) - 1))
        return [t if self.rng.random() < 0.7 else self.rng.randrange(VOCAB) for t in right[:n]]

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if self.scheduler.idle:
                return
            self.step()
        pytest.fail(f"not done after {limit} passes")


@given(
    block_size=st.integers(1, 9),
    spare=st.integers(0, 12),
    budget=st.integers(1, 24),
    max_running=st.integers(1, 6),
    n_drafts=st.integers(0, 5),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_request_gets_its_answer_whatever_the_limits(
    block_size: int, spare: int, budget: int, max_running: int, n_drafts: int, prefix_cache: bool, seed: int
) -> None:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(12)]
    prompts = [
        shared[: rng.randrange(13)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))] for _ in range(7)
    ]
    requests = [request(i, p, rng.randrange(1, 15), priority=rng.randrange(3)) for i, p in enumerate(prompts)]
    pool = BlockPool(max(-(-r.limit // block_size) for r in requests) + spare, block_size, prefix_cache=prefix_cache)
    machine = Machine(Scheduler(pool, max_batch_tokens=budget, max_running=max_running), n_drafts, seed)
    aborted = rng.randrange(7)
    for i, r in enumerate(requests):
        machine.scheduler.add(r)
        if rng.random() < 0.5:
            machine.step()
        if i == aborted:
            machine.scheduler.finish(requests[rng.randrange(i + 1)])
    machine.run()
    assert pool.n_free == pool.n_blocks
    for prompt, r in zip(prompts, requests, strict=True):
        whole = answer(prompt, r.limit)
        assert r.tokens == whole[: len(r.tokens)]
    assert sum(len(r.tokens) < r.limit for r in requests) <= 1


def test_a_warm_cache_computes_only_what_is_new() -> None:
    prompt = [1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    scheduler = Scheduler(BlockPool(20, 4), max_batch_tokens=100, max_running=4)
    machine = Machine(scheduler)
    first, again, longer = (request(n, p, 3) for n, p in enumerate((prompt, prompt, [*prompt, 1, 1, 1])))
    for r in (first, again, longer):
        scheduler.add(r)
        machine.run()
    assert (first.cached_tokens, again.cached_tokens) == (0, 8)
    # The first's answer is cached, too, as far as it is the third's prompt.
    common = next((i for i, (a, b) in enumerate(zip(first.tokens, longer.tokens, strict=False)) if a != b), 12)
    assert longer.cached_tokens == common // 4 * 4
    assert first.tokens == again.tokens


def test_of_a_prompt_in_the_cache_the_last_token_is_computed_all_the_same() -> None:
    scheduler = Scheduler(BlockPool(20, 4), max_batch_tokens=100, max_running=4)
    machine = Machine(scheduler)
    for n in range(2):
        scheduler.add(request(n, [1, 2, 3, 4, 0, 1, 2, 3], 1))
        machine.run()
    assert [w.n for plan in machine.passes for w in plan.works] == [8, 4]


def test_what_else_determines_the_keys_is_part_of_the_name() -> None:
    scheduler = Scheduler(BlockPool(20, 2), max_batch_tokens=100, max_running=4)
    found = []
    for salt in (b"cat", b"dog", b"cat"):
        r = request(salt, [1, 2, 3, 4, 0], 1, salt=salt)
        scheduler.add(r)
        Machine(scheduler).run() if salt == b"cat" and not found else None
        while not scheduler.idle:
            for work in scheduler.plan().works:
                scheduler.advance(work, [1] if work.samples else [])
                scheduler.finish(work.request)
        found.append(r.cached_tokens)
    assert found == [0, 0, 4]
    assert block_hash(b"", [1, 2]) != block_hash(b"", [12]) != block_hash(b"", [1, 2], b"x")


def test_a_request_whose_prompt_is_scored_takes_nothing_from_the_cache() -> None:
    scheduler = Scheduler(BlockPool(20, 2), max_batch_tokens=100, max_running=4)
    machine = Machine(scheduler)
    for n in range(2):
        r = Request(str(n), 5, [1, 2, 3, 4, 0], SamplingParams(prompt_logprobs=0), 6)
        scheduler.add(r)
        machine.run()
        assert r.cached_tokens == 0


def test_prompts_are_computed_beside_those_who_decode_and_never_starve_them() -> None:
    scheduler = Scheduler(BlockPool(100, 4), max_batch_tokens=8, max_running=4)
    machine = Machine(scheduler)
    short, long = request("short", [1, 2], 20), request("long", [3] * 60, 2)
    scheduler.add(short)
    machine.step()
    scheduler.add(long)
    for _ in range(5):
        before = len(short.tokens)
        machine.step()
        assert len(short.tokens) == before + 1
        assert machine.passes[-1].n_tokens == 8


def test_the_last_in_rank_makes_room_and_loses_no_token() -> None:
    scheduler = Scheduler(BlockPool(6, 4, prefix_cache=False), max_batch_tokens=64, max_running=4)
    machine = Machine(scheduler)
    first, second = (request(n, [n + 1] * 7, 15) for n in range(2))
    scheduler.add(first)
    scheduler.add(second)
    machine.run()
    assert first.preemptions == 0
    assert second.preemptions > 0
    assert second.tokens == answer([2] * 7, 22)


def test_who_is_urgent_goes_first_and_takes_the_place_of_who_is_not() -> None:
    scheduler = Scheduler(BlockPool(6, 4), max_batch_tokens=64, max_running=1)
    machine = Machine(scheduler)
    patient, urgent, equal = (request(n, [n] * 5, 12, priority=p) for n, p in enumerate((1, 0, 1)))
    scheduler.add(patient)
    machine.step()
    scheduler.add(equal)
    scheduler.add(urgent)
    done = []
    while not scheduler.idle:
        done += machine.step()
    assert done == [urgent, patient, equal]
    assert (patient.preemptions, equal.preemptions) == (1, 0)


def test_what_can_never_fit_is_refused_at_once_and_the_queue_has_an_end() -> None:
    scheduler = Scheduler(BlockPool(3, 4), max_batch_tokens=8, max_running=2, max_waiting=2)
    with pytest.raises(ConfigError, match=r"request big: 5 tokens and up to 9 new ones need 4 blocks of 4, .* has 3"):
        scheduler.add(request("big", [1] * 5, 9))
    assert scheduler.idle
    scheduler.add(request("fits", [1] * 5, 8))
    scheduler.add(request(2, [1], 1))
    with pytest.raises(QueueFullError, match="2 requests wait, the most"):
        scheduler.add(request(3, [1], 1))
    Machine(scheduler).run()


def test_an_abort_while_a_pass_runs_keeps_its_blocks_from_no_one() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_batch_tokens=8, max_running=2)
    r = request(0, [1] * 5, 4)
    scheduler.add(r)
    (work,) = scheduler.plan().works
    scheduler.finish(r)
    scheduler.finish(r)  # a client that hangs up twice
    scheduler.advance(work, [1])
    scheduler.pool.check()
    assert scheduler.pool.n_free == 4
    assert r.output == []


def test_a_block_is_not_given_back_twice() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.take(2)
    assert blocks is not None
    assert pool.take(1) is None
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="released twice"):
        pool.release(blocks[:1])


def test_the_block_unused_longest_goes_first_and_a_beginning_outlives_its_end() -> None:
    pool = BlockPool(4, 1)
    one, other = pool.take(2), pool.take(2)
    assert one is not None
    assert other is not None
    for block, name in zip(one + other, "abcd", strict=True):
        pool.remember(block, name.encode())
    pool.release(other)
    pool.release(one)
    assert pool.take(3) == [*reversed(other), one[1]]
    assert pool.match([b"a", b"b"]) == [one[0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, r"temperature = -1: must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0}, r"top_p = 0: must be in \(0, 1\]"),
        ({"max_tokens": 0}, "max_tokens = 0: must be 1 or more"),
        ({"min_tokens": 17}, "min_tokens = 17: must be between 0 and max_tokens"),
        ({"stop": ["a", ""]}, r"stop = \('a', ''\): an empty string"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0: must be above 0"),
        ({"logit_bias": {3: 101}}, r"logit_bias = \{3: 101\}: must be between -100 and 100"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**settings)
    assert SamplingParams(stop="x").stop == ("x",)
