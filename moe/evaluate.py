"""Held-out text as windows, a model run on windows as its training ran it, bits per byte, and samples to read.

Bits per byte divides the bits of all scored tokens, end-of-text included, by the bytes of the text they stand for, so
that tokenizers, and general compressors, can be compared. Shape suffixes: B windows, S sequence.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from moe.config import TrainConfig
from moe.data import (
    Batch,
    ChatTemplate,
    ConversationData,
    TokenData,
    TokenStream,
    document_ids,
    spaced_windows,
    validation_windows,
)
from moe.errors import DataError
from moe.kernels.loss import IGNORE_INDEX
from moe.model import Transformer
from moe.serve.blocks import blocks_for
from moe.serve.engine import Engine
from moe.serve.request import SamplingParams
from moe.tokenizer import Tokenizer


class Window(NamedTuple):
    """Tokens to run a model on; arrays are [S]."""

    source: str
    inputs: np.ndarray  # int64
    targets: np.ndarray  # int64
    scored: np.ndarray  # bool: the targets that count
    documents: np.ndarray | None = None  # int32: which document each position is in; None for one
    text: np.ndarray | None = None  # bool, False at padding; None where all is text


# One in the form of the plays, one in that of the code, and the beginning of any document.
PROMPTS = ("**ROMEO**  \n", "def read(path):\n", "")
# Small talk, and a function that no library has word for word.
REQUESTS = (
    "What is AI?",
    "Write the Python function read_lines.\n\nRead a text file and return its lines as a list, without line endings.",
)


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
    """The bytes of text that each id stands for, int64 [V]; special tokens stand for none."""
    special = set(tokenizer.special.values())
    lengths = [0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    return np.array(lengths, dtype=np.int64)


def all_windows(data: HeldOut | ConversationData, seq_len: int) -> Iterator[Window]:
    """Every held-out token once, with at least half a window of context from the second window on.

    Of conversations: every held-out response.
    """
    if isinstance(data, ConversationData):
        yield from _of_conversations(data, seq_len)
        return
    for source in _held_out(data):
        stride = max(1, seq_len // 2)
        for inputs, targets, scored in validation_windows(cast(TokenData, data), source, seq_len, stride):
            yield Window(source, inputs, targets, scored, _documents(inputs, data))


def some_windows(data: HeldOut | ConversationData, seq_len: int, n_tokens: int) -> Iterator[Window]:
    """About `n_tokens` held-out tokens: separate windows, evenly spaced, as many of a source as its share of the text.

    Every source has at least one. The windows are the same each time. Conversations have a window each.
    """
    if isinstance(data, ConversationData):
        yield from _of_conversations(data, seq_len, n_tokens)
        return
    streams = {source: data.tokens(source, "val") for source in _held_out(data)}
    for source, inputs, targets in spaced_windows(streams, dict.fromkeys(streams, data.eot_id), seq_len, n_tokens):
        yield Window(source, inputs, targets, np.ones(len(targets), dtype=bool), _documents(inputs, data))


def _held_out(data: HeldOut) -> list[str]:
    return [source for source in data.sources if len(data.tokens(source, "val"))]


def _documents(inputs_S: np.ndarray, data: HeldOut) -> np.ndarray:
    return document_ids(inputs_S[None], data.eot_id)[0]


def _of_conversations(data: ConversationData, seq_len: int, n_tokens: int | None = None) -> Iterator[Window]:
    for source, inputs, targets, scored, text in data.held_out_windows(seq_len, n_tokens):
        yield Window(source, inputs, targets, scored, text=text)


def count_scored(data: HeldOut | ConversationData) -> int:
    """Tokens that `all_windows` scores (of conversations a few less, where some are longer than a window)."""
    if isinstance(data, ConversationData):
        return sum(data.n_tokens(source, "val") for source in data.sources)
    return sum(len(data.tokens(source, "val")) for source in data.sources)


def batches(windows: Iterable[Window], size: int) -> Iterator[tuple[str, Batch]]:
    """Up to `size` windows at a time, of one source and length, in order; targets that are not scored are -100."""
    whole = (Window(*window) for window in windows)
    for (source, _), group in groupby(whole, key=lambda w: (w.source, len(w.inputs))):
        while chunk := list(islice(group, size)):
            inputs, targets, scored = (np.stack(part) for part in list(zip(*chunk, strict=True))[1:4])
            text = [np.ones(len(w.inputs), dtype=bool) if w.text is None else w.text for w in chunk]
            documents = [np.zeros(len(w.inputs), dtype=np.int32) if w.documents is None else w.documents for w in chunk]
            yield source, Batch(inputs, np.where(scored, targets, IGNORE_INDEX), np.stack(documents), np.stack(text))


def model_inputs(train: TrainConfig, batch: Batch, device: torch.device) -> dict[str, Any]:
    """What a model is called with for a batch, whoever calls it: documents as its training had them, padding masked.

    Args:
        train: the settings that the model was, or is, trained with (`model.cfg.train`).

    Returns:
        tokens_BS and targets_BS on the device; documents_BS and mask_BS, which are read, on the CPU, or None where
        nothing depends on them.
    """
    documents, text = batch.documents, batch.text
    if not train.document_mask or documents is None or (documents == documents[:, :1]).all():
        documents = None
    if text is not None and text.all():
        text = None
    return {
        "tokens_BS": _to(device, batch.inputs),
        "targets_BS": _to(device, batch.targets),
        "documents_BS": None if documents is None else torch.from_numpy(documents),
        "mask_BS": None if text is None else torch.from_numpy(text),
    }


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def products(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Within it matrix products are taken in `dtype`, the weights being float32: what training and scoring run in."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


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
    """The score of each source, in order; attention is kept inside documents where the model was trained so.

    A source of which no byte of text was scored is left out: nothing can be said of it.

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
    for source, part in batches(windows, batch):
        with products(dtype, device):
            mean = model(**model_inputs(model.cfg.train, part, device)).losses["lm"]
        targets = part.targets[part.targets != IGNORE_INDEX]
        score = Score(mean.item() * len(targets) / math.log(2), len(targets), int(lengths[targets].sum()))
        scores[source] = scores[source] + score if source in scores else score
        done += len(targets)
        progress(done)
    return {source: score for source, score in scores.items() if score.bytes}


