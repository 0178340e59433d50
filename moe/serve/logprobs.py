"""Log-probabilities of tokens, as vLLM and OpenAI's API give them: of the model, before any sampling setting.

Shape suffixes: N positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.layers import at_least_fp32
from moe.tokenizer import Tokenizer

_ELEMENTS = 2**24  # of logits at a time: a prompt's would fill the memory


class Logprob(NamedTuple):
    """What the model thinks of one token at one place.

    logprob: the natural logarithm of its probability. rank: 1 for the most likely. decoded_token: its text.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # by id: the token that stands there, then the most likely ones


def logprobs_of(
    logits_NV: Tensor, tokens: Sequence[int], tops: Sequence[int], tokenizer: Tokenizer | None = None
) -> list[Logprobs]:
    """For each position the token that stands there, and so many of the most likely.

    Args:
        tops: how many. tokenizer: for their texts.
    """
    rows = max(1, _ELEMENTS // logits_NV.shape[1])
    found: list[Logprobs] = []
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        found += _part(logits_NV[part], tokens[part], tops[part], tokenizer)
    return found


def _part(logits_NV: Tensor, tokens: Sequence[int], tops: Sequence[int], tokenizer: Tokenizer | None) -> list[Logprobs]:
    log_NV = logits_NV.log_softmax(-1, dtype=at_least_fp32(logits_NV.dtype))
    own_N1 = log_NV.gather(1, torch.tensor(tokens, device=log_NV.device).unsqueeze(1))
    ranks = ((log_NV > own_N1).sum(-1) + 1).tolist()
    likely_NK, ids_NK = log_NV.topk(max(tops))
    found = []
    for token, own, rank, top, ids, likely in zip(
        tokens, own_N1.squeeze(1).tolist(), ranks, tops, ids_NK.tolist(), likely_NK.tolist(), strict=True
    ):
        one = {token: Logprob(own, rank, _text(tokenizer, token))}
        for place, (i, value) in enumerate(zip(ids[:top], likely, strict=False), 1):
            one.setdefault(i, Logprob(value, place, _text(tokenizer, i)))
        found.append(one)
    return found


def _text(tokenizer: Tokenizer | None, token: int) -> str | None:
    if tokenizer is None:
        return None
    return tokenizer.token_bytes(token).decode("utf-8", "replace") if token < tokenizer.vocab_size else ""
