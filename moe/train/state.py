"""Checkpoints of a run: everything that a resumed run needs to go on as if nothing had happened.

`run_dir/checkpoints/step-000500/` is a checkpoint of the model (`moe.load` reads it) with a `training.pt` beside it. It
gets its name by a rename, once all of it is on disk: a directory of that name is complete.
"""

import dataclasses
import shutil
import tomllib
from pathlib import Path
from typing import Any

import torch

from moe.checkpoint import cannot_write, check_vocabulary, write_files
from moe.config import Config
from moe.errors import CheckpointError, ConfigError
from moe.io.files import atomic_directory
from moe.io.runs import CHECKPOINTS
from moe.model import Transformer
from moe.tokenizer import Tokenizer

TRAINING_FILE = "training.pt"
VERSION = 2  # of training.pt: the order of the optimizer's state is that of the parameters
KEEP = 2
# What may change between a run and its resumption: none of these changes the model that comes out.
HARMLESS = (
    "name",
    "train.activation_checkpointing",
    "train.log_every",
    "train.eval_every",
    "train.eval_tokens",
    "train.sample_every",
    "train.save_every",
)


def save(run_dir: Path, step: int, model: Transformer, tokenizer: Tokenizer, training: dict[str, Any]) -> Path:
    """Writes the checkpoint of `step` and deletes all but the newest `KEEP`.

    Raises:
        CheckpointError: it cannot be written, for instance because the disk is full. Older ones are untouched.
    """
    place = run_dir / CHECKPOINTS / f"step-{step:06d}"
    check_vocabulary(model.cfg, tokenizer)
    try:
        with atomic_directory(place) as temporary:
            write_files(model, temporary, tokenizer=tokenizer)
            with (temporary / TRAINING_FILE).open("wb") as file:
                _dump({"version": VERSION, **training}, file)
    except OSError as error:
        raise CheckpointError(cannot_write(place, error)) from error
    for old in _complete(run_dir)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _dump(training: dict[str, Any], file: Any) -> None:
    try:
        torch.save(training, file)
    except RuntimeError as error:  # torch wraps the OSError of a failed write
        raise OSError(str(error).splitlines()[0]) from error


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if any."""
    complete = _complete(run_dir)
    return complete[-1] if complete else None


def _complete(run_dir: Path) -> list[Path]:
    found = [p for p in (run_dir / CHECKPOINTS).glob("step-*") if (p / TRAINING_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def remove_unfinished(run_dir: Path) -> None:
    """Deletes what a process that was killed while saving left behind."""
    for place in (run_dir / CHECKPOINTS, run_dir):
        for left in place.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)


def load_training(checkpoint: Path) -> dict[str, Any]:
    """The `training` that `save` was given, on the CPU.

    Raises:
        CheckpointError: the file cannot be read, or is of another version.
    """
    try:
        training = torch.load(checkpoint / TRAINING_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{checkpoint / TRAINING_FILE} cannot be read ({reason}): delete {checkpoint} to resume from an older one"
        ) from error
    version = training.get("version", 1)
    if version != VERSION:
        age = "an older" if version < VERSION else "a newer"
        raise CheckpointError(
            f"{checkpoint / TRAINING_FILE} is of version {version}, of {age} gpt4-moe, and this one knows {VERSION}: "
            f"resume with that one, or begin a new run with these weights (--from {checkpoint})"
        )
    return training


def check_same_config(saved: str, cfg: Config, run_dir: Path) -> None:
    """Raises ConfigError, naming what differs, where a run made with `saved` (TOML) cannot go on with `cfg`."""
    changed = harmful(saved, cfg)
    if changed:
        raise ConfigError(
            f"{run_dir} holds a run with another configuration: {', '.join(changed)}. Restore it to resume, choose "
            "another directory (--out), or start anew (--fresh)"
        )


def harmful(saved: str, cfg: Config) -> list[str]:
    """Those `differences` with which a run made with `saved` (TOML) could not go on."""
    return [line for line in differences(saved, cfg) if line.split(" ")[0] not in HARMLESS]


def differences(saved: str, cfg: Config) -> list[str]:
    """What `cfg` has otherwise than `saved` (TOML): "key (was ..., now ...)"."""
    before, now = _flat(tomllib.loads(saved)), _flat(dataclasses.asdict(cfg))
    changed = [k for k in now if before.get(k) != now[k]] + [k for k in before if k not in now]
    return [f"{k} (was {before.get(k)!r}, now {now.get(k)!r})" for k in changed]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's random generators. Training draws nothing from them today; a resumed run must not depend on that."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores what `rng_state` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
