"""Datasets of the Hugging Face Hub as a source: named in one argument, pinned to a revision, read as a stream.

`hf:HuggingFaceFW/fineweb-edu,config=sample-10BT,bytes=20GB` is a corpus of any size: rows come in the dataset's own
order, a few of them in memory at a time, until the limit; nothing is stored but the tokens. A branch is resolved to its
commit before reading, so that every pass sees the same rows. The place may also be the directory of a downloaded
dataset repository, for machines without a network.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.errors import DataError

EXTRA_HINT = 'pip install "gpt4-moe[data]"'

PREFIX = "hf:"
_SETTINGS = ("config", "split", "validation", "revision", "text", "documents", "bytes")
_USAGE = f"write {PREFIX}OWNER/NAME or {PREFIX}DIRECTORY, then any of {', '.join(f',{s}=...' for s in _SETTINGS)}"
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BATCH_ROWS = 256
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset, and how much of it.

    Args:
        repo: OWNER/NAME on the Hub, or the directory of a dataset repository.
        config: the dataset's configuration (subset); "" is its default one.
        split: one of its splits.
        revision: branch, tag or commit; "" is the main branch as it is now. Ignored for a directory.
        documents: the most rows that are read; 0 reads all.
        bytes: the most bytes of UTF-8 text, in whole documents; 0 reads all.
    """

    repo: str
    config: str = ""
    split: str = "train"
    revision: str = ""
    documents: int = 0
    bytes: int = 0

    @property
    def is_local(self) -> bool:
        """Whether `repo` is a directory; as for the datasets library, one that exists goes before the Hub."""
        return Path(self.repo).is_dir()

    def __str__(self) -> str:
        """As errors and notices name it."""
        parts = {"config": self.config, "split": self.split, "revision": "" if self.is_local else self.revision}
        return self.repo + "".join(f",{key}={value}" for key, value in parts.items() if value)


def parse_hub(argument: str, text_field: str = "text") -> tuple[HubDataset, dict[str, Any]]:
    """The dataset that `hf:PLACE,key=value,...` names, and of its `Source` the text_field and a split to be held out.

    Keys are those of `HubDataset` besides `repo`, and `text` and `validation`; `documents` and `bytes` take units of
    1000: 500k, 20GB.

    Raises:
        DataError: an unknown key, a value that cannot be, or a place that is neither OWNER/NAME nor a directory.
    """
    place, *parts = argument.removeprefix(PREFIX).split(",")
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in _SETTINGS or not equals or not value or key in settings:
            raise DataError(f"source {argument!r}: {part!r} is not understood: {_USAGE}")
        settings[key] = _amount(argument, key, value) if key in ("documents", "bytes") else value
    if not (place and Path(place).is_dir()) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place, re.ASCII):
        raise DataError(f"source {argument!r}: {place!r} is neither a directory nor a name on the Hub: {_USAGE}")
    of_source: dict[str, Any] = {
        "text_field": settings.pop("text", text_field),
        "validation": settings.pop("validation", ""),
    }
    if of_source["validation"] == settings.get("split", "train"):
        raise DataError(f"source {argument!r}: one split cannot be trained on and held out: name two")
    return HubDataset(place, **settings), of_source


def _amount(argument: str, key: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)(B?)", text, re.ASCII)
    if match and not (match[3] and key == "documents"):
        value = float(match[1]) * _UNITS[match[2]]
        if value == int(value) > 0:
            return int(value)
    raise DataError(f"source {argument!r}: {key}={text}: must be a whole number above 0, such as 500k or 20G")


def resolve(dataset: HubDataset) -> HubDataset:
    """The dataset with its revision as what cannot change: the commit, or the sha256 of all files of a directory.

    A full commit is taken as it is, without a look at the network.

    Raises:
        DataError: no such dataset or revision, or the Hub cannot be reached.
        ImportError: the datasets library is missing.
    """
    library(str(dataset))
    if dataset.is_local:
        return replace(dataset, revision=_content(Path(dataset.repo)))
    if _COMMIT.fullmatch(dataset.revision):
        return dataset
    import huggingface_hub  # comes with datasets

    try:
        found = huggingface_hub.HfApi().dataset_info(dataset.repo, revision=dataset.revision or None)
    except Exception as error:
        raise _explained(dataset, error) from None
    if found.sha is None:
        raise DataError(f"{dataset}: the Hub names no commit of it: give a full one as ,revision=...")
    return replace(dataset, revision=found.sha)


def rows(dataset: HubDataset, text_field: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row from 0, its place in words, {text_field: value}) in the dataset's order; limits are not looked at.

    Raises:
        DataError: no such dataset, configuration, split or column; the Hub cannot be reached; reading broke off.
        ImportError: the datasets library is missing.
    """
    datasets = library(str(dataset))
    revision = None if dataset.is_local else dataset.revision or None
    row = 0
    try:
        stream = datasets.load_dataset(
            dataset.repo, name=dataset.config or None, split=dataset.split, revision=revision, streaming=True
        )
        if stream.column_names is not None:  # those of JSON show in the data alone
            _check_column(dataset, text_field, stream.column_names)
            stream = stream.select_columns([text_field])
        for batch in stream.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            _check_column(dataset, text_field, batch.column_names)
            for value in batch[text_field].to_pylist():
                yield row, f"{dataset}, row {row:,}", {text_field: value}
                row += 1
    except DataError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, the network, arrow
        raise _explained(dataset, error, row) from None


def _check_column(dataset: HubDataset, text_field: str, columns: list[str]) -> None:
    if text_field not in columns:
        raise DataError(f"{dataset}: no column {text_field!r}; the columns are {columns}: name one with ,text=...")


def library(what: str) -> Any:
    """The datasets library. Raises ImportError where it, which reads `what`, is missing."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"reading the dataset {what} needs the datasets library: {EXTRA_HINT}") from None
    return datasets


def _content(directory: Path) -> str:
    """The sha256 over names and contents of a directory's files; hidden ones, as those of git, do not count."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(hashlib.sha256(name.as_posix().encode("utf-8", "surrogateescape")).digest() + content)
    return digest.hexdigest()


def _explained(dataset: HubDataset, error: Exception, row: int = 0) -> DataError:
    """What went wrong in the words of the library, and what to do about it."""
    from huggingface_hub import errors

    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= 300 else said[:300] + " ..."
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(f"{dataset}: no such revision ({said}): give a branch, a tag or a commit as ,revision=...")
    if isinstance(error, errors.RepositoryNotFoundError) or "DatasetNotFoundError" in kinds:
        return DataError(
            f"{dataset}: no such dataset, or not open to you ({said}): check OWNER/NAME; for one that is private or "
            "gated, ask for access on its page and run `hf auth login`"
        )
    # Of requests, httpx and the standard library; and what the Hub answers when it is overloaded.
    network = isinstance(error, OSError | errors.HfHubHTTPError) or "HTTPError" in kinds or "TransportError" in kinds
    if network and row:
        return DataError(f"{dataset}: reading broke off after {row:,} rows ({said}): run the same command again")
    if network:
        return DataError(
            f"{dataset}: cannot be reached ({said}): check the network; where there is none, give the directory of "
            f"a copy: hf download {dataset.repo} --repo-type dataset --local-dir DIR elsewhere, then {PREFIX}DIR"
        )
    after = f" after {row:,} rows" if row else ""
    return DataError(f"{dataset}: cannot be read{after} ({said}): check ,config= and ,split= and the dataset's page")
