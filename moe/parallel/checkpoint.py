"""Checkpoints of a run over many ranks, by torch's distributed checkpoints: sharded, written while training goes on.

A directory for each step: what every rank has, under the model's names and whole shapes, so that any other mesh, or one
process, can read its part. A step counts when its `.metadata` is there, which is written last. What a later step would
need is never dropped silently: a name that only one side has is an error.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from moe.config import Config
from moe.errors import CheckpointError
from moe.io.files import write_whole
from moe.model import Transformer

VERSION = 1
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
# torch's own is no Exception.
_ANYTHING = (Exception, CheckpointException)
_NAME = re.compile(r"step-(\d+)$")


class Checkpoints:
    """The checkpoints of one run, in one directory that all ranks see. Every rank makes every call.

    Args:
        keep_last: so many of the newest are kept; older ones go once a newer one is whole.
        keep_every: steps that are multiples of it stay; 0: none.
    """

    def __init__(self, directory: Path, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self.directory, self.keep_last, self.keep_every = directory, max(1, keep_last), keep_every
        self._writing: tuple[int, Future[Any]] | None = None
        # Of its own: what is written behind the training must not mix with its messages.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(
        self, step: int, parts: Sequence[nn.Module], optimizers: Sequence[Any], extra: Mapping[str, Any],
        *, wait: bool = False,
    ) -> None:  # fmt: skip
        """Writes a checkpoint; returns when what is to be written was copied, or, with `wait`, when it is whole.

        Args:
            parts: the model, or this rank's stages of it. optimizers: one for each.
            extra: what JSON can hold: the place in the data, counts, settings.

        Raises:
            CheckpointError: the one before could not be written, or, with `wait`, this one.
        """
        self.finish()
        place = self.directory / f"step-{step:08d}"
        if _rank() == 0:
            if place.exists():  # begun by a run that was killed
                shutil.rmtree(place)
            place.mkdir(parents=True)
            said = {"version": VERSION, "step": step, "extra": dict(extra)}
            write_whole(place / "state.json", json.dumps(said, indent=1).encode())
        self._barrier()
        state = _state(parts, optimizers)
        if self._group is None:
            save_state(state, checkpoint_id=place)
            self._prune()
        else:
            made = async_save(state, checkpoint_id=place, process_group=self._group)
            self._writing = step, made  # type: ignore[assignment]
            if wait:
                self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if one is.

        Raises:
            CheckpointError: it could not be written; the message says why.
        """
        if self._writing is None:
            return
        (step, writing), self._writing = self._writing, None
        try:
            writing.result()
        except _ANYTHING as error:
            raise CheckpointError(f"checkpoint of step {step} was not written: {_reason(error)}") from error
        self._barrier()
        self._prune()
        self._barrier()  # all ranks see the same steps from here on

    def steps(self) -> list[int]:
        """Those that are whole, the newest last."""
        found = (_NAME.fullmatch(p.parent.name) for p in self.directory.glob("step-*/.metadata"))
        return sorted(int(m.group(1)) for m in found if m)

    def load(self, parts: Sequence[nn.Module], optimizers: Sequence[Any]) -> dict[str, Any] | None:
        """Reads the newest checkpoint that can be read into a model and its optimizers, on any mesh.

        One that is damaged is passed over, with a line on stderr that says why.

        Returns:
            What `save` was given as `extra`, with "step"; None where there is no checkpoint.

        Raises:
            CheckpointError: there are some, and none can be read; or one has other names than the model or optimizer.
        """
        self.finish()
        reasons = []
        for step in reversed(self._agreed_steps()):
            place = self.directory / f"step-{step:08d}"
            extra, reason = self._load(place, parts, optimizers)
            if reason is None:
                return {**extra, "step": step}
            reasons.append(f"{place}: {reason}")
            if _rank() == 0:
                print(f"warning: {reasons[-1]}; the one before is taken", file=sys.stderr)
        if reasons:
            raise CheckpointError("no checkpoint can be read: " + "; ".join(reasons))
        return None

    def _load(self, place: Path, parts: Sequence[nn.Module], optimizers: Sequence[Any]) -> tuple[dict, str | None]:
        state, extra, reason = _state(parts, optimizers), {}, None
        try:
            said = json.loads((place / "state.json").read_text())
            if said["version"] != VERSION:
                raise ValueError(f"version {said['version']} is not known here, but {VERSION}")
            extra = said["extra"]
            _check_names(place, state)
            load_state(state, checkpoint_id=place)
        except CheckpointError:
            raise
        except _ANYTHING as error:  # of a damaged file
            reason = _reason(error)
        reason = _first(reason)
        if reason is None:
            for part, optimizer in zip(parts, optimizers, strict=True):
                # Of every stage its own: a model has no place for the others'.
                set_model_state_dict(part, _own(state["model"], get_model_state_dict(part)))
                own = _own(state["optimizer"], get_optimizer_state_dict(part, optimizer, options=_FLAT))
                set_optimizer_state_dict(part, optimizer, own, options=_FLAT)
        return extra, reason

    def _agreed_steps(self) -> list[int]:
        box = [self.steps()]
        if dist.is_initialized():  # a rank may look a moment later than another
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _prune(self) -> None:
        if _rank() != 0:
            return
        steps = self.steps()
        for step in steps[: -self.keep_last]:
            if not self.keep_every or step % self.keep_every:
                shutil.rmtree(self.directory / f"step-{step:08d}", ignore_errors=True)

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)