def total(scores: dict[str, Score]) -> Score:
    """All sources together."""
    return sum(scores.values(), Score(0.0, 0, 0))


def draw_samples(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    n_tokens: int = 160,
    chat: bool = False,
    prompts: Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """What the model writes after each of `prompts`, as {"prompt", "text"}; the same each time.

    The sample ends with the document. With `chat` it answers, and ends with its turn. None are `PROMPTS`, or `REQUESTS`
    with `chat`.
    """
    template = ChatTemplate(tokenizer)
    if prompts is None:
        prompts = REQUESTS if chat else PROMPTS
    end_id = template.end_id if chat else tokenizer.eot_id
    texts = [template.prompt([{"role": "user", "content": p}]) if chat else tokenizer.encode(p) for p in prompts]
    limit = model.cfg.max_seq_len
    params = SamplingParams(max_tokens=n_tokens, temperature=0.8, top_p=0.95, seed=0, stop_token_ids=[end_id])
    blocks = len(texts) * blocks_for(max([1, *(min(len(t) + n_tokens, limit) for t in texts)]))
    engine = Engine(model, num_blocks=blocks)
    answers = engine.generate([t[:limit] or [tokenizer.eot_id] for t in texts], params)
    samples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # A model may have more ids than its tokenizer; nothing ever trained them, but the first steps may draw one.
        text = tokenizer.decode([i for i in answer.token_ids if i < tokenizer.vocab_size and i != end_id])
        samples.append({"prompt": f"{prompt}\n\n" if chat else prompt, "text": text})
    return samples
