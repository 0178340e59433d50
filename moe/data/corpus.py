"""The documents that are prepared, each on its side: trained on or held out.

A source that has splits keeps them. Of any other a fraction is held out: whole documents, chosen by the sha256 of their
names, where there are enough of them; of few documents the last part of each, from a line break on.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from moe.data.hub import HubDataset, resolve
from moe.data.shards import SPLITS
from moe.data.sources import (
    HELD_OUT_FRACTION,
    Document,
    Report,
    Source,
    check_libraries,
    default_sources,
    is_drawn,
    is_held_out,
    parse_source,
    read_pieces,
)
from moe.data.splits import ALL
from moe.errors import DataError

# What decides what is held out: a fraction, or text of its own.
Validation = float | str | Path | Source
# Of fewer documents than hold one by the fraction, and at most of so many, the last part of each is held out.
_MOST_CUT = 10_000


_MEANING = {"train": "for training", "val": "held out for validation"}


def nothing(split: str) -> DataError:
    """The error for a split that has no document."""
    return DataError(
        f"no document is {_MEANING[split]}: hold out another fraction, or name text to hold out (`validation=0.2`, "
        "`validation=PATH`), take a larger sample, or give more text"
    )


@dataclass
class Corpus:
    """Sources in the order of their names, and what is taken of them.

    Args:
        sources: two may have one name, of which one is `held_out`.
        fraction: of each source, held out by the rule; 0 where text to be held out is given.
        sample: fraction of the training documents to take.
        inside: by source, what lies in its tree but is held out.
        notices: what there is to say to the user.

    Reading fills in the others: what was left out; bytes of text by (source, split), of what is cut about; bytes of
    the documents of which the last part is held out, by source and name; the one document that is held out of a source
    in which the rule chose none.
    """

    sources: list[Source]
    fraction: float
    sample: float
    inside: dict[str, str]
    notices: list[str]
    report: Report = field(default_factory=Report)
    bytes_of: dict[tuple[str, str], int] = field(default_factory=dict)
    cut: dict[str, dict[str, int]] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the sources, each once."""
        return list(dict.fromkeys(source.name for source in self.sources))

    @property
    def surveyed(self) -> bool:
        """Whether all sizes are known before the documents are encoded; those of the Hub are not."""
        return not any(isinstance(source.path, HubDataset) for source in self.sources)

    def documents(self, source: Source, *, count: bool = False) -> Iterator[Document]:
        """The documents that are taken, in pieces, each with its split.

        `count`: count bytes, and what is left out, for a source that `survey` does not read.
        """
        count = count and isinstance(source.path, HubDataset)
        for piece in self._sides(source, self._pieces(source, self.report if count else None)):
            if count:
                self._count(source.name, piece.split, len(piece.text.encode()))
            yield piece

    def survey(self, digest: Any) -> None:
        """Reads every file once: sizes, what is left out, what is held out; all that decides the result into `digest`.

        A dataset of the Hub is known by its commit, what is taken of it, and no byte more.
        """
        check_libraries(self.sources)
        if self.fraction not in (0, HELD_OUT_FRACTION):
            digest.update(f"validation {self.fraction}\n".encode())
        for i, source in enumerate(self.sources):
            if isinstance(source.path, HubDataset):
                pinned = resolve(source.path)
                self.sources[i] = replace(source, path=pinned)  # every pass reads this commit, whatever comes meanwhile
                place = {"repo": ""} if pinned.is_local else {}  # the revision of a directory is its content
                state = [source.name, source.text_field, asdict(pinned) | place, self.sample]
                state += [source.validation] if source.validation else []
                digest.update(json.dumps(state + ["held out"] * source.held_out).encode())
                self.notices.append(f"source {source.name!r}: {pinned.repo} at revision {pinned.revision}")
            else:
                self._survey_files(source, digest)

    def check_splits(self) -> None:
        """Errors for an empty split; a notice for each source that has none of a split that others have."""
        for split in SPLITS:
            without = [name for name in self.names if (name, split) not in self.bytes_of]
            if len(without) == len(self.names):
                raise nothing(split)
            trained = {source.name for source in self.sources if not source.held_out}
            if self.fraction or split == "train":
                without = [name for name in without if name in trained]
                self.notices += [f"source {name!r}: no document is {_MEANING[split]}" for name in without]

    def _pieces(self, source: Source, report: Report | None = None) -> Iterator[Document]:
        held_out = self.inside.get(source.name) if not source.held_out else None
        for piece in read_pieces(source, report):
            if held_out is None or not (
                piece.name == held_out or piece.name.startswith((f"{held_out}/", f"{held_out}#"))
            ):
                yield piece

    def _split_of(self, piece: Document) -> str:
        if piece.split:
            return piece.split
        held_out = self.fraction > 0 and is_held_out(piece.name, self.fraction)
        return "val" if held_out or self.alone.get(piece.source) == piece.name else "train"

    def _is_taken(self, name: str, split: str) -> bool:
        return split == "val" or is_drawn(name, "sample", self.sample)

    def _count(self, source: str, split: str, size: int) -> None:
        self.bytes_of[source, split] = self.bytes_of.get((source, split), 0) + size

    def _survey_files(self, source: Source, digest: Any) -> None:
        few = min(1 / self.fraction if self.fraction else 0, _MOST_CUT)
        seen: list[tuple[Document, int, bytes]] = []  # the documents up to `few`
        lowest: tuple[bytes, str, int] | None = None
        splits: dict[str, int] = dict.fromkeys(SPLITS, 0)
        given, size, content = False, 0, hashlib.sha256()

        def take(document: Document, size: int, content: bytes, *, cut: bool = False) -> None:
            split = self._split_of(document)
            if cut or self._is_taken(document.name, split):
                name = f"{source.name}/{document.name}".encode("utf-8", "surrogateescape")
                given = document.split and f" {document.split}".encode()
                digest.update(hashlib.sha256(name).digest() + content + (given or b""))
                if not cut:
                    self._count(source.name, split, size)

        for piece in self._pieces(source, self.report):
            text = piece.text.encode()
            content.update(text)
            size += len(text)
            if not piece.ends:
                continue
            document = replace(piece, text="")
            given |= bool(piece.split)
            splits[self._split_of(piece)] += 1
            rank = hashlib.sha256(piece.name.encode("utf-8", "surrogateescape")).digest()
            lowest = min(lowest, (rank, piece.name, size)) if lowest else (rank, piece.name, size)
            if sum(splits.values()) < few:
                seen.append((document, size, content.digest()))
            else:
                for one in seen:
                    take(*one)
                seen = []
                take(document, size, content.digest())
            size, content = 0, hashlib.sha256()
        empty = self.fraction > 0 and not given and not all(splits.values())
        for one in seen:
            take(*one, cut=empty)
        if empty and seen:
            self._cut(source.name, {document.name: size for document, size, _ in seen})
            digest.update(f"cut {self.fraction} {self.sample}\n".encode())
        elif empty and lowest and not splits["val"]:
            self._hold_out(source.name, *lowest[1:])

    def _cut(self, source: str, sizes: dict[str, int]) -> None:
        """Holds out the last part of each document."""
        self.cut[source] = sizes
        for size in sizes.values():
            bounds = [0, *(bound if bound < inf else size for bound, _ in self._bounds(size))]
            for (begin, end), (_, split) in zip(pairwise(bounds), self._bounds(size), strict=True):
                if split and end > begin:
                    self._count(source, split, int(end - begin))
        of = "its document" if len(sizes) == 1 else f"each of its {len(sizes)} documents"
        self.notices.append(
            f"source {source!r}: the last {self.fraction:.3g} of {of} is held out, as there are too few to hold out "
            "whole ones"
        )

    def _hold_out(self, source: str, name: str, size: int) -> None:
        """Holds out one document, by its name, where the rule chose none of many."""
        self.alone[source] = name
        if self._is_taken(name, "train"):
            self.bytes_of[source, "train"] -= size
        self._count(source, "val", size)
        self.notices.append(f"source {source!r}: {name} alone is held out")

    def _bounds(self, size: int) -> list[tuple[float, str]]:
        """(byte at which a part ends, its split; "" drops it) of a document that is cut."""
        train = max(1, int(size * (1 - self.fraction)))
        taken = [(int(train * self.sample), "train"), (train, "")] if self.sample < 1 else [(train, "train")]
        return [*taken, (inf, "val")]

    def _sides(self, source: Source, pieces: Iterator[Document]) -> Iterator[Document]:
        """The pieces of the sample, with their splits; those of a document that is cut are cut where it is."""
        if source.name not in self.cut or source.held_out:
            for piece in pieces:
                split = self._split_of(piece)
                if self._is_taken(piece.name, split):
                    yield replace(piece, split=split)
            return
        part = offset = 0
        for piece in pieces:
            size = self.cut[source.name][piece.name]
            bounds = self._bounds(size)
            if piece.begin == 0:
                part = offset = 0
            text = piece.text
            while text:
                bound, split = bounds[part]
                n_bytes = len(text.encode())
                inner = offset + n_bytes <= bound
                here = len(text) if inner else _line_break(text, int(bound) - offset, int(size * self.fraction / 2))
                if split:
                    yield replace(piece, text=text[:here], split=split, ends=piece.ends if inner else True)
                offset += len(text[:here].encode())
                text = text[here:]
                part += not inner