def read_model(place: Path, cfg: Config) -> Transformer:
    """The model of one step's directory, in one process: for `moe.save`, and for all that is no training.

    Raises:
        CheckpointError: it is not whole, or of another shape.
    """
    if not (place / ".metadata").exists():
        raise CheckpointError(f"{place}: no .metadata, so it was not written to its end; take an earlier step")
    model = Transformer(cfg)
    state = {"model": model.state_dict()}
    try:
        load_state(state, checkpoint_id=place, no_dist=True)
    except _ANYTHING as error:
        raise CheckpointError(f"{place}: {_reason(error)}") from error
    model.load_state_dict(state["model"])
    return model


def _state(parts: Sequence[nn.Module], optimizers: Sequence[Any]) -> dict[str, dict[str, Any]]:
    model: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    for part, own in zip(parts, optimizers, strict=True):
        model |= get_model_state_dict(part)
        optimizer |= get_optimizer_state_dict(part, own, options=_FLAT)
    return {"model": model, "optimizer": optimizer}


def _own(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in like}


def _check_names(place: Path, state: Mapping[str, Mapping[str, Any]]) -> None:
    """That all ranks together want what there is, and nothing else."""
    mine = [f"{kind}.{name}" for kind, entries in state.items() for name in entries]
    every: list[list[str]] = [mine]
    if dist.is_initialized():
        every = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, mine)
    wanted = {name for names in every for name in names}
    there = set(FileSystemReader(place).read_metadata().state_dict_metadata)
    for names, what in ((wanted - there, "it lacks"), (there - wanted, "the model or its optimizer has no")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{place}: {what} {some}; give the configuration and the optimizer it was made with")


def _first(reason: str | None) -> str | None:
    """What went wrong on any rank."""
    if not dist.is_initialized():
        return reason
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, reason)
    return next((r for r in every if r is not None), None)


def _reason(error: BaseException) -> str:
    """Its last line: torch's begins with the traceback of every rank."""
    lines = (str(error) or type(error).__name__).strip().splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)[:300]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def optimizers_of(parts: Iterable[nn.Module], lr: float, **settings: Any) -> list[torch.optim.AdamW]:
    """An AdamW for each part of a model."""
    return [torch.optim.AdamW(part.parameters(), lr=lr, **settings) for part in parts]
