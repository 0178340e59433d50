"""One part of the GPU run as a process with a time limit, of which nothing is left when it has ended."""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 5.0  # between the request to end and the end
TAIL_LINES = 40


class Ended(NamedTuple):
    """How a part ended: "ok", or what went wrong; the last lines it printed."""

    status: str
    tail: list[str]


def run(command: list[str], limit: float, environment: dict[str, str]) -> Ended:
    """Run a command, its output passed on line by line; after `limit` seconds it ends, and whatever it has started.

    It and its children are one process group. Not a session of their own: where this program is itself ended with
    its session, they must be too.
    """
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, process_group=0, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        return Ended(f"cannot start: {error}", [])
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    reader = threading.Thread(target=_pass_on, args=(process, tail), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        status = "ok" if code == 0 else f"exit code {code}" if code > 0 else f"ended by signal {-code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        _end_group(process)
    reader.join(GRACE_SECONDS)  # a process that left the group may hold the pipe open
    return Ended(status, list(tail))


def _pass_on(process: subprocess.Popen[str], tail: deque[str]) -> None:
    for line in process.stdout or ():
        print(line, end="", flush=True)
        tail.append(line.rstrip()[:500])


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ask every process of the group to end, then end it."""
    for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 1.0)):
        until = time.monotonic() + patience
        there = _signal(process.pid, sent)
        while there and time.monotonic() < until:
            time.sleep(0.05)
            process.poll()  # a leader that nobody has waited for still counts as a member
            there = _signal(process.pid, 0)
        if not there:
            return


def _signal(group: int, number: int) -> bool:
    """Send a signal to a process group; whether it has members."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # on macOS: all that is left are zombies
    return True
