"""Many callers of one engine: each gets its own answer or its own error, and nobody waits for ever."""

import asyncio
import gc
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from moe.errors import ConfigError, ServeError
from moe.serve import AsyncEngine, SamplingParams
from tests.serve.scripted import assert_empty, greedy_answer, prompts, scripted_engine

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=30)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


async def answer(front: AsyncEngine, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [t async for delta in front.generate(prompt, params) for t in delta.token_ids]


def test_callers_side_by_side_get_their_answers_and_a_bad_prompt_is_its_callers_error_alone() -> None:
    async def main() -> None:
        every = prompts(20)
        async with AsyncEngine(engine) as front:
            found = await asyncio.gather(*(answer(front, p) for p in [*every, [99]]), return_exceptions=True)
        assert found[:-1] == [greedy_answer(p, 12) for p in every]
        assert isinstance(found[-1], ConfigError)
        assert "prompt has id 99" in str(found[-1])

    engine = scripted_engine(max_running=5)
    run(main())
    assert engine.stats.steps < 20 * 12  # they share passes
    assert_empty(engine)


@pytest.mark.parametrize("how", ["cancelled", "returns", "forgets"])
def test_a_caller_who_leaves_takes_the_request_back(how: str) -> None:
    async def leave(front: AsyncEngine) -> None:
        deltas = front.generate([1], LONG)
        async for _ in deltas:
            began.set()
            if how != "cancelled":
                break
        if how == "returns":
            await deltas.aclose()

    async def main() -> None:
        async with AsyncEngine(engine) as front:
            task = asyncio.create_task(leave(front))
            await began.wait()
            if how == "cancelled":
                task.cancel()
            await asyncio.wait([task])
            gc.collect()
            go.set()
            assert await answer(front, [2]) == greedy_answer([2], 12)

    began, go = asyncio.Event(), threading.Event()

    def fault(_: int) -> None:
        if engine.stats.steps >= 2:  # every later pass waits until the caller has gone
            go.wait(30)

    engine = scripted_engine(fault)
    run(main())
    assert_empty(engine)
    assert engine.stats.finished == {"abort": 1, "length": 1}


def test_an_error_of_the_engine_itself_reaches_every_caller_and_those_who_come_later() -> None:
    async def main() -> None:
        front = AsyncEngine(engine)
        tasks = [asyncio.create_task(answer(front, [i], LONG)) for i in range(5)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for error in found:
            assert isinstance(error, ServeError)
            assert "the engine failed and takes no more requests: ValueError: a bug" in str(error)
            assert isinstance(error.__cause__, ValueError)
        with pytest.raises(ServeError, match="takes no more requests"):
            await answer(front, [1])
        await front.close()

    def broken(_: object) -> None:
        if engine.stats.steps > 3:
            raise ValueError("a bug")

    engine = scripted_engine()
    engine.listeners.append(broken)
    run(main())


def test_a_pass_that_fails_is_the_error_of_its_callers() -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as front:
            with pytest.raises(ServeError, match="RuntimeError: a kernel failed"):
                await answer(front, [1])
            assert await answer(front, [2]) == greedy_answer([2], 12)

    def fault(n: int) -> None:
        if engine.stats.steps == 3:
            engine.stats.steps += 1
            raise RuntimeError("a kernel failed")

    engine = scripted_engine(fault)
    run(main())
    assert_empty(engine)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_answers_what_it_has_or_ends_it_and_takes_no_more(drain: bool) -> None:
    async def main() -> None:
        front = AsyncEngine(engine)
        streams = [front.generate([i], LONG) for i in range(3)]
        for stream in streams:
            await anext(stream)
        await front.close(drain=drain)
        for i, stream in enumerate(streams):
            output = [d async for d in stream][-1].output
            assert output is not None
            if drain:
                assert output.token_ids == greedy_answer([i], 30)
            else:
                assert output.finish_reason in ("abort", "length")
        with pytest.raises(ServeError, match="the engine is closed"):
            await answer(front, [1])
        await front.close()

    engine = scripted_engine()
    run(main())
    assert_empty(engine)


def test_a_loop_that_is_closed_under_its_callers_leaves_nothing() -> None:
    engine = scripted_engine()
    front = AsyncEngine(engine)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(front.generate([1], LONG)))
    loop.close()
    run(front.close())
    assert_empty(engine)
