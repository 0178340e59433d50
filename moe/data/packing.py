"""Conversations packed into windows: the training stream of a fine-tune.

A conversation is never split over two windows; what is left of a window is padding, which predicts nothing. `documents`
numbers the conversations of a window, so that attention can be kept inside each. As in mixture.py, sample k is a pure
function of (seed, k), and a pass visits every window once, in an order drawn afresh for every pass.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe.data.conversations import ConversationData
from moe.data.mixture import IGNORE, Batch, permute_many, whole_epochs
from moe.errors import DataError


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Puts each item, in the given order, into the fullest bin that has room for it -> bins, int64 [len(sizes)].

    Largest first, that takes at most 11/9 of the fewest bins possible, and a fraction of one, as first-fit does
    (Johnson 1973); for packing training data see Ding et al. 2024, arXiv:2404.10830. Constant time per item: the bins
    lie in piles by the room they have, and the bits of a number say which piles are not empty.

    Args:
        sizes: whole numbers, 1 to `capacity`.
    """
    piles: list[list[int]] = [[] for _ in range(capacity + 1)]
    filled = n_bins = 0
    bins = np.empty(len(sizes), dtype=np.int64)
    for i, size in enumerate(sizes.tolist()):
        if not 1 <= size <= capacity:
            raise ValueError(f"sizes[{i}] = {size}: must be 1 to the capacity, {capacity}")
        fitting = filled >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            place = piles[room].pop()
            if not piles[room]:
                filled ^= 1 << room
        else:
            room, place = capacity, n_bins
            n_bins += 1
        bins[i] = place
        if room > size:
            piles[room - size].append(place)
            filled |= 1 << (room - size)
    return bins


