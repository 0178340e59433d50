"""Jobs of test_tune.py's other processes: a module of its own, so that those need not import torch."""

import os
import time
from collections.abc import Callable


def prepare(name: str) -> Callable[[str], tuple[str, int]]:
    def run(what: str) -> tuple[str, int]:
        if what == "crash":
            os.abort()
        if what == "hang":
            time.sleep(600)
        if what == "raise":
            raise ValueError("this one does not run")
        return f"{name} {what}", os.getpid()

    return run
