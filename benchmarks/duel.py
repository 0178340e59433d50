"""Runs the sides of a benchmark in turns, each in a process of its own, and prints medians and ratios.

A side is one Python call that prepares (builds a model, warms up) and returns a function to be timed. Its process
stays alive; the sides alternate round by round, so that a noisy machine is noisy for all of them, and each process
reports its own peak memory.
"""

import importlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe.io.files import write_whole


@dataclass
class Side:
    """A contestant: `maker` names a function of `script` that takes `settings` and returns the function to time."""

    name: str
    script: str
    maker: str
    settings: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    process: subprocess.Popen[str] | None = None
    python: str = ""  # an interpreter of another environment; "": this one
    environment: dict[str, str] = field(default_factory=dict)
    cpu_seconds: list[float] = field(default_factory=list)  # of all its threads: on a busy machine the better measure

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def start(self) -> None:
        """Start the process and wait until it has prepared."""
        command = [self.python or sys.executable, __file__, self.script, self.maker, json.dumps(self.settings)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **self.environment}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def run(self, keep: bool = True) -> float:
        """Run once; returns the seconds it took."""
        print("run", file=self._pipes().stdin, flush=True)
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        if keep:
            self.seconds.append(answer["seconds"])
            self.cpu_seconds.append(answer["cpu_seconds"])
        return answer["seconds"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _pipes(self) -> subprocess.Popen[str]:
        if self.process is None:
            raise RuntimeError(f"{self.name} is not running; call start() first")
        return self.process

    def _answer(self) -> dict[str, Any]:
        for line in self._pipes().stdout or ():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended before it answered; its error is above")


def alternate(sides: list[Side], rounds: int, runs: int = 2) -> None:
    """Let the sides take turns, `rounds` of them, `runs` timed runs a turn.

    Each turn begins with a run that does not count: while a process waits, the machine's caches, and on some machines
    its idle memory pages, go to others.
    """
    try:
        for side in sides:
            side.start()
        for _ in range(rounds):
            for side in sides:
                side.run(keep=False)
                for _ in range(runs):
                    side.run()
    finally:
        for side in sides:
            side.stop()


def fastest(candidates: list[Side]) -> Side:
    """The side that takes the least time, by one warm-up and the better of two runs each, in processes one at a time.

    A candidate that cannot run here (an implementation the machine, its memory or the version lacks) is left out; one
    whose warm-up takes three times as long as the best is not run again.
    """
    times: dict[str, float] = {}
    for side in candidates:
        try:
            side.start()
            times[side.name] = side.run(keep=False)
            if times[side.name] < 3 * min(times.values()):
                times[side.name] = min(side.run(keep=False) for _ in range(2))
        except SystemExit:
            print(f"  {side.name}: does not run here")
        finally:
            side.stop()
    for name, seconds in times.items():
        print(f"  {name}: {seconds * 1e3:.0f} ms")
    if not times:
        raise SystemExit("none of the candidates runs here")
    return min((s for s in candidates if s.name in times), key=lambda s: times[s.name])


UNITS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")


def machine() -> str:
    """One line on what the figures were measured with."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
        # A name such as "Intel Xeon Processor" says nothing of what it multiplies fast.
        units = [unit for unit in UNITS if unit in said.get("flags", "").split()]
        cpu = f"{said.get('model name', cpu)} ({', '.join(units)})"
    versions = []
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, {', '.join(versions)}"


def stop_without_gpu(dry_run: bool) -> None:
    """End a script that measures on a CUDA GPU where there is none, unless it only goes through its motions."""
    import torch

    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU; --dry-run goes through it on a CPU")


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Write what a benchmark found as JSON, where a path is given.

    The file is there whole or as it was before: benchmarks write after every row, and may be stopped at any moment.
    """
    if path:
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def clocks() -> str:
    """What the first GPU runs at, in one line: clocks, power, temperature, why it is throttled; "" without nvidia-smi.

    Of the GPU that CUDA counts first, where CUDA_VISIBLE_DEVICES names one.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active"
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader", f"--id={first}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _serve() -> None:
    """The process of one side: prepare, say so, then time one call for each line of input."""
    script, maker, settings = sys.argv[1:4]
    sys.path.insert(0, str(Path(script).parent))
    make: Callable[..., Callable[[], Any]] = getattr(importlib.import_module(Path(script).stem), maker)
    call = make(**json.loads(settings))
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        call()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    _serve()
