"""How good the model is: bits per byte on held-out text, and samples to read.

Bits per byte divides the bits of all scored tokens, end-of-text included, by the bytes of the text they stand for, so
that tokenizers, and general compressors, can be compared. Shape suffixes: B windows, S sequence.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch

from moe.data import DataError, TokenData, TokenStream, validation_windows
from moe.kernels.reference import IGNORE_INDEX
from moe.model import Transformer, stream
from moe.tokenizer import Tokenizer

# (source, inputs int64 [S], targets int64 [S], scored bool [S])
Window = tuple[str, np.ndarray, np.ndarray, np.ndarray]

# One in the form of the plays, one in that of the code, and the beginning of any document.
PROMPTS = ("**ROMEO**  \n", "def read(path):\n", "")


class HeldOut(Protocol):
    """Text to score: what is needed of `TokenData`."""

    sources: tuple[str, ...]
    eot_id: int

    def tokens(self, source: str, split: str) -> TokenStream | np.ndarray: ...


class Texts:
    """Raw texts as held-out data, each a source of its own; a text ends with end-of-text, as documents do.

    Args:
        tokenizer: the model's.
        texts: by name.

    Raises:
        DataError: an empty text.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            if not text:
                raise DataError(f"{name} is empty: there is nothing to score; leave it out")
        self.sources = tuple(texts)
        self.eot_id = tokenizer.eot_id
        self.path = Path()
        self._ids = {name: np.array([*tokenizer.encode(text), self.eot_id]) for name, text in texts.items()}

    def tokens(self, source: str, split: str) -> np.ndarray:
        """The ids of one text, int64; all of it is held out."""
        return self._ids[source] if split == "val" else self._ids[source][:0]


@dataclass(frozen=True)
class Score:
    """What held-out tokens cost under the model."""

    bits: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits divided by bytes."""
        return self.bits / self.bytes

    @property
    def perplexity(self) -> float:
        """Of a token: 2 to the bits per token."""
        return 2 ** (self.bits / self.tokens)

    def __add__(self, other: "Score") -> "Score":
        return Score(self.bits + other.bits, self.tokens + other.tokens, self.bytes + other.bytes)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of text that each id stands for, int64 [V]; end-of-text stands for none."""
    lengths = [0 if i == tokenizer.eot_id else _length(tokenizer, i) for i in range(tokenizer.vocab_size)]
    return np.array(lengths, dtype=np.int64)


def _length(tokenizer: Tokenizer, token_id: int) -> int:
    try:
        return len(tokenizer.token_bytes(token_id))
    except ValueError:  # an id that the vocabulary leaves unused never occurs
        return 0


def all_windows(data: HeldOut, seq_len: int) -> Iterator[Window]:
    """Every held-out token once, with at least half a window of context from the second window on."""
    for source in _held_out(data):
        stride = max(1, seq_len // 2)
        for inputs, targets, scored in validation_windows(cast(TokenData, data), source, seq_len, stride):
            yield source, inputs, targets, scored


def some_windows(data: TokenData, seq_len: int, n_tokens: int) -> Iterator[Window]:
    """About `n_tokens` held-out tokens: separate windows, evenly spaced, as many of a source as its share of the text.

    Every source has at least one. The windows are the same each time.
    """
    sizes = {source: len(data.tokens(source, "val")) for source in _held_out(data)}
    for source, size in sizes.items():
        stream_, length = data.tokens(source, "val"), min(seq_len, size)
        wanted = round(n_tokens * size / sum(sizes.values()) / length)
        count = min(max(1, wanted), size // length)
        for i in range(count):
            begin = i * (size - length) // max(1, count - 1)
            targets = np.asarray(stream_[begin : begin + length], dtype=np.int64)
            before = stream_[begin - 1] if begin else data.eot_id
            yield source, np.concatenate([[before], targets[:-1]]), targets, np.ones(length, dtype=bool)


def _held_out(data: HeldOut) -> list[str]:
    return [source for source in data.sources if len(data.tokens(source, "val"))]


def count_scored(data: HeldOut) -> int:
    """Tokens that `all_windows` scores."""
    return sum(len(data.tokens(source, "val")) for source in data.sources)


@torch.no_grad()
def evaluate(
    model: Transformer,
    windows: Iterable[Window],
    lengths: np.ndarray,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda scored: None,
) -> dict[str, Score]:
    """The score of each source, in order.

    Args:
        windows: of one source after the other.
        lengths: `byte_lengths` of the tokenizer.
        batch: windows at a time.
        dtype: of the matrix products (autocast).
        progress: called with the number of tokens scored so far.
    """
    device = model.embedding.weight.device
    scores: dict[str, Score] = {}
    done = 0
    for (source, _), group in groupby(windows, key=lambda w: (w[0], len(w[1]))):
        while chunk := list(islice(group, batch)):
            inputs_BS, targets_BS, scored_BS = (np.stack(part) for part in list(zip(*chunk, strict=True))[1:])
            masked_BS = torch.from_numpy(np.where(scored_BS, targets_BS, IGNORE_INDEX)).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                mean = model(torch.from_numpy(inputs_BS).to(device), masked_BS).losses["lm"]
            tokens = int(scored_BS.sum())
            part = Score(mean.item() * tokens / math.log(2), tokens, int(lengths[targets_BS[scored_BS]].sum()))
            scores[source] = scores[source] + part if source in scores else part
            done += tokens
            progress(done)
    return scores


def total(scores: dict[str, Score]) -> Score:
    """All sources together."""
    return sum(scores.values(), Score(0.0, 0, 0))


def draw_samples(model: Transformer, tokenizer: Tokenizer, *, n_tokens: int = 160) -> list[dict[str, str]]:
    """What the model writes after each of `PROMPTS`, as {"prompt", "text"}; the same each time.

    The sample ends with the document.
    """
    device = model.embedding.weight.device
    samples = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
        new: list[int] = []
        for next_1 in stream(model, torch.tensor([ids], device=device), n_tokens, temperature=0.8, top_p=0.95):
            if int(next_1) == tokenizer.eot_id:
                break
            new.append(int(next_1))
        # A model may have more ids than its tokenizer; nothing ever trained them, but the first steps may draw one.
        text = tokenizer.decode([i for i in new if i < tokenizer.vocab_size])
        samples.append({"prompt": prompt, "text": text})
    return samples
