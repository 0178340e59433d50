"""What the figures were measured on: versions, and the GPU's clocks, power and temperature while each part ran."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

# Column of nvidia-smi -> name in the record. Queries only: nothing here changes a setting of the card.
COLUMNS = {
    "utilization.gpu": "busy_percent",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
    "memory.used": "memory_mib",
}
REASON_COLUMNS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the latter of older drivers
REASONS = {
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "thermal, by software",
    0x040: "thermal, by hardware",
    0x080: "power brake",
    0x100: "display clocks",
}
EVERY_MS = 250
_LOOK = """
import json, platform, importlib.metadata as metadata
found = {"python": platform.python_version()}
for name in ("torch", "triton", "numpy", "transformers", "einops", "liger-kernel", "scattermoe", "moe-ops"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
import torch
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"gpu": p.name, "gpus": torch.cuda.device_count(), "capability": f"{p.major}.{p.minor}",
              "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count,
              "cuda": torch.version.cuda or f"hip {torch.version.hip}"}
print(json.dumps(found))
"""


def machine(environment: dict[str, str]) -> dict[str, Any]:
    """Versions, and the first GPU where torch sees one. Asked of a process of its own: this one takes no GPU memory."""
    done = subprocess.run([sys.executable, "-c", _LOOK], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{sys.executable} cannot import torch:\n{done.stderr.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    driver = _smi("--query-gpu=driver_version", "--format=csv,noheader")
    return found | ({"driver": driver.splitlines()[0].strip()} if driver else {}) | {"cores": os.cpu_count()}


def _smi(*arguments: str) -> str:
    """What nvidia-smi answers; nothing where it is not, or does not know the question."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


class Sampler:
    """While open, reads the GPU's state four times a second, where nvidia-smi is there."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, list[float | None]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Sampler":
        listed = "--format=csv,noheader"
        reasons = [c for c in REASON_COLUMNS if _smi(f"--query-gpu={c}", listed)][:1]
        if _smi("--query-gpu=index", listed):
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
            query = f"--query-gpu={','.join([*COLUMNS, *reasons])}"
            command = ["nvidia-smi", "-i", first, query, f"{listed},nounits", "-lms", str(EVERY_MS)]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self.samples.append((time.monotonic(), [_number(cell) for cell in line.split(",")]))

    def between(self, start: float, end: float) -> dict[str, Any] | None:
        """Lowest, median and highest of each column while the GPU was busy, and the share of time of what held it back.

        Times are of `time.monotonic`; None where there is no sample.
        """
        rows = [values for when, values in list(self.samples) if start <= when <= end]
        if not rows:
            return None
        busy = [r for r in rows if r[0]] or rows
        found: dict[str, Any] = {"samples": len(rows), "busy": round(len([r for r in rows if r[0]]) / len(rows), 3)}
        for column, name in list(enumerate(COLUMNS.values()))[1:]:
            values = [v for r in busy if (v := r[column]) is not None]
            if values:
                found[name] = [min(values), statistics.median(values), max(values)]
        masks = [int(r[len(COLUMNS)] or 0) for r in busy if len(r) > len(COLUMNS)]
        shares = {text: sum(bool(m & bit) for m in masks) / len(busy) for bit, text in REASONS.items()}
        return found | {"held_back": {text: round(share, 3) for text, share in shares.items() if share}}


def _number(cell: str) -> float | None:
    """A cell of nvidia-smi; None for "[N/A]" and its kin."""
    try:
        return float(int(cell, 16)) if "0x" in cell else float(cell)
    except ValueError:
        return None
