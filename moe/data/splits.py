"""Splits that a dataset comes with: which one is trained on, which one is held out, and that no test set is trained on.

Named splits are those of a saved `DatasetDict`, or what the names of files and folders say: `train.jsonl` and
`test.jsonl`, `data/train-00000-of-00002.parquet`, `train/` beside `test/`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from moe.data.rows import plain_name
from moe.errors import DataError

TRAINING = ("train", "training")
# The first of them that is there is held out.
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test", "testing")
ALL = "all"  # as a split: everything, whatever the names say
# Files that are datasets for certain; "test.txt" may be an essay, "test.py" a program.
DATASET_SUFFIXES = (".jsonl", ".parquet", ".csv", ".tsv")
_SHARD = re.compile(r"\d+|of|[0-9a-f]{8,}")  # what follows the split in train-00000-of-00002-1359597a978bc4fa


@dataclass(frozen=True)
class Chosen:
    """What becomes of each split: trained on ("train"), held out ("val"), split by the hold-out rule (""), or None."""

    fate: dict[str, str | None]
    notice: str = ""


def choose(names: Sequence[str], split: str, validation: str | None, where: str) -> Chosen:
    """What becomes of the splits of a dataset.

    Args:
        names: of its splits.
        split: the one to train on; "" is "train", or all that do not say that they are for evaluation; ALL all of them.
        validation: the one to hold out; "" is the first of HELD_OUT, unless `split` is given; None none.
        where: names the dataset in errors.

    Raises:
        DataError: a split that is not there, or nothing to train on.
    """
    listed = ", ".join(map(repr, names))
    for asked in (split, validation):
        if asked and asked not in names and not (asked == split == ALL):
            raise DataError(f"{where}: no split {asked!r}; it has {listed}: name one with PATH,split=NAME")
    if split and split == validation:
        raise DataError(
            f"{where}: split {split!r} cannot be trained on and held out: name two with split=, validation="
        )
    evaluation = [name for name in HELD_OUT if name in names]
    if split:
        training = list(names) if split == ALL else [split]
        training = [name for name in training if name != validation]
    else:
        training = [name for name in names if name in TRAINING] or [n for n in names if n not in evaluation]
        training = [name for name in training if name != validation]
        if not training:
            raise DataError(
                f"{where}: has only {listed}, which is for evaluation: to train on one, name it, PATH,split=NAME"
            )
    held_out = validation or (evaluation[0] if evaluation and validation == "" and not split else None)
    fate: dict[str, str | None] = dict.fromkeys(names)
    fate |= dict.fromkeys(training, "train" if held_out else "")
    if held_out:
        fate[held_out] = "val"
    left_out = [name for name in names if fate[name] is None]
    if not held_out and not left_out:
        return Chosen(fate)
    notice = f"split {' and '.join(map(repr, training))} is trained on"
    notice += f", {held_out!r} is held out" if held_out else ""
    notice += f", left out: {', '.join(map(repr, left_out))}" if left_out else ""
    return Chosen(fate, notice)


def splits_of_files(names: Sequence[str]) -> dict[str, str]:
    """The split that each file of a tree belongs to, of those that belong to one.

    `names` are relative, with forward slashes. The name of a split, alone or last in the name of a file or the whole
    name of a folder, says so where the same folder has a training split as well, or where all files are datasets.
    """
    found = {name: split for name in names if (split := _split_of(name)) is not None}
    pure = all(plain_name(name).endswith(DATASET_SUFFIXES) for name in names)
    beside = {place for place, split in found.values() if split in TRAINING}
    with_test = {place for place, split in found.values() if split in HELD_OUT}
    return {
        name: split
        for name, (place, split) in found.items()
        if (place in beside and place in with_test) or (pure and with_test)
    }


def _split_of(name: str) -> tuple[str, str] | None:
    """(folder in which the split's name stands, split)."""
    path = PurePosixPath(plain_name(name))
    if path.suffix in (*DATASET_SUFFIXES, ".txt"):
        words = [word for word in re.split(r"[^A-Za-z0-9]+", path.stem) if word]
        while len(words) > 1 and _SHARD.fullmatch(words[-1]):
            words.pop()
        word = words[-1].lower().rstrip("0123456789") if words else ""
        if word in (*TRAINING, *HELD_OUT):
            return str(path.parent), word
    for folder in path.parents if path.suffix != ".py" else ():
        if folder.name.lower() in (*TRAINING, *HELD_OUT):
            return str(folder.parent), folder.name.lower()
    return None
