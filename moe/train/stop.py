"""Ctrl-C and SIGTERM: the first asks the run to stop after its step and save, the second stops it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequested(Exception):
    """Leaves a long piece of work that is not a training step."""


class Stop:
    """While open, catches SIGINT and SIGTERM; `signal` is the number of the one that came, 0 before.

    Outside the main thread, where Python allows no handlers, signals are left alone.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number
        # Not print: a handler may run in the middle of one.
        os.write(2, b"\nstopping: this step is finished and saved first; once more stops at once\n")
