"""What a run measures: sums kept on the device between log points, `metrics.jsonl`, and TensorBoard if it is there.

Shape suffixes: L layers, E experts.
"""

import json
import math
import os
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from moe.io.runs import METRICS_FILE
from moe.profile import load_entropy
from moe.train.watch import Watch

SAMPLES_FILE = "samples.txt"

_SCALARS = ("loss", "lm", "balance", "z", "grad_norm")


class Meter:
    """Sums over the steps since the last log point. Adding to them never waits for the device; reading does."""

    def __init__(self, n_layers: int, n_experts: int, device: torch.device) -> None:
        self.steps = 0
        self.sums = torch.zeros(len(_SCALARS), dtype=torch.float64, device=device)
        self.counts_LE = torch.zeros(n_layers, n_experts, dtype=torch.int64, device=device)

    def add(self, scalars: dict[str, Tensor], counts_LE: Tensor) -> None:
        """One step: its loss, lm, balance, z and grad_norm as scalar tensors, and the routed tokens per expert."""
        self.steps += 1
        self.sums += torch.stack([scalars[name].detach().double() for name in _SCALARS])
        self.counts_LE += counts_LE

    def means(self) -> dict[str, float]:
        """The mean of each scalar over the steps since the last reset."""
        return dict(zip(_SCALARS, (self.sums / max(1, self.steps)).tolist(), strict=True))

    def load(self) -> list[list[float]]:
        """Per layer, the fraction of routed tokens that each expert served: [L][E], each row sums to 1."""
        return (self.counts_LE.double() / self.counts_LE.sum(1, keepdim=True).clamp(min=1)).tolist()

    def load_statistics(self) -> dict[str, Any]:
        """How evenly the experts of all layers, and of each layer, were used since the last reset.

        Returns:
            Of the worst layer: load_max_over_mean (1 when even), load_entropy (over its maximum, 1 when even) and
            load_cv (standard deviation over mean, 0 when even); dead_experts of all layers, those with less than a
            tenth of the mean load; and under `<name>_by_layer` each of them per layer, {"00": value, ...}.
        """
        counts_LE = self.counts_LE.cpu().double()
        load_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)
        ratio_LE = load_LE * load_LE.shape[1]
        per_layer = {
            "load_max_over_mean": ratio_LE.amax(1),
            "load_entropy": load_entropy(load_LE),
            "load_cv": ratio_LE.std(1, correction=0),
            "dead_experts": (ratio_LE < Watch.IDLE).sum(1),
        }
        worst = {name: (v.min() if name == "load_entropy" else v.max()).item() for name, v in per_layer.items()}
        worst["dead_experts"] = int(per_layer["dead_experts"].sum())
        by_layer = {
            f"{name}_by_layer": {f"{i:02d}": value for i, value in enumerate(values.tolist())}
            for name, values in per_layer.items()
        }
        return worst | by_layer

    def reset(self) -> None:
        """Starts the next interval."""
        self.steps = 0
        self.sums.zero_()
        self.counts_LE.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The sums: a checkpoint may fall between two log points."""
        return {"steps": self.steps, "sums": self.sums, "counts": self.counts_LE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.steps = state["steps"]
        self.sums.copy_(state["sums"])
        self.counts_LE.copy_(state["counts"])


class MetricsLog:
    """Appends records to `metrics.jsonl`, samples to `samples.txt`, and scalars to TensorBoard where it is installed.

    Args:
        sizes: what `sizes` gave at the checkpoint that the run resumes from: what was written after it is cut off. None
            starts both files anew.
    """

    def __init__(self, run_dir: Path, step: int, sizes: dict[str, int] | None) -> None:
        self._files: dict[str, IO[bytes]] = {}
        for name in (METRICS_FILE, SAMPLES_FILE):
            file = self._files[name] = (run_dir / name).open("ab")
            file.truncate(min(sizes[name] if sizes else 0, file.seek(0, os.SEEK_END)))
            file.seek(0, os.SEEK_END)
        self._board = _tensorboard(run_dir, step, new=sizes is None)

    @property
    def has_tensorboard(self) -> bool:
        """Whether TensorBoard is installed."""
        return self._board is not None

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record, which has a "kind" and a "step"; its numbers go to TensorBoard as kind/name."""
        self._append(METRICS_FILE, json.dumps(record, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in _numbers(record):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def write_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Appends samples to both files."""
        for sample in samples:
            self.write({"kind": "sample", "step": step, **sample})
            self._append(SAMPLES_FILE, f"--- step {step}\n{sample['prompt']}{sample['text']}\n\n")

    def sizes(self) -> dict[str, int]:
        """The length of each file in bytes, once it is on disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()

    def _append(self, name: str, text: str) -> None:
        self._files[name].write(text.encode("utf-8", "replace"))
        self._files[name].flush()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that is cut short is left out."""
    records = []
    for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def run_of(checkpoint: Path) -> Path | None:
    """The directory of the run that a checkpoint, RUN/final or RUN/checkpoints/step-000100, lies in, if any.

    RUN itself stands for RUN/final.
    """
    place = checkpoint.resolve()
    if (place / METRICS_FILE).is_file():
        return place
    run_dir = place.parent.parent if place.parent.name == "checkpoints" else place.parent
    return run_dir if (run_dir / METRICS_FILE).is_file() else None


def records_up_to(checkpoint: Path) -> list[dict[str, Any]]:
    """The records of the run that a checkpoint lies in, up to it; empty without a run."""
    run_dir, place = run_of(checkpoint), checkpoint.resolve()
    if run_dir is None:
        return []
    step = place.name.removeprefix("step-")
    last = int(step) if step.isdecimal() and place != run_dir else math.inf
    return [r for r in read_metrics(run_dir) if r["step"] <= last]


def load_over_training(checkpoint: Path) -> list[dict[str, Any]]:
    """The "train" records, each with its `load`, of the run that a checkpoint lies in, up to it; empty without a run.

    Args:
        checkpoint: RUN/final or RUN/checkpoints/step-000100.
    """
    return [r for r in records_up_to(checkpoint) if r["kind"] == "train"]


def stages(run_dir: Path) -> list[list[dict[str, Any]]]:
    """The records of the runs whose weights this one began with, the first of them first, and then its own."""
    found, seen = [read_metrics(run_dir)], {run_dir.resolve()}
    while found[0] and found[0][0]["kind"] == "start" and found[0][0]["from"]:
        before = run_dir / found[0][0]["from"]
        earlier = run_of(before)
        if earlier is None or earlier in seen:
            break
        found.insert(0, records_up_to(before))
        run_dir = earlier
        seen.add(earlier)
    return found


def _numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found.append((prefix + name, value))
    return found


def _tensorboard(run_dir: Path, step: int, *, new: bool) -> Any:
    """A SummaryWriter, or None where tensorboard is not installed. Events after `step` are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=0 if new else step + 1)
