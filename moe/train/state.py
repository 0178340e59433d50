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
from moe.config import Config, TrainConfig
from moe.errors import CheckpointError, ConfigError
from moe.io.files import atomic_directory, remove_abandoned
from moe.io.runs import CHECKPOINTS
from moe.model import Transformer
from moe.tokenizer import Tokenizer

TRAINING_FILE = "training.pt"
VERSION = 2  # of training.pt: the order of the optimizer's state is that of the parameters
KEEP = 2
# What may change between a run and its resumption. With these nothing of the model that comes out changes ...
HARMLESS = (
    "name",
    "train.activation_checkpointing",
    "train.log_every",
    "train.eval_every",
    "train.eval_tokens",
    "train.final_eval_tokens",
    "train.sample_every",
    "train.save_every",
)
# ... with these no more than its rounding, the same sums being taken in other parts ...
ROUNDING = ("train.micro_batch", "train.compile")
# ... and these say how the run goes on, not how it came here: a length that is still ahead, a rate that is lower.
LENGTH, RATES = ("train.steps", "train.tokens"), ("train.lr", "train.muon_lr")


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
    """Deletes what a process that was killed while writing left behind. The run is to be `locked`."""
    for left in (run_dir / CHECKPOINTS).glob(".*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for name in ("config.toml", "summary.json", "adapter.safetensors"):  # files that only the one who holds it writes
        for left in run_dir.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)
    for place in (run_dir, run_dir / "traces"):  # here others may be writing
        remove_abandoned(place)


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
            f"resume with that one, or begin a new run with these weights (`start_from={checkpoint}`)"
        )
    return training


def check_same_config(saved: str, cfg: Config, run_dir: Path) -> dict[str, list[Any]]:
    """What `cfg` sets otherwise than `saved` (TOML) and a run may go on with, as {key: [before, now]}.

    Raises:
        ConfigError: a run made with `saved` cannot go on with `cfg`; the message names what differs.
    """
    harmful = [
        _said(key, *values)
        for key, values in _changed(saved, cfg).items()
        if not (key in (*HARMLESS, *ROUNDING, *LENGTH) or (key in RATES and values[1] < values[0]))
    ]
    if harmful:
        raise ConfigError(
            f"{run_dir} holds a run with another configuration: {', '.join(harmful)}. Restore it to resume, choose "
            "another directory (`run_dir`), or start anew (`resume='never'`)"
        )
    return {key: values for key, values in _changed(saved, cfg).items() if key != "name"}


def harmful(saved: str, cfg: Config) -> list[str]:
    """Those `differences` that make another model than one made with `saved` (TOML)."""
    return [_said(k, *values) for k, values in _changed(saved, cfg).items() if k not in (*HARMLESS, *ROUNDING)]


def differences(saved: str, cfg: Config) -> list[str]:
    """What `cfg` has otherwise than `saved` (TOML): "key (was ..., now ...)"."""
    return [_said(key, *values) for key, values in _changed(saved, cfg).items()]


def _said(key: str, before: Any, now: Any) -> str:
    return f"{key} (was {before!r}, now {now!r})"


def _changed(saved: str, cfg: Config) -> dict[str, list[Any]]:
    """{key: [before, now]}; a key that `saved` does not know had its default."""
    defaults = _flat(dataclasses.asdict(TrainConfig()), "train.")
    before, now = _flat(tomllib.loads(saved)), _flat(dataclasses.asdict(cfg))
    before = {key: value for key, value in defaults.items() if key in now} | before
    keys = [k for k in now if before.get(k) != now[k]] + [k for k in before if k not in now]
    return {key: [before.get(key), now.get(key)] for key in keys}


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