def _line_break(text: str, at_byte: int, reach: int) -> int:
    """Where to cut a text: after the line break, or else before the space, nearest to a byte and within reach of it."""
    target = len(text.encode()[:at_byte].decode("utf-8", "ignore"))
    for mark, shift in (("\n", 1), (" ", 0)):
        found = {text.rfind(mark, 0, target) + shift, text.find(mark, target) + shift if mark in text[target:] else 0}
        near = [at for at in found if 0 < at < len(text) and abs(at - target) <= reach]
        if near:
            return min(near, key=lambda at: abs(at - target))
    return min(max(1, target), len(text))


def make_corpus(sources: Sequence[Source | str | Path] | None, validation: Validation | None, sample: float) -> Corpus:
    """The corpus of what `prepare` was given. Raises DataError for sources of one name, or a fraction out of range."""
    if sources is None:
        resolved, notices = default_sources()
    else:
        resolved, notices = [s if isinstance(s, Source) else parse_source(s) for s in sources], []
    resolved.sort(key=lambda source: source.name)
    if not resolved:
        raise DataError("sources is empty: give at least one path, or None for the default text and code")
    for one, other in pairwise(resolved):
        if one.name == other.name:
            raise DataError(f"two sources are called {one.name!r} ({one.path}, {other.path}): name them with name=path")
    if validation is None:
        return Corpus(resolved, HELD_OUT_FRACTION, sample, {}, notices)
    # It stands before the splits that sources come with, but not before those that were asked for.
    resolved = [replace(s, validation=None) if s.validation == "" else s for s in resolved]
    fraction = _fraction(validation)
    if fraction is not None:
        return Corpus(resolved, fraction, sample, {}, notices)
    held_out = validation if isinstance(validation, Source) else parse_source(str(validation))
    named = isinstance(validation, Source) or str(validation).startswith(f"{held_out.name}=")
    name = resolved[0].name if len(resolved) == 1 and not named else held_out.name
    inside = {}
    for source in resolved:
        if isinstance(source.path, Path) and isinstance(held_out.path, Path):
            tree, part = Path(os.path.realpath(source.path)), Path(os.path.realpath(held_out.path))
            if tree == part:
                raise DataError(
                    f"validation is {validation}, which is what source {source.name!r} trains on: name another"
                )
            if part.is_relative_to(tree):
                inside[source.name] = part.relative_to(tree).as_posix()
    resolved.append(replace(held_out, name=name, held_out=True, split=held_out.split or ALL))
    resolved.sort(key=lambda source: (source.name, source.held_out))
    return Corpus(resolved, 0.0, sample, inside, notices)


def _fraction(validation: Validation) -> float | None:
    """The fraction that `validation` is; None where it is a place."""
    if isinstance(validation, Path | Source) or (isinstance(validation, str) and os.path.exists(validation)):
        return None
    try:
        fraction = float(validation)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise DataError(f"validation is {validation}, expected a fraction above 0 and below 1, or text to hold out")
    return fraction
