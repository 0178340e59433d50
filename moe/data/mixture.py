"""The order of training: sample k is a pure function of (seed, k).

A window is seq_len consecutive targets of a source's training stream, starting at a multiple of seq_len, with the token
before each as its input; the last window of a source is filled up with nothing to predict. So one pass of the mixture
predicts every token of a source exactly as often as its epochs say, in an order drawn afresh for every pass. The order
is a permutation computed lazily, index by index (a Feistel network), so nothing of the data's size is ever in memory,
and the whole state of the order is the integer k. Ranks that share k's out among themselves see one stream.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from typing import NamedTuple, Protocol

import numpy as np

from moe.data.shards import TokenData, TokenStream
from moe.errors import DataError

IGNORE = -100  # a target that is none
_ORDER = 2  # of the rule that makes windows; the fingerprint holds it
_ROUNDS = 8
MAX_EPOCHS = 1_000_000  # of a source in one pass, whose windows then stay far below 2^62
_MASK = 2**64 - 1


def permute(i: int, n: int, key: int) -> int:
    """Where index i in [0, n) goes under the permutation of [0, n) that `key` (64 bits) selects.

    A Feistel network on pairs (left, right) of numbers below a = ceil(sqrt(n)), each round being
    (left, right) -> (right, left + f(right) mod a); an image of n or more is sent through again ("cycle walking",
    Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Less than 2 a of the a^2 pairs lie there.

    Raises:
        DataError: i outside [0, n), or n over 2^62.
    """
    _check_range(i, i, n)
    a = isqrt(n - 1) + 1
    while True:
        left, right = divmod(i, a)
        for r in range(_ROUNDS):
            left, right = right, (left + _mix(right ^ _mix(key + r)) % a) % a
        i = left * a + right
        if i < n:
            return i


def permute_many(indices: np.ndarray, n: int, key: int) -> np.ndarray:
    """`permute` of every index: int64 array in, int64 array of the same shape out."""
    if indices.size == 0:
        return indices.astype(np.int64)
    _check_range(int(indices.min()), int(indices.max()), n)
    a = np.uint64(isqrt(n - 1) + 1)
    keys = [np.uint64(_mix(key + r)) for r in range(_ROUNDS)]
    images = indices.astype(np.uint64).reshape(-1)
    todo = np.arange(images.size)
    while todo.size:
        left, right = np.divmod(images[todo], a)
        for round_key in keys:
            left, right = right, (left + _mix_many(right ^ round_key) % a) % a
        images[todo] = left * a + right
        todo = todo[images[todo] >= n]
    return images.astype(np.int64).reshape(indices.shape)


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_many(x: np.ndarray) -> np.ndarray:
    """`_mix` of uint64 arrays; array arithmetic wraps modulo 2^64 by itself."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _check_range(low: int, high: int, n: int) -> None:
    if not 0 <= low <= high < n <= 2**62:
        raise DataError(f"index {low if low < 0 else high} is not in [0, {n}), or {n} is over 2^62")


class Batch(NamedTuple):
    """Windows to train on; arrays are [count, seq_len]."""

    inputs: np.ndarray  # int64
    targets: np.ndarray  # int64, -100 where there is nothing to predict
    documents: np.ndarray | None = None  # int32, equal where positions may attend to each other
    text: np.ndarray | None = None  # bool, False at padding; None where all is text


class Stream(Protocol):
    """What the training loop reads from: an endless order of windows, of which a run's state is one integer."""

    seq_len: int

    @property
    def windows_per_epoch(self) -> int:
        """Windows in one pass."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the order."""
        ...

    def check_resume(self, fingerprint: str) -> None:
        """Raises DataError where a saved `fingerprint` is not this stream's."""

    def batch(self, start: int, count: int) -> Batch:
        """Windows start .. start + count - 1."""
        ...


class Mixture:
    """The endless stream of training windows over the sources of prepared data.

    Args:
        data: the opened data.
        seq_len: tokens of input per window; a window holds one more, for the last target.
        seed: of the order. Equal seeds on equal data give equal streams.
        epochs: how many times one pass visits the windows of a source: whole numbers, 1 where it is not named, 0 leaves
            it out. {"text": 2, "code": 4} weighs code's windows twice as much as text's.
        documents: whether batches say which document each position is in.

    Raises:
        DataError: a source unknown or not a whole number of times; no training token in those that take part.
    """

    def __init__(
        self,
        data: TokenData,
        seq_len: int,
        seed: int,
        epochs: Mapping[str, int | float] | None = None,
        *,
        documents: bool = False,
    ) -> None:
        if seq_len < 1:
            raise DataError(f"seq_len is {seq_len}, expected 1 or more")
        self.data, self.seq_len, self.seed, self.documents = data, seq_len, seed, documents
        self.epochs = whole_epochs(data.sources, epochs or {})
        self.windows = {name: -(-len(data.tokens(name, "train")) // seq_len) for name in data.sources}
        self._names = [name for name in data.sources if self.epochs[name] * self.windows[name]]
        if not self._names:
            sizes = ", ".join(f"{name} {len(data.tokens(name, 'train')):,}" for name in data.sources)
            raise DataError(f"no source that takes part has a training token (tokens: {sizes}): give it more text")
        self._ends = np.cumsum([self.epochs[name] * self.windows[name] for name in self._names])

    def __repr__(self) -> str:
        return f"Mixture({self.data!r}, seq_len={self.seq_len}, seed={self.seed}, epochs={self.epochs})"

    @property
    def windows_per_epoch(self) -> int:
        """Windows in one pass of the mixture: the sum over sources of epochs x windows."""
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of all that decides the order: with k it is the whole state, for a resume to check."""
        state = [self.data.fingerprint, self.seq_len, self.seed, sorted(self.epochs.items()), self.documents, _ORDER]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def check_resume(self, fingerprint: str) -> None:
        """Raises DataError where a saved `fingerprint` is not this mixture's."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"the saved run read another stream (fingerprint {fingerprint[:12]}, now {self.fingerprint[:12]}): "
                "data, seq_len, seed, epochs or document_mask changed; restore them, or start a new run"
            )

    def batch(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1."""
        S = self.seq_len
        inputs = np.full((count, S), self.data.eot_id, dtype=np.int64)
        targets = np.full((count, S), IGNORE, dtype=np.int64)
        text = np.zeros((count, S), dtype=bool)
        for row, (where, window) in enumerate(zip(*self._locate(np.arange(start, start + count)), strict=True)):
            stream, begin = self.data.tokens(self._names[where], "train"), int(window) * S
            tokens = stream[max(0, begin - 1) : begin + S]
            # Before the first token of a stream stands an end-of-text, as before that of any document.
            first = int(begin == 0)
            n = len(tokens) - 1 + first
            targets[row, :n] = tokens[1 - first :]
            inputs[row, first:n] = tokens[: n - first]
            text[row, :n] = True
        documents = document_ids(inputs, self.data.eot_id) if self.documents else None
        return Batch(inputs, targets, documents, None if text.all() else text)

    def _locate(self, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into _names, window) of samples ks, each int64 [len(ks)]."""
        if len(ks) and ks.min() < 0:
            raise DataError(f"sample {ks.min()} is negative; samples count from 0")
        passes, ranks = np.divmod(ks, self.windows_per_epoch)
        images = np.empty_like(ks)
        for one in np.unique(passes):
            chosen = passes == one
            images[chosen] = permute_many(ranks[chosen], self.windows_per_epoch, self._key(int(one)))
        where = np.searchsorted(self._ends, images, side="right")
        counts = np.array([self.windows[name] for name in self._names])
        starts = np.concatenate([[0], self._ends[:-1]])
        return where, (images - starts[where]) % counts[where]

    def _key(self, one_pass: int) -> int:
        digest = hashlib.sha256(f"mixture {self.seed} {one_pass}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def document_ids(inputs: np.ndarray, eot_id: int) -> np.ndarray:
    """Which document each position of the windows [N, S] is in, int32: an end-of-text begins the next one."""
    return (inputs == eot_id).cumsum(1).astype(np.int32)


def whole_epochs(sources: Sequence[str], epochs: Mapping[str, int | float]) -> dict[str, int]:
    """The number of epochs of every source. Raises DataError for a source unknown or not a whole number of times."""
    for name, times in epochs.items():
        if name not in sources:
            raise DataError(f"epochs names source {name!r}; the data has {', '.join(sources)}")
        if not 0 <= times <= MAX_EPOCHS or not float(times).is_integer():
            raise DataError(
                f"epochs[{name!r}] is {times}, expected a whole number of times, from 0 to {MAX_EPOCHS:,}: multiply "
                "all of them until they are whole"
            )
    return {name: int(epochs.get(name, 1)) for name in sources}


def validation_windows(
    data: TokenData, source: str, seq_len: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The held-out stream of a source as windows in which every token is scored exactly once.

    One end-of-text stands before the stream, so that its first token is predicted too. The first window scores all its
    targets, each later one its last `stride` (the final one: what is left), with seq_len - stride or more of context.

    Yields:
        (inputs int64 [S], targets int64 [S], scored bool [S]) with S = seq_len; a stream shorter than seq_len is one
        window of its own length.

    Raises:
        DataError: seq_len or stride out of range, or no held-out token in the source.
    """
    stream = data.tokens(source, "val")
    if not 1 <= stride <= seq_len:
        raise DataError(f"stride is {stride}, expected 1 to seq_len ({seq_len})")
    if len(stream) == 0:
        raise DataError(f"source {source!r} has no held-out tokens in {data.path}: give it more documents")
    return _validation_windows(stream, data.eot_id, min(seq_len, len(stream)), stride)


def _validation_windows(
    stream: TokenStream, eot_id: int, length: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    scored_to, end = 0, length
    while True:
        begin = end - length
        targets = np.asarray(stream[begin:end], dtype=np.int64)
        before = stream[begin - 1] if begin else eot_id
        inputs = np.concatenate([np.array([before], dtype=np.int64), targets[:-1]])
        yield inputs, targets, np.arange(begin, end) >= scored_to
        if end == len(stream):
            return
        scored_to, end = end, min(end + stride, len(stream))


def spaced_windows(
    streams: Mapping[str, TokenStream | np.ndarray], first: Mapping[str, int], seq_len: int, n_tokens: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """About `n_tokens` tokens: separate windows, evenly spaced, as many of a source as its share of all.

    Every source has at least one. The windows are the same each time.

    Args:
        streams: of at least one token each.
        first: the id that stands before each stream.

    Yields:
        (source, inputs int64 [S], targets int64 [S]), S = seq_len or, if that is shorter, the stream.
    """
    total = sum(len(stream) for stream in streams.values())
    for source, stream in streams.items():
        size = len(stream)
        length = min(seq_len, size)
        count = min(max(1, round(n_tokens * size / total / length)), size // length)
        for i in range(count):
            begin = i * (size - length) // max(1, count - 1)
            targets = np.asarray(stream[begin : begin + length], dtype=np.int64)
            before = stream[begin - 1] if begin else first[source]
            yield source, np.concatenate([[before], targets[:-1]]), targets
