"""Where a training run keeps its checkpoints, and which one is meant where only the run is named. No package."""

import os
from pathlib import Path

from moe.errors import CheckpointError

# RUN/final is what a complete run leaves, RUN/checkpoints/step-000500 what it can go on from.
FINAL, CHECKPOINTS, METRICS_FILE = "final", "checkpoints", "metrics.jsonl"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin")


def locate(path: str | os.PathLike[str]) -> Path:
    """The directory of the checkpoint that `path` names: RUN/final where `path` is a complete run, else `path` itself.

    Nothing is chosen silently: of a run that is not complete, a checkpoint has to be named.

    Raises:
        CheckpointError: `path` is a run without final/; the message names its newest checkpoint.
    """
    place = Path(path)
    if not place.is_dir() or any(next(place.glob(pattern), None) for pattern in _WEIGHTS):
        return place
    if (place / FINAL).is_dir():
        return place / FINAL
    steps = step_checkpoints(place.parent if place.name == CHECKPOINTS else place)
    if steps:
        raise CheckpointError(
            f"{place} is a run that is not complete (no {FINAL}/): let it finish (the same command goes on), or give "
            f"its newest checkpoint, {steps[-1]}"
        )
    if (place / METRICS_FILE).is_file():
        raise CheckpointError(f"{place} is a run that has saved no checkpoint yet: let it go on (the same command)")
    return place


def step_checkpoints(run_dir: Path) -> list[Path]:
    """RUN/checkpoints/step-..., the newest last."""
    found = [p for p in (run_dir / CHECKPOINTS).glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))
