"""Passkey retrieval (Mohtashami and Jaggi 2023): a random number hidden in real text and asked for at the end.

It measures which positions a model uses, not how well it writes: the number cannot be guessed, so an answer above
chance has been read where it stood. Shape suffixes: B examples, S positions, Q tokens of the key, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from moe.data import TokenStream
from moe.kernels.loss import IGNORE_INDEX
from moe.model import Transformer
from moe.tokenizer import Tokenizer

# What stands around the key. Where the question ends the key follows, as it did after the same words before.
INTRODUCTION, REMINDER, QUESTION = "\nThe pass key is ", ". Remember it.\n", "\nThe pass key is "


class PasskeyError(ValueError):
    """Examples that cannot be made; the message names the value and the remedy."""


@dataclass(frozen=True)
class Examples:
    """Passkey texts of one length.

    tokens_BS: int64 [B, S + 1]; the last Q tokens are the key, all before is given.
    distance_B: int64 [B], tokens between the key's first token where it is hidden and where it is asked for.
    depth_B: float64 [B], where in the filler the key is hidden: 0 at the beginning, 1 right before the question.
    """

    tokens_BS: np.ndarray
    distance_B: np.ndarray
    depth_B: np.ndarray
    key_tokens: int

    def batch(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of these examples, int64 [b, S] each; targets other than the key are ignored."""
        tokens_BS = torch.from_numpy(self.tokens_BS[rows])
        targets_BS = tokens_BS[:, 1:].clone()
        targets_BS[:, : -self.key_tokens] = IGNORE_INDEX
        return tokens_BS[:, :-1], targets_BS


class Passkey:
    """Makes examples from the text of a token stream.

    A key is `key_tokens` different digits, one token each.

    Args:
        tokenizer: the one that made the stream.
        filler: the text to hide keys in.
        key_tokens: digits of a key, 1 to 10.

    Raises:
        PasskeyError: `key_tokens` out of range, or a tokenizer without a token for each digit.
    """

    def __init__(self, tokenizer: Tokenizer, filler: TokenStream, key_tokens: int = 4) -> None:
        if not 1 <= key_tokens <= 10:
            raise PasskeyError(f"key_tokens = {key_tokens}: a key has 1 to 10 different digits")
        digits = [tokenizer.encode(str(d)) for d in range(10)]
        if any(len(ids) != 1 for ids in digits):
            raise PasskeyError(f"tokenizer {tokenizer.name}: a digit must be one token, for keys to have one length")
        self.filler, self.key_tokens = filler, key_tokens
        self._digits = np.array(digits, dtype=np.int64).flatten()
        self._introduction, self._reminder, self._question = (
            np.array(tokenizer.encode(text), dtype=np.int64) for text in (INTRODUCTION, REMINDER, QUESTION)
        )

    @property
    def chance(self) -> float:
        """The probability of guessing a key: 1 / (10 * 9 * ...), of `key_tokens` factors."""
        return 1 / math.perm(10, self.key_tokens)

    @property
    def overhead(self) -> int:
        """Tokens of an example that are not filler."""
        return len(self._introduction) + len(self._reminder) + len(self._question) + 2 * self.key_tokens

    def examples(
        self, rng: np.random.Generator, count: int, seq_len: int, depths: tuple[float, float] = (0.0, 1.0)
    ) -> Examples:
        """`count` examples of `seq_len` input positions (`seq_len` + 1 tokens), each with a key and filler of its own.

        Args:
            depths: the key's depth is drawn uniformly between these.

        Raises:
            PasskeyError: no room for filler, too little of it, or depths that are not within 0 to 1.
        """
        room = seq_len + 1 - self.overhead
        if room < 1:
            raise PasskeyError(f"seq_len = {seq_len}: an example needs at least {self.overhead} positions")
        if room > len(self.filler):
            raise PasskeyError(f"seq_len = {seq_len}: the filler has only {len(self.filler):,} tokens; give more text")
        if not 0 <= depths[0] <= depths[1] <= 1:
            raise PasskeyError(f"depths = {depths}: two fractions, 0 <= first <= second <= 1")
        depth_B = rng.uniform(*depths, size=count)
        before_B = np.rint(depth_B * room).astype(np.int64)
        starts_B = rng.integers(len(self.filler) - room + 1, size=count)
        tokens_BS = np.empty((count, seq_len + 1), dtype=np.int64)
        for row, before, start in zip(tokens_BS, before_B, starts_B, strict=True):
            key = rng.permutation(self._digits)[: self.key_tokens]
            text = np.asarray(self.filler[int(start) : int(start) + room], dtype=np.int64)
            hidden = [self._introduction, key, self._reminder]
            np.concatenate([text[:before], *hidden, text[before:], self._question, key], out=row)
        hidden_at_B = before_B + len(self._introduction)
        return Examples(tokens_BS, seq_len + 1 - self.key_tokens - hidden_at_B, depth_B, self.key_tokens)


@dataclass(frozen=True)
class Retrieval:
    """What a model answered.

    correct_B: bool [B], every token of the key is the likeliest one, which is when greedy decoding writes the key.
    logprob_B: float64 [B], the natural logarithm of the key's probability.
    """

    correct_B: np.ndarray
    logprob_B: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of keys retrieved."""
        return float(self.correct_B.mean())

    @property
    def logprob(self) -> float:
        """The mean log-probability of a key, in nats."""
        return float(self.logprob_B.mean())


@torch.no_grad()
def retrieve(model: Transformer, examples: Examples, *, batch: int = 16) -> Retrieval:
    """Asks the model for the keys, `batch` examples at a time."""
    device, Q = model.embedding.weight.device, examples.key_tokens
    correct, logprob = [], []
    for start in range(0, len(examples.tokens_BS), batch):
        inputs_BS, targets_BS = (t.to(device) for t in examples.batch(slice(start, start + batch)))
        logits_BSV = model(inputs_BS).logits_BSV
        assert logits_BSV is not None
        logp_BQV, key_BQ = logits_BSV[:, -Q:].double().log_softmax(-1), targets_BS[:, -Q:]
        correct.append((logp_BQV.argmax(-1) == key_BQ).all(1).cpu())
        logprob.append(logp_BQV.gather(2, key_BQ.unsqueeze(2)).sum((1, 2)).cpu())
    return Retrieval(torch.cat(correct).numpy(), torch.cat(logprob).numpy())
