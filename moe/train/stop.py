"""Ctrl-C, SIGTERM and a closed terminal ask a run to stop after its step and save; a second Ctrl-C stops it at once."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequested(Exception):
    """Leaves a long piece of work that is not a training step."""


class Stop:
    """While open, catches SIGINT, SIGTERM and SIGHUP; `signal` is the number of the one that came, 0 before.

    Outside the main thread, where Python allows no handlers, signals are left alone, and so is one that is ignored:
    nohup asks for that.
    """

    CAUGHT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in self.CAUGHT:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: not set from Python, so it could not be put back
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number != getattr(signal, "SIGHUP", 0):  # shells send that one again as they end
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number
        # Not print: a handler may run in the middle of one.
        with contextlib.suppress(OSError):  # of a terminal that is closed
            os.write(2, b"\nstopping: this step is finished and saved first; once more stops at once\n")
