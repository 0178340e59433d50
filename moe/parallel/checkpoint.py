"""Checkpoints of a run on many ranks: sharded, written while training goes on, loaded on any other mesh.

DIR/step-000500/ is what torch.distributed.checkpoint writes: the `*.distcp` of each rank, and last, by a rename,
`.metadata`. A directory without that is not a checkpoint. Beside them lie `training.pt` (what is the same on every
rank), `config.toml`, and for each file a `.crc32`, since torch reads a damaged tensor without noticing.

Everything in it goes by the names of the whole model, so that it fits any number of ranks, stages and shards:
"model.NAME", "optimizer.state.NAME.KEY", "optimizer.settings.NAME" (JSON: rate, decay, ...), "rng.RANK.DEVICE".
"""

import io
import os
import shutil
import traceback
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_entries
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_entries

from moe.checkpoint import CONFIG_FILE
from moe.config import Config
from moe.errors import CheckpointError, ConfigError
from moe.io.tensorfiles import some
from moe.parallel.entries import agreed, entries, gathered, paired, restore, rng_state, set_rng_state, warn, world

TRAINING_FILE, METADATA_FILE = "training.pt", ".metadata"
VERSION = 1  # of training.pt and of the names of the entries
_CHUNK = 2**24  # bytes that are read at a time to be checked
FAILURES = (Exception, CheckpointException)  # torch's own is none


# ------------------------------------------------------------------------------------------------------ a run's steps


