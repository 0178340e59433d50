"""The engine for many callers at once: it runs on a thread of its own, and each caller awaits its own answer."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from moe.errors import ServeError
from moe.serve.engine import Engine, Prompt, check_served
from moe.serve.output import Delta
from moe.serve.request import SamplingParams


class AsyncEngine:
    """An engine that serves from a thread; an asynchronous context manager, or call `close`.

    async with AsyncEngine(engine) as front:
        async for delta in front.generate("Once upon a time"):
            print(delta.text, end="")

    Callers may be of any event loop. One that is cancelled, or stops iterating, takes its request back. An error of the
    engine itself reaches every caller, and no more requests are taken then.

    Args:
        engine: touched by this thread alone from now on, until `close`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()  # to be done between two steps
        self._lock = threading.Lock()  # of the next two
        self._callers: set[Callable[[Delta | Exception], None]] = set()
        self._closed: str | None = None  # why
        self._thread = threading.Thread(target=self._serve, name="moe-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncGenerator[Delta, None]:
        """The answers to a prompt as they grow; the last delta has the whole as its `output`.

        Raises:
            ConfigError, QueueFullError: see `Engine.add`.
            ServeError: a pass failed, the engine failed, or it is closed.
        """
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Delta | Exception]()
        name: str | None = None

        def put(one: Delta | Exception) -> None:
            try:
                loop.call_soon_threadsafe(found.put_nowait, one)
            except RuntimeError:  # the loop is closed, and who waited in it has gone
                abort()

        def add() -> None:
            nonlocal name
            try:
                name = self.engine.add(prompt, params, priority=priority, listener=put)
            except Exception as error:
                put(error)

        def abort() -> None:
            if name is not None:
                self.engine.abort(name)

        with self._lock:
            if self._closed:
                raise ServeError(self._closed)
            self._callers.add(put)
            self._commands.put(add)
        try:
            while True:
                one = await found.get()
                if isinstance(one, Exception):
                    raise one
                check_served([one.output] if one.output else [])
                yield one
                if one.output:
                    return
        finally:
            with self._lock:
                self._callers.discard(put)
            self._commands.put(abort)

    async def close(self, *, drain: bool = True) -> None:
        """Takes no more requests, and ends the thread.

        Args:
            drain: first answer the requests it has; else they end where they are, with finish reason "abort".
        """
        with self._lock:
            self._closed = self._closed or "the engine is closed: it takes no more requests"
            self._commands.put(lambda: self._end(drain))
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.close(drain=kind is None)

    # ---------------------------------------------------------------------------------------- on the engine's thread

    def _serve(self) -> None:
        self._open = True
        try:
            while self._open or not self.engine.idle:
                for command in self._next(wait=self._open and self.engine.idle):
                    command()
                self.engine.step()
        except BaseException as error:
            self._fail(error)

    def _next(self, wait: bool) -> Iterator[Callable[[], Any]]:
        """The commands that have come; waits for the first, where there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            yield self._commands.get(block=wait)
            while True:
                yield self._commands.get_nowait()

    def _end(self, drain: bool) -> None:
        self._open = False
        if not drain:
            self.engine.abort_all()

    def _fail(self, error: BaseException) -> None:
        reason = f"the engine failed and takes no more requests: {type(error).__name__}: {error}"
        with self._lock:
            self._closed, callers = reason, [*self._callers]
        for put in callers:
            failure = ServeError(reason)
            failure.__cause__ = error
            put(failure)
