"""A group of parts, one after another: how long each may take, and what is written down of it."""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import card, process, record
from .parts import SECONDS_WORD, Part

PLANNED = 0.85  # of its limit a part may plan for: what it measures last takes as long as it takes


def run_group(
    parts: list[Part],
    seconds: float,
    out: Path,
    environment: dict[str, str],
    save: Callable[[str, dict[str, Any]], None],
) -> bool:
    """Run parts, one after another, in so many seconds; `save(name, entry)` after each.

    Returns whether all of them ended well.
    """
    deadline, well = time.monotonic() + seconds, True
    later = sum(part.seconds for part in parts)
    with card.Sampler() as sampler:
        for part in parts:
            later -= part.seconds
            # Its share, and what the earlier parts have left of theirs; the last seconds are for ending it.
            limit = max(5.0, deadline - time.monotonic() - later - 2 * process.GRACE_SECONDS)
            command = [word.replace(SECONDS_WORD, str(int(PLANNED * limit))) for word in part.command]
            print(f"\n=== {part.name}: {' '.join(command[1:])}", flush=True)
            if part.writes:
                (out / part.writes).unlink(missing_ok=True)  # of a run that did not come to read it
            entry: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), "status": "interrupted"}
            started, kernels = time.monotonic(), _kernels()
            try:
                ended = process.run(command, limit, {**environment, **part.environment})
                entry |= {"status": ended.status} | ({} if ended.status == "ok" else {"last_lines": ended.tail})
            finally:
                entry |= {
                    "seconds": round(time.monotonic() - started, 1),
                    "compiled": _kernels() - kernels,
                    "gpu": sampler.between(started, time.monotonic()),
                    "record": record.take(out / part.writes) if part.writes else None,
                }
                print(f"=== {part.name}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)
                save(part.name, entry)
            well &= ended.status == "ok"
    return well


def _kernels() -> int:
    """How many compiled kernels Triton's cache holds."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for kind in ("cubin", "hsaco") for _ in cache.glob(f"*/*.{kind}"))