class Checkpointer:
    """Writes and reads the checkpoints of one run, from all its ranks together.

    Every method but the properties is for all ranks of the default process group to call alike; without one, a single
    process does the same alone. A checkpoint that is being written counts for nothing until all of it is on disk, and
    an older one is deleted only then.

    Args:
        directory: gets step-000500/ and the like; on a file system that all ranks see.
        cfg: stored beside the weights; None stores none, and such a checkpoint cannot be exported.
        keep_last: so many of the newest are kept, at least 1.
        keep_every: so are those of every so many steps; 0 for none.
        asynchronous: `save` returns once the state is copied to the CPU's memory, and a thread writes it.
        verify: files are compared with their checksums before they are loaded, each rank its share of them.

    Raises:
        ConfigError: `keep_last` or `keep_every` is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        cfg: Config | None = None,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        asynchronous: bool = True,
        verify: bool = True,
    ) -> None:
        for name, value, least in (("keep_last", keep_last, 1), ("keep_every", keep_every, 0)):
            if value < least:
                raise ConfigError(f"{name} = {value}: must be at least {least}")
        self.directory, self.cfg = Path(directory), cfg
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous, self.verify = asynchronous, verify
        # The thread that writes has collectives of its own: in the training's group they would mix.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._stager: DefaultStager | None = None
        self._pending: tuple[int, Any] | None = None
        self._whole = -1  # the step of the newest one that this process knows to be whole
        self._damaged: set[int] = set()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        # After an error other ranks may be gone, and what is being written would wait for them.

    def close(self) -> None:
        """Waits for what is being written; raises as `wait` does."""
        try:
            self.wait()
        finally:
            if self._stager is not None:
                self._stager.close()
                self._stager = None

    def save(
        self,
        step: int,
        parts: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer] = (),
        training: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Writes the checkpoint of `step`; of a step that was just loaded or saved, nothing.

        Args:
            parts: this rank's model, or its pipeline stages.
            optimizers: of these parameters; each of one part's alone.
            training: whatever else a resumed run needs and all ranks have alike, such as the data position: plain
                values and tensors. That of rank 0 is stored.
            wait: until it is written, whatever `asynchronous` says.

        Raises:
            CheckpointError: this one, or the one before, could not be written; the message says which, and why. Those
                that were whole still are.
        """
        self.wait()
        if step == self._whole:
            return
        held = entries(parts, optimizers, complete=False) | rng_state()
        small = small_files({"step": step, "world": world(), **(training or {})}, self.cfg)
        writer = Writer(step_directory(self.directory, step), small, lambda: self._delete_old(step))
        how = {"storage_writer": writer, "process_group": self.group, "no_dist": self.group is None}
        if self.group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed")
        try:
            if self.asynchronous and not wait:
                self._stager = self._stager or _stager()
                self._pending = step, async_save(held, async_stager=self._stager, **how)
            else:
                save_entries(held, **how)
                self._whole = step
        except FAILURES as error:
            raise _unwritten(self.directory, step, error) from error

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on disk. Raises CheckpointError if it could not be."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except FAILURES as error:
            raise _unwritten(self.directory, step, error) from error
        self._whole = step

    def load(
        self, parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer] = (), *, step: int | None = None
    ) -> dict[str, Any] | None:
        """Gives weights, buffers, optimizers and random generators what the newest whole checkpoint has, in place.

        One that is unfinished or damaged is passed over with a warning that says why. Random generators are only
        restored on as many ranks as they were saved on.

        Args:
            parts, optimizers: as for `save`, on any mesh. No optimizers: the weights alone are wanted.
            step: this one and no other.

        Returns:
            The `training` that `save` was given, with "step" and "world"; None where nothing has been saved.

        Raises:
            CheckpointError: none is whole though some were saved; it is of another version; an entry is missing in the
                checkpoint or in the model and its optimizers, or has another shape (the message names it).
        """
        self.wait()
        whole, unfinished = agreed(lambda: _listed(self.directory), self.group)
        if step is not None:
            whole, unfinished = [s for s in whole if s == step], [s for s in unfinished if s == step]
        newest = whole[-1] if whole else -1
        for late in (s for s in unfinished if s > newest):
            warn(f"{step_directory(self.directory, late)} is passed over: it is unfinished (no {METADATA_FILE})")
        reasons = []
        for candidate in reversed(whole):
            place = step_directory(self.directory, candidate)
            reason = _damage(place, self.group, self.verify)
            if not reason:
                training = load(place, parts, optimizers, group=self.group)
                self._whole = candidate
                return training
            reasons.append(f"{place}: {reason}")
            self._damaged.add(candidate)
            if candidate != whole[0]:
                warn(f"{place} is passed over for the one before: {reason}")
        if reasons:
            raise CheckpointError(
                f"no checkpoint is whole ({'; '.join(reasons)}): restore one, or delete them to start anew"
            )
        if step is not None:
            raise CheckpointError(f"{step_directory(self.directory, step)} is not a whole checkpoint")
        return None

    def _delete_old(self, step: int) -> None:
        """On rank 0, once `step` is whole."""
        self._damaged.discard(step)
        whole, unfinished = _listed(self.directory)
        good = [s for s in whole if s not in self._damaged]
        kept = {step, *good[-self.keep_last :], *self._damaged}
        if self.keep_every:
            kept |= {s for s in good if s % self.keep_every == 0}
        for old in [*(s for s in whole if s not in kept), *(s for s in unfinished if s < step)]:
            place = step_directory(self.directory, old)
            (place / METADATA_FILE).unlink(missing_ok=True)  # first, so that half of one does not count
            shutil.rmtree(place, ignore_errors=True)


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:06d}"


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that has been written to its end, if any; whether it is damaged is not looked at."""
    whole, _ = _listed(Path(directory))
    return step_directory(Path(directory), whole[-1]) if whole else None


def _listed(directory: Path) -> tuple[list[int], list[int]]:
    """The steps that are whole and those that are unfinished, in order."""
    whole, unfinished = [], []
    for place in directory.glob("step-*"):
        number = place.name.removeprefix("step-")
        if number.isdecimal() and place.is_dir():
            (whole if (place / METADATA_FILE).is_file() else unfinished).append(int(number))
    return sorted(whole), sorted(unfinished)


# ---------------------------------------------------------------------------------------------------- one checkpoint


def load(
    place: str | os.PathLike[str],
    parts: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Loads one checkpoint in place, from all ranks together; as `Checkpointer.load`, without a look for damage."""
    place = Path(place)
    training = read_training(place)
    stored = FileSystemReader(place).read_metadata()
    held = entries(parts, optimizers, complete=True)
    fresh = _match(place, held, stored, group, weights_only=not optimizers)
    if optimizers and training["world"] == world():
        held |= {key: value for key, value in rng_state().items() if key in stored.state_dict_metadata}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load_entries(
                held,
                storage_reader=FileSystemReader(place),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            raise CheckpointError(f"{place} cannot be read: {_first(error)}") from error
    for part, optimizer in paired(parts, optimizers):
        restore(part, optimizer, held, fresh)
    set_rng_state(held)
    return training


def read_training(place: Path) -> dict[str, Any]:
    """What is the same on all ranks: the `training` of `Checkpointer.save`, with "step" and "world" (ranks).

    Raises:
        CheckpointError: it cannot be read, or is of another version.
    """
    file = place / TRAINING_FILE
    try:
        training = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file} cannot be read ({reason}): delete {place} to use an older one") from error
    version = training.pop("version", None)
    if version != VERSION:
        raise CheckpointError(
            f"{file} is of version {version}, and this gpt4-moe knows {VERSION}: load it with the one that wrote it, "
            "export it there, and begin a new run with these weights"
        )
    return training


