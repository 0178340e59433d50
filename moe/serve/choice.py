"""What follows from the logits of a pass: new tokens, and the log-probabilities that were asked for. Changes nothing.

Shape suffixes: N logits that the pass's works want, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from moe.serve.logprobs import Logprobs, logprobs_of
from moe.serve.sampling import Guess, Position, verify
from moe.serve.scheduler import Work
from moe.tokenizer import Tokenizer


class Choice(NamedTuple):
    """For one work; -1 for a token whose logits are no numbers."""

    tokens: list[int]
    prompt_logprobs: list[Logprobs]
    logprobs: list[Logprobs]


class _Asked(NamedTuple):
    """Log-probabilities wanted at some rows of the logits: of the token that follows, and of so many of the top."""

    rows: range
    tokens: list[int]
    top: int | None


def wanted(work: Work) -> tuple[range, range]:
    """Which of a work's tokens have logits that are wanted: those that score the prompt, and those to choose from."""
    sampled = range(work.n - 1 - work.n_drafts, work.n) if work.samples else range(0)
    if work.request.params.prompt_logprobs is None:
        return range(0), sampled
    begin = work.request.extra.n_scored - work.start  # after a preemption some are computed again
    end = min(work.n, work.request.prompt_length - 1 - work.start)
    return range(begin, max(begin, end)), sampled


def choose(
    works: Sequence[Work], logits_NV: Tensor, tokenizer: Tokenizer | None, lenience: float = 1.0
) -> list[Choice]:
    """For each work of a pass.

    Args:
        logits_NV: after the `wanted` tokens of each work, one after the other.
        tokenizer: for the texts of tokens beside their log-probabilities.
        lenience: with drafts; see `verify`.
    """
    rows, row = [], 0
    for scored, sampled in map(wanted, works):
        middle, end = row + len(scored), row + len(scored) + len(sampled)
        rows.append((range(row, middle), range(middle, end)))
        row = end
    guesses = [_guess(work) for work in works if work.samples]
    own_NV = logits_NV
    if any(scored for scored, _ in rows):
        own_NV = _rows(logits_NV, [*chain(*(sampled for _, sampled in rows))])
    found = iter(verify(own_NV, guesses, lenience) if guesses else [])
    tokens = [next(found) if work.samples else [] for work in works]
    asked = []
    for work, new, (scored, sampled) in zip(works, tokens, rows, strict=True):
        p = work.request.params
        first = work.start + wanted(work)[0].start + 1
        asked.append(_Asked(scored, work.request.tokens[first : first + len(scored)], p.prompt_logprobs))
        asked.append(_Asked(sampled, [] if p.logprobs is None or -1 in new else new, p.logprobs))
    scores = _scores(logits_NV, asked, tokenizer)
    return [Choice(new, next(scores), next(scores)) for new in tokens]


def _scores(logits_NV: Tensor, asked: Sequence[_Asked], tokenizer: Tokenizer | None) -> Iterator[list[Logprobs]]:
    rows = [row for one in asked for row in one.rows[: len(one.tokens)]]
    tokens = [token for one in asked for token in one.tokens]
    tops = [one.top or 0 for one in asked for _ in one.tokens]
    found = iter(logprobs_of(_rows(logits_NV, rows), tokens, tops, tokenizer) if rows else [])
    return (list(islice(found, len(one.tokens))) for one in asked)


def _rows(logits_NV: Tensor, rows: list[int]) -> Tensor:
    return logits_NV.index_select(0, torch.tensor(rows, dtype=torch.int64, device=logits_NV.device))


def _guess(work: Work) -> Guess:
    r, answer = work.request, work.request.extra
    drafts = r.drafts[: work.n_drafts]
    positions = [
        Position(r.params, r.tokens, r.prompt_length, answer.seed, answer.ends, tuple(drafts[:i]))
        for i in range(len(drafts) + 1)
    ]
    return Guess(positions, drafts, answer.q_KV[: len(drafts)] if drafts and answer.q_KV is not None else None)
