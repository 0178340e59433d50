"""Work that may bring its process down, in a process of its own: only the job that does so is lost."""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any


class Isolated:
    """Runs jobs one after another in another process, and starts that again where a job ended it.

    Args:
        prepare: called once in each new process with `arguments`; returns the function that a job is given to. Both
            are found by import there.
        seconds: how long a job may take before its process is ended; the first of a process may take a minute more.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...], seconds: float) -> None:
        self._prepare, self._arguments, self._seconds = prepare, arguments, seconds
        self._process: Any = None
        self._connection: Any = None

    def run(self, *job: Any) -> Any:
        """The result of a job.

        Raises:
            RuntimeError: the job raised, crashed or took too long; the message says which.
        """
        fresh = self._process is None
        if fresh:
            self._start()
        allowed = self._seconds + 60 * fresh
        try:
            self._connection.send(job)
            if not self._connection.poll(allowed):
                raise RuntimeError(f"no answer after {allowed:.0f} s")
            result, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise RuntimeError(f"its process ended with exit code {code}") from None
        except RuntimeError:
            self.close()
            raise
        if error:
            self.close()  # what raised may have left the process, its CUDA context above all, beyond use
            raise RuntimeError(error)
        return result

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._prepare, self._arguments), daemon=True)
        self._process.start()
        theirs.close()


def side_by_side(
    prepare: Callable[..., Callable[..., Any]],
    arguments: tuple[Any, ...],
    jobs: Iterable[tuple[Any, ...]],
    n: int,
    seconds: float = 300,
    until: float = math.inf,
) -> Iterator[Any]:
    """The results of jobs in their order, from `n` processes; the RuntimeError of `Isolated.run` where there is none.

    Args:
        until: on time.monotonic's clock, when no more jobs are begun.
    """
    free: SimpleQueue[Isolated] = SimpleQueue()
    workers = [Isolated(prepare, arguments, seconds) for _ in range(n)]
    for worker in workers:
        free.put(worker)

    def run(job: tuple[Any, ...]) -> Any:
        if time.monotonic() > until:
            return RuntimeError("no time was left for it")
        worker = free.get()
        try:
            return worker.run(*job)
        except RuntimeError as error:
            return error
        finally:
            free.put(worker)

    try:
        with ThreadPoolExecutor(n) as threads:
            yield from threads.map(run, jobs)
    finally:
        for worker in workers:
            worker.close()


def _serve(connection: Any, prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    run = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            run = run or prepare(*arguments)
            answer = run(*job), ""
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        connection.send(answer)