def _match(
    place: Path, held: dict[str, Any], stored: Metadata, group: dist.ProcessGroup | None, weights_only: bool
) -> set[str]:
    """Compares what all ranks have with what is stored. Of parameters that were never updated, the state that a new
    optimizer would give them is taken out of `held`, and their names are returned.

    Raises:
        CheckpointError: on every rank, whichever of them found something.
    """
    known = stored.state_dict_metadata
    updated = {_owner(key) for key in known if key.startswith("optimizer.state.")}
    fresh = {
        _owner(key)
        for key in held
        if key.startswith("optimizer.state.")
        and _owner(key) not in updated
        and f"optimizer.settings.{_owner(key)}" in known
    }
    for key in [k for k in held if k.startswith("optimizer.state.") and _owner(k) in fresh]:
        del held[key]
    missing, wrong = [], []
    for key, value in held.items():
        found = known.get(key)
        if found is None:
            missing.append(key)
        elif isinstance(found, TensorStorageMetadata) and isinstance(value, Tensor) and found.size != value.shape:
            wrong.append(f"{key} is {list(found.size)}, here it is {list(value.shape)}")
    seen = gathered((set(held), missing, wrong), group)
    wanted = set().union(*(names for names, _, _ in seen))
    skipped = ("rng.", "optimizer.") if weights_only else ("rng.",)
    missing = sorted({key for _, lacking, _ in seen for key in lacking})
    unexpected = sorted(key for key in known if key not in wanted and not key.startswith(skipped))
    wrong = sorted({said for _, _, shapes in seen for said in shapes})
    if missing or unexpected or wrong:
        parts = [f"{len(missing)} entries are missing in it ({some(missing)})"] if missing else []
        parts += [f"{len(unexpected)} have no place here ({some(unexpected)})"] if unexpected else []
        parts += [f"{len(wrong)} have another shape ({some(wrong, '; ')})"] if wrong else []
        raise CheckpointError(f"{place} is of another model or other optimizers: {'; '.join(parts)}")
    return fresh


def _owner(key: str) -> str:
    """The parameter that an "optimizer.state.NAME.KEY" is of."""
    return key.removeprefix("optimizer.state.").rpartition(".")[0]


def _damage(place: Path, group: dist.ProcessGroup | None, verify: bool) -> str:
    """Why a checkpoint cannot be used, the same on all ranks, each of which looks at its share; "" if it can."""

    def look() -> str:
        try:
            stored = FileSystemReader(place).read_metadata().storage_data
            files = {info.relative_path for info in (stored or {}).values()} | {TRAINING_FILE}
        except Exception as error:
            return f"{METADATA_FILE} cannot be read ({error or type(error).__name__})"
        rank = dist.get_rank() if dist.is_initialized() else 0
        for name in sorted(files)[rank :: world()]:
            file = place / name
            try:
                if verify and _checksum(file) != file.with_name(f"{name}.crc32").read_text():
                    return f"{name} has not the content that was written"
                if not file.is_file():
                    return f"{name} is missing"
            except OSError as error:
                return f"{error.filename and Path(error.filename).name}: {error.strerror}"
        return ""

    return next(filter(None, gathered(look(), group)), "")


# ----------------------------------------------------------------------------------------------------------- writing


class Writer(FileSystemWriter):
    """torch's writer into a directory that it empties first, with checksums, and `small` files from rank 0."""

    def __init__(self, place: Path, small: Mapping[str, bytes], done: Callable[[], None] = lambda: None) -> None:
        super().__init__(place)
        self.place, self.small, self.done = place, small, done

    def prepare_local_plan(self, plan: Any) -> Any:
        self.place.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """On rank 0, when all ranks have planned and none writes yet: an unfinished or damaged one makes room."""
        (self.place / METADATA_FILE).unlink(missing_ok=True)
        for left in self.place.iterdir():
            left.unlink()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        for file in self.place.glob(f"{plan.storage_data.prefix}*.distcp"):
            _write(file.with_name(f"{file.name}.crc32"), _checksum(file).encode())
        return written

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On rank 0, when all ranks have written."""
        for name, content in self.small.items():
            _write(self.place / name, content)
            _write(self.place / f"{name}.crc32", _checksum(self.place / name).encode())
        _sync(self.place)
        super().finish(metadata, results)
        _sync(self.place)
        _sync(self.place.parent)
        self.done()


def small_files(training: Mapping[str, Any], cfg: Config | None) -> dict[str, bytes]:
    """The files that rank 0 writes beside everybody's shards, by name."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **training}, buffer)
    config = {} if cfg is None else {CONFIG_FILE: cfg.to_toml().encode()}
    return {TRAINING_FILE: buffer.getvalue(), **config}


def _stager() -> DefaultStager:
    """Copies to pinned memory, which it keeps for the next time, and returns when it has."""
    cuda = torch.cuda.is_available()
    return DefaultStager(StagingOptions(cuda, False, False, cuda))


def _checksum(file: Path) -> str:
    value = 0
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x} {file.stat().st_size}"


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritten(directory: Path, step: int, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"cannot write {step_directory(directory, step)}: {_first(error)} (the checkpoints before it are as they were)"
    )


def _first(error: BaseException) -> str:
    """In one line what went wrong first, and on which rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_first(cause)}"
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
