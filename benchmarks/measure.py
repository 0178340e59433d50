"""Times, memory and differences on one device: what the benchmarks of kernels share.

A side of a benchmark that fails says what failed, and the other sides go on: out of memory is said to be that, and
everything else to be what it is.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from duel import clocks, machine, write_record
from shapes import FLUSHED
from torch import Tensor


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call on the device."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    # The GPU's second-level cache is emptied, as it would be by the rest of a model.
    _flush(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


_flusher: dict[str, Tensor] = {}


def _flush(device: str) -> None:
    if device not in _flusher:
        _flusher[device] = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    _flusher[device].zero_()


def medians(
    calls: dict[str, Callable[[], Any]], rounds: int, device: str, problems: dict[str, str] | None = None
) -> dict[str, float]:
    """Median seconds of each call: two rounds that do not count, then `rounds`, the sides in turns.

    On a CPU, where benchmarks of kernels only go through their motions, every round counts. A side that runs out of
    memory is left out, and said so in `problems`; without `problems` the error is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    uncounted = 0 if device == "cpu" else 2
    for round_ in range(rounds + uncounted):
        for name in list(times):
            seconds = timed(calls[name], device) if problems is None else tried(name, calls[name], device, problems)
            if seconds is None:
                del times[name]
            elif round_ >= uncounted:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def tried(name: str, call: Callable[[], Any], device: str, problems: dict[str, str]) -> float | None:
    """Seconds of one call; None where it ran out of memory, which `problems` then says."""
    try:
        return timed(call, device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        problems[name] = failure(error)
    emptied(device)
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether the device's memory is what was missing: torch's own error, or what CUDA, cuBLAS or Triton say then."""
    said = any(words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))
    return isinstance(error, torch.OutOfMemoryError) or said


def failure(error: Exception) -> str:
    """Why a side has no figure, in a line."""
    first = " ".join(str(error).split())[:200]
    return f"out of memory: {first}" if out_of_memory(error) else f"does not run here: {type(error).__name__}: {first}"


def emptied(device: str) -> None:
    """Give back what nobody holds: of a side that failed, and between shapes."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def free_bytes(device: str) -> float:
    """What a new tensor can have of the device's memory; on a CPU, where nobody asks, no limit."""
    if device == "cpu":
        return float("inf")
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + held


def lacking(need: float, device: str, free: float | None = None) -> str | None:
    """Why something that holds `need` bytes at its peak is not started on the device; None where it fits."""
    free = free_bytes(device) if free is None else free
    if need <= free:
        return None
    return f"does not fit: needs {need / 2**30:.1f} GiB at its peak, {free / 2**30:.1f} GiB are free"


def difference(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """The largest relative norm of differences, tensor by tensor; inf where one has a NaN."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        error = scale = 0.0
        # In pieces: in float32, a whole one may be more than the device has left.
        for p, q in zip(a.reshape(-1).split(2**26), b.reshape(-1).split(2**26), strict=True):
            error += (p.float() - q.float()).square().sum().item()
            scale += q.float().square().sum().item()
        found = (error / max(scale, 1e-30)) ** 0.5
        worst = max(worst, found if found == found else float("inf"))
    return worst


def ceilings(device: str) -> tuple[float, float]:
    """TFLOP/s of a large cuBLAS product in bfloat16, and GB/s of a large copy (read + written)."""
    n = 8192 if device != "cpu" else 512
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    # Random: a product, and a copy, of zeros takes less power, and so less time.
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    source = torch.randint(-128, 128, (2**30 if device != "cpu" else 2**20,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    found = medians(calls, 20, device)
    return 2 * n**3 / found["product"] / 1e12, 2 * source.numel() / found["copy"] / 1e9


def planned_rounds(round_s: float, fixed_s: float, limit_s: float, wanted: int, least: int = 3) -> tuple[int, float]:
    """How many timed rounds of everything fit into `limit_s` seconds, `wanted` at most, and the seconds it will take.

    A round of all sides of all rows takes `round_s`; two more go before; all else takes `fixed_s`.
    """
    rounds = wanted if round_s <= 0 else min(wanted, int((limit_s - fixed_s) / round_s) - 2)
    rounds = max(least, rounds)
    return rounds, fixed_s + (rounds + 2) * round_s


class Report:
    """What a benchmark finds, on the screen and in its record, row by row: a run cut short leaves what it had."""

    def __init__(self, written: Path | None, head: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> None:
        self.written, self.line = written, line
        self.record: dict[str, Any] = {**head, "rows": [], "notes": []}

    def row(self, row: dict[str, Any]) -> None:
        self.record["rows"].append(row)
        print(self.line(row), flush=True)
        write_record(self.written, self.record)

    def note(self, problem: str, **what: Any) -> None:
        """Something that has no figure, and why."""
        self.record["notes"].append({**what, "problem": problem})
        print(f"  {what['side'] + ': ' if 'side' in what else ''}{problem}", flush=True)
        write_record(self.written, self.record)

    def ended(self) -> None:
        """The clocks at the end, beside those of the beginning."""
        self.record.setdefault("clocks", []).append(clocks())
        print("".join(f"clocks: {line}\n" for line in self.record["clocks"] if line), end="")
        write_record(self.written, self.record)


def head(device: str) -> dict[str, Any]:
    """The machine, its versions and clocks; printed, and the beginning of a record."""
    where = machine() if device == "cpu" else f"{torch.cuda.get_device_name()}; {machine()}"
    print(where)
    return {"machine": where, "clocks": [clocks()] if device != "cpu" else []}