class ConversationStream:
    """The endless stream of training windows over prepared conversations.

    Args:
        data: the opened conversations; all sources take part, their "train" split.
        seq_len: tokens of a window. A longer conversation is cut at its end, and left out where that leaves nothing to
            learn; `cut` and `left_out` count them, `notices` says so in words.
        seed: of the order. Equal seeds on equal data give equal streams.
        epochs: how many times one pass visits the conversations of a source, 1 where it is not named, 0 leaves it out.
        documents: whether to give each conversation its own document id; without, attention runs through the window.

    Raises:
        DataError: `seq_len` below 1, a source that the data lack, or nothing left to learn from.
    """

    def __init__(
        self,
        data: ConversationData,
        seq_len: int,
        seed: int,
        epochs: Mapping[str, int] | None = None,
        *,
        documents: bool = True,
    ) -> None:
        if seq_len < 1:
            raise DataError(f"seq_len is {seq_len}, expected 1 or more")
        self.data, self.seq_len, self.seed, self.documents = data, seq_len, seed, documents
        self.epochs = whole_epochs(data.sources, epochs or {})
        tables = [data.table(source, "train") for source in data.sources]
        source = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        offset = np.concatenate([table.offsets for table in tables])
        size = np.concatenate([table.n_tokens for table in tables]) - 1  # the last token is a target only
        long = np.flatnonzero(size > seq_len)
        size = np.minimum(size, seq_len)
        keep = np.ones(len(size), dtype=bool)
        for i in long.tolist():
            keep[i] = (self._values(int(source[i]), int(offset[i]), seq_len)[1:] & 1).any()
        self.cut, self.left_out = int(keep[long].sum()), int((~keep).sum())
        if not keep.any():
            raise DataError(
                f"seq_len is {seq_len}, too short for a response of any of the {len(size):,} conversations in "
                f"{data.path}: the shortest has {min(t.n_tokens.min() for t in tables if len(t)):,} tokens"
            )
        times = np.array([self.epochs[name] for name in data.sources])[source] * keep
        if not times.any():
            raise DataError(f"epochs = {dict(self.epochs)} leaves no conversation of {data.path} to train on")
        source, offset, size = (np.repeat(a, times) for a in (source, offset, size))
        largest_first = np.argsort(-size, kind="stable")
        self._source, self._offset, self._size = (a[largest_first] for a in (source, offset, size))
        bins = best_fit(self._size, seq_len)
        self._items = np.argsort(bins, kind="stable")  # the conversations of the first window, of the second, ...
        self._begin = np.searchsorted(bins[self._items], np.arange(bins.max() + 2))

    @property
    def windows_per_epoch(self) -> int:
        """Windows that hold every conversation as often as its source's epochs say."""
        return len(self._begin) - 1

    @property
    def conversations(self) -> int:
        """Conversations in one pass."""
        return len(self._size)

    @property
    def notices(self) -> list[str]:
        """What did not fit into the windows, in words."""
        total = self.conversations + self.left_out
        found = []
        if self.cut:
            found.append(f"{self.cut:,} of {total:,} conversations are longer than {self.seq_len:,} tokens and are cut")
        if self.left_out:
            found.append(
                f"{self.left_out:,} of {total:,} conversations are left out: their response begins only after "
                f"{self.seq_len:,} tokens"
            )
        return found + self.data.not_scored(self.seq_len)

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of all that decides the order: with k it is the whole state, for a resume to check."""
        state: list[object] = ["conversations", self.data.fingerprint, self.seq_len, self.seed, self.documents]
        state.append(sorted(self.epochs.items()))
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("data", "seq_len", "seed", "epochs", "documents")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # packed anew: a pickle has no place for every conversation

    def check_resume(self, fingerprint: str) -> None:
        """Raises DataError where a saved `fingerprint` is not this stream's."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"the saved run read another stream (fingerprint {fingerprint[:12]}, now {self.fingerprint[:12]}): "
                f"restore its conversations, seq_len ({self.seq_len} now) and seed ({self.seed} now), or start anew"
            )

    def batch(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1. Padding is a document of its own, the last of its window."""
        if start < 0:
            raise DataError(f"sample {start} is negative; samples count from 0")
        inputs = np.full((count, self.seq_len), self.data.end_id, dtype=np.int64)
        targets = np.full((count, self.seq_len), IGNORE, dtype=np.int64)
        documents = np.zeros((count, self.seq_len), dtype=np.int32)
        text = np.zeros((count, self.seq_len), dtype=bool)
        for row, window in enumerate(self._windows(np.arange(start, start + count))):
            place = 0
            items = self._items[self._begin[window] : self._begin[window + 1]]
            for number, i in enumerate(items.tolist()):
                size = int(self._size[i])
                end = place + size
                values = self._values(int(self._source[i]), int(self._offset[i]), size)
                inputs[row, place:end] = values[:-1] >> 1
                targets[row, place:end] = np.where(values[1:] & 1, values[1:] >> 1, IGNORE)
                documents[row, place:end] = number
                place = end
            documents[row, place:], text[row, :place] = len(items), True
        return Batch(inputs, targets, documents if self.documents else None, None if text.all() else text)

    def _windows(self, ks: np.ndarray) -> np.ndarray:
        """The window that each sample is, int64 [len(ks)]."""
        passes, ranks = np.divmod(ks, self.windows_per_epoch)
        windows = np.empty_like(ks)
        for one in np.unique(passes):
            chosen = passes == one
            windows[chosen] = permute_many(ranks[chosen], self.windows_per_epoch, self._key(int(one)))
        return windows

    def _key(self, one_pass: int) -> int:
        digest = hashlib.sha256(f"conversations {self.seed} {one_pass}".encode()).digest()
        return int.from_bytes(digest[:8], "little")

    def _values(self, source: int, offset: int, size: int) -> np.ndarray:
        """size + 1 stored values of a conversation, int64."""
        stream = self.data.values(self.data.sources[source], "train")
        return np.asarray(stream[offset : offset + size + 1], dtype=np.int64)
