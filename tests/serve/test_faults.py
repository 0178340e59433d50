"""A storm of requests, aborts, callers that hang up and passes that fail: no block is lost, and who is answered is
answered right."""

import asyncio
import random
import re
import time
from collections.abc import Callable

import pytest
import torch

from moe.errors import ServeError
from moe.serve import AsyncEngine, Delta, Engine, Output, SamplingParams
from tests.serve.scripted import assert_empty, check_blocks, prompts, scripted_engine


def faults(rng: random.Random, memory: float, other: float) -> Callable[[int], None]:
    """Passes fail by chance, larger ones rather for want of memory."""

    def fault(n: int) -> None:
        if rng.random() < memory * min(n, 16) / 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if rng.random() < other:
            raise RuntimeError("a kernel failed")

    return fault


def settings(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randrange(1, 16), temperature=rng.choice([0, 0, 0.7, 1]), seed=rng.randrange(10**6),
        n=rng.choice([1, 1, 2, 3]), top_k=rng.choice([0, 5]), top_p=rng.choice([1, 0.9]),
        repetition_penalty=rng.choice([1, 1.2]), logprobs=rng.choice([None, 2]), prompt_logprobs=rng.choice([None, 1]),
        stop_token_ids=rng.choice([(), (5, 9)]), min_tokens=rng.choice([0, 1]),
    )  # fmt: skip


def storm_engine(rng: random.Random) -> Engine:
    size = rng.choice([1, 2, 3, 4, 8])
    return scripted_engine(
        faults(rng, rng.choice([0, 0.05, 0.2]), rng.choice([0, 0.02])),
        block_size=size, num_blocks=-(-40 // size) + rng.randrange(12), max_batch_tokens=rng.choice([3, 8, 32, 99]),
        max_running=rng.choice([1, 3, 8]), prefix_cache=rng.random() < 0.7, speculative=rng.choice([None, "ngram"]),
        num_drafts=rng.randrange(1, 9), adaptive=rng.random() < 0.3,
    )  # fmt: skip


def check_answer(output: Output, params: SamplingParams) -> None:
    """What was answered is what a calm engine answers, as far as it goes."""
    (want,) = scripted_engine().generate(output.prompt_token_ids, params)
    assert (
        output.prompt_logprobs is None
        or output.prompt_logprobs[1:] == (want.prompt_logprobs or [])[1:][: len(output.prompt_logprobs) - 1]
    )
    for one, right in zip(output.outputs, want.outputs, strict=True):
        n = len(one.token_ids)
        assert one.token_ids == right.token_ids[:n]
        assert one.logprobs == (None if right.logprobs is None else right.logprobs[:n])
        if one.finish_reason in ("stop", "length"):
            assert (n, one.finish_reason) == (len(right.token_ids), right.finish_reason)
        else:
            assert (one.finish_reason == "error") == (one.error is not None)


def storm(seed: int) -> None:
    rng = random.Random(seed)
    engine, every = storm_engine(rng), prompts(20, seed)
    asked: dict[str, SamplingParams] = {}
    done: dict[str, Output] = {}
    said: dict[tuple[str, int], list[int]] = {}

    def listener(delta: Delta) -> None:
        said.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        if rng.random() < 0.005:
            engine.abort(rng.choice([*asked]))
        if delta.output is not None:
            assert delta.request_id not in done
            done[delta.request_id] = delta.output

    while every or not engine.idle:
        if every and rng.random() < 0.5:
            params = settings(rng)
            asked[engine.add(every.pop(), params, priority=rng.randrange(2), listener=listener)] = params
        if asked and rng.random() < 0.05:
            engine.abort(rng.choice([*asked]))
        engine.step()
        check_blocks(engine)
    assert_empty(engine)
    assert done.keys() == asked.keys()
    for name, output in done.items():
        check_answer(output, asked[name])
        for one in output.outputs:
            assert said[name, one.index] == one.token_ids


async def hang_up(seed: int) -> None:
    """The same with callers of the asynchronous front, some of whom leave or are cancelled."""
    rng = random.Random(seed)
    engine = storm_engine(rng)

    async def caller(prompt: list[int]) -> None:
        params, patience = settings(rng), rng.choice([1, 3, 1000])
        await asyncio.sleep(rng.random() / 100)
        try:
            async for delta in front.generate(prompt, params, priority=rng.randrange(2)):
                patience -= 1
                if delta.output is not None:
                    check_answer(delta.output, params)
                elif not patience:
                    return
        except ServeError as error:
            if not re.search("a kernel failed|out of memory", str(error)):
                raise

    async with AsyncEngine(engine) as front:
        tasks = [asyncio.create_task(caller(p)) for p in prompts(20, seed)]
        for task in rng.sample(tasks, 4):
            await asyncio.sleep(rng.random() / 100)
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [e for e in found if e is not None and not isinstance(e, asyncio.CancelledError)] == []
    assert_empty(engine)


@pytest.mark.parametrize("part", range(2))
def test_a_storm(part: int) -> None:
    for seed in range(part * 8, part * 8 + 8):
        storm(seed)


def test_a_storm_of_callers_who_hang_up() -> None:
    for seed in range(6):
        asyncio.run(asyncio.wait_for(hang_up(seed), 60))


@pytest.mark.slow
def test_a_storm_of_ten_minutes() -> None:
    begin, seed = time.monotonic(), 10_000
    while time.monotonic() < begin + 600:
        storm(seed)
        asyncio.run(asyncio.wait_for(hang_up(seed), 60))
        seed += 1
    print(f"{seed - 10_000} storms")
