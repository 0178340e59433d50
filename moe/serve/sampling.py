"""From logits to tokens: one set of processors, for the sampler and for the verifier of speculative decoding.

`distributions` is the definition: what it gives for a position is what a token of that position is drawn from, with
drafts or without. Random numbers are functions of (seed, position, purpose), so that a request with a seed gets the
same tokens alone and in any batch, before and after a preemption.

Shape suffixes: N positions whose next tokens are wanted, V vocabulary, Q requests.
"""

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.layers import at_least_fp32, cast
from moe.serve.request import SamplingParams

SAMPLE, ACCEPT, DRAFT = range(3)  # what a random number is for


class Position(NamedTuple):
    """A position whose next token is wanted: its settings, and what stands before."""

    params: SamplingParams
    tokens: Sequence[int]  # of the request: its prompt, and what it has answered
    prompt_length: int
    seed: int
    ends: Collection[int] = ()  # ids that end the text, and may not before min_tokens
    drafts: tuple[int, ...] = ()  # guesses between those and this position

    @property
    def index(self) -> int:
        """The place of the wanted token in its request."""
        return len(self.tokens) + len(self.drafts)


def uniform(seed: int, index: int, purpose: int) -> float:
    """A number in [0, 1), the same for the same arguments everywhere; 53 bits of BLAKE2b."""
    key = struct.pack("<Qqq", seed % 2**64, index, purpose)
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


# ----------------------------------------------------------------------------------------------------- distributions


def adjusted(logits_NV: Tensor, positions: Sequence[Position]) -> Tensor:
    """Logits after logit_bias, min_tokens and the penalties, at least float32 [N, V]: the greedy choice is of these."""
    logits_NV = cast(logits_NV, at_least_fp32(logits_NV.dtype))
    fresh = False
    for n, at in enumerate(positions):
        p = at.params
        unended = at.index - at.prompt_length < p.min_tokens
        penalised = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        if not (p.logit_bias or unended or penalised):
            continue
        if not fresh:  # the caller's stay as they are
            logits_NV, fresh = logits_NV.clone(), True
        row_V = logits_NV[n]
        if p.logit_bias:
            row_V.index_add_(0, _ids(p.logit_bias, row_V), row_V.new_tensor(list(p.logit_bias.values())))
        if unended:
            row_V[_ids(at.ends, row_V)] = -torch.inf
        if penalised:
            _penalise(row_V, at)
    return logits_NV


def _penalise(row_V: Tensor, at: Position) -> None:
    """Keskar et al. 2019 (repetition, of prompt and answer); OpenAI's presence and frequency (of the answer)."""
    p = at.params
    if p.repetition_penalty != 1:
        seen = _ids({*at.tokens, *at.drafts}, row_V)
        values = row_V[seen]
        row_V[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = Counter((*at.tokens[at.prompt_length :], *at.drafts))
        row_V[_ids(counts, row_V)] -= p.presence_penalty + p.frequency_penalty * row_V.new_tensor(list(counts.values()))


def _ids(ids: Collection[int], row_V: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=row_V.device)


def distributions(logits_NV: Tensor, positions: Sequence[Position]) -> Tensor:
    """What each position's next token is drawn from, at least float32 [N, V]: rows that sum to one, up to rounding.

    After `adjusted`: temperature, min_p, top_k, top_p, each on what the one before has left. A greedy position has all
    its probability on the most likely token, of equals the first.
    """
    z_NV = adjusted(logits_NV, positions)
    params = [at.params for at in positions]

    def column(values: Sequence[float], rows: Sequence[int] | slice = slice(None)) -> Tensor:
        return torch.tensor(values, dtype=z_NV.dtype, device=z_NV.device).unsqueeze(1)[rows]

    if any(p.temperature != 1 for p in params):
        # Below 1e-20 any two logits that differ are already as far apart as can be, and the quotient would overflow.
        z_NV = z_NV / column([max(p.temperature, 1e-20) if p.temperature else 1.0 for p in params])
    elif z_NV is logits_NV:
        z_NV = z_NV.clone() if any(p.min_p or p.top_k or p.top_p < 1 for p in params) else z_NV
    if rows := [n for n, p in enumerate(params) if p.min_p]:
        least_N1 = z_NV[rows].amax(-1, keepdim=True) + column([math.log(params[n].min_p) for n in rows])
        z_NV[rows] = z_NV[rows].masked_fill_(z_NV[rows] < least_N1, -torch.inf)
    V = z_NV.shape[1]
    if rows := [n for n, p in enumerate(params) if p.greedy or 0 < p.top_k < V]:
        k_N1 = torch.tensor([[1 if params[n].greedy else params[n].top_k] for n in rows], device=z_NV.device)
        z_NV[rows] = _likeliest(z_NV[rows], k_N1)
    if rows := [n for n, p in enumerate(params) if p.top_p < 1 and not p.greedy]:
        z_NV[rows] = _likeliest(z_NV[rows], _nucleus(z_NV[rows], column([params[n].top_p for n in rows])))
    return z_NV.softmax(-1)


def _likeliest(z_NV: Tensor, k_N1: Tensor) -> Tensor:
    """Nothing but the k likeliest of each row, of equals the first; in place."""
    least_N1 = _largest(z_NV, int(k_N1.max())).gather(1, k_N1 - 1)
    equal_NV = z_NV == least_N1
    more_NV = z_NV > least_N1
    room_N1 = k_N1 - more_NV.sum(-1, keepdim=True)
    if (equal_NV.sum(-1, keepdim=True) > room_N1).any():
        equal_NV &= equal_NV.cumsum(-1) <= room_N1
    return z_NV.masked_fill_(~(more_NV | equal_NV), -torch.inf)


def _nucleus(z_NV: Tensor, top_p_N1: Tensor) -> Tensor:
    """How many of the likeliest together have the probability top_p, [N, 1]: at least one (Holtzman et al. 2020)."""
    p_NV = z_NV.softmax(-1)
    V = p_NV.shape[1]
    for width in (min(1024, V), V):  # few are enough, for most models at most places
        largest_NW = _largest(p_NV, width)
        before_NW = largest_NW.cumsum(-1) - largest_NW
        inside_NW = before_NW < top_p_N1
        if width == V or not inside_NW[:, -1].any():
            break
    return inside_NW.sum(-1, keepdim=True).clamp_min(1)


def _largest(x_NV: Tensor, n: int) -> Tensor:
    """The n largest of each row, in falling order."""
    if x_NV.device.type != "cpu":
        return x_NV.topk(n).values
    # On a CPU topk keeps a heap; numpy partitions with vector instructions, ten times as fast.
    values_NV, V = x_NV.numpy(), x_NV.shape[1]
    if n < V:
        values_NV = np.partition(values_NV, V - n, axis=-1)[:, V - n :]
    return torch.from_numpy(np.sort(values_NV, axis=-1)).flip(-1)


# ----------------------------------------------------------------------------------------------------------- drawing

_BLOCK = 256


def draw(p_NV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token of each row, int64 [N]: the first whose sum with all before exceeds the row's random number; -1 for a
    row that is no distribution, having a NaN or nothing but zeros.

    Rows need not sum to one. Each row's token depends on that row and its number alone.
    """
    V = p_NV.shape[1]
    whole = V // _BLOCK * _BLOCK
    # First which block, then where in it: sums over all would be sixteen megabytes for a batch of a usual vocabulary.
    parts_NB = p_NV[:, :whole].unflatten(1, (V // _BLOCK, _BLOCK)).sum(-1, dtype=torch.float64)
    rest_N1 = p_NV[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    ends_NB = torch.cat([parts_NB, rest_N1], 1).cumsum(-1)
    total_N1 = ends_NB[:, -1:]
    at_N1 = torch.tensor(uniforms, dtype=torch.float64, device=p_NV.device).unsqueeze(1) * total_N1
    at_N1 = torch.minimum(at_N1, total_N1.nextafter(torch.zeros_like(total_N1)))
    block_N1 = torch.searchsorted(ends_NB, at_N1, right=True).clamp_max(ends_NB.shape[1] - 1)
    before_N1 = torch.where(block_N1 > 0, ends_NB.gather(1, (block_N1 - 1).clamp_min(0)), 0.0)
    ids_NS = block_N1 * _BLOCK + torch.arange(_BLOCK, device=p_NV.device)
    p_NS = p_NV.gather(1, ids_NS.clamp_max(V - 1)).double().masked_fill_(ids_NS >= V, 0.0)
    sums_NS = p_NS.cumsum(-1) + before_N1
    # The sums of a block's parts may end a rounding below the block's.
    at_N1 = torch.minimum(at_N1, sums_NS[:, -1:].nextafter(torch.zeros_like(total_N1)))
    found_N1 = ids_NS.gather(1, torch.searchsorted(sums_NS, at_N1, right=True).clamp_max(_BLOCK - 1))
    return torch.where(total_N1 > 0, found_N1, -1).squeeze(1)


# --------------------------------------------------------------------------------------------------------- verifying


class Guess(NamedTuple):
    """A request's drafts and how they came about: position i follows the first i drafts, and the last follows all."""

    positions: Sequence[Position]
    drafts: Sequence[int]
    q_KV: Tensor | None  # what each draft was drawn from; None: it was named without chance


def verify(logits_NV: Tensor, guesses: Sequence[Guess], lenience: float = 1.0) -> list[list[int]]:
    """The new tokens of each request: the drafts that are accepted, and one token more (Leviathan et al. 2023).

    A draft d, drawn from q, is accepted with probability min(1, p(d) / q(d)); after the first that is not, the token
    comes from the positive part of p - q; after all, from p. So tokens are distributed as p says, whatever q; without
    drafts this is sampling. A token is -1 where the logits are no numbers.

    Args:
        logits_NV: of all positions of all guesses, one after the other.
        lenience: below 1, drafts are accepted with probability min(1, p(d) / (lenience q(d))) (ibid., A.5): more of
            them, and the distribution is no longer p.
    """
    greedy = [guess.positions[0].params.greedy for guess in guesses]
    if all(greedy):
        return _verify_greedy(logits_NV, guesses)
    if not any(greedy):
        return _verify_drawn(logits_NV, guesses, lenience)
    rows = torch.arange(len(logits_NV), device=logits_NV.device).split([len(guess.positions) for guess in guesses])
    found = []
    for kind in (True, False):
        own = [(r, guess) for r, guess, is_greedy in zip(rows, guesses, greedy, strict=True) if is_greedy == kind]
        part_NV, part = logits_NV[torch.cat([r for r, _ in own])], [guess for _, guess in own]
        found.append(iter(_verify_greedy(part_NV, part) if kind else _verify_drawn(part_NV, part, lenience)))
    return [next(found[0 if is_greedy else 1]) for is_greedy in greedy]


def _verify_greedy(logits_NV: Tensor, guesses: Sequence[Guess]) -> list[list[int]]:
    """All probability is on the most likely token: a draft that is that token is accepted, another is not."""
    z_NV = adjusted(logits_NV, [at for guess in guesses for at in guess.positions])
    best_N1 = z_NV.argmax(-1, keepdim=True)  # of a NaN, where there is one
    best = torch.where(z_NV.gather(1, best_N1).isfinite(), best_N1, -1).squeeze(1).tolist()
    found, row = [], 0
    for guess in guesses:
        n = next((i for i, draft in enumerate(guess.drafts) if draft != best[row + i]), len(guess.drafts))
        found.append(best[row : row + n + 1])
        row += len(guess.positions)
    return found


def _verify_drawn(logits_NV: Tensor, guesses: Sequence[Guess], lenience: float) -> list[list[int]]:
    p_NV = distributions(logits_NV, [at for guess in guesses for at in guess.positions])
    kept = _accepted(p_NV, guesses, lenience)
    if any(guess.drafts for guess in guesses):
        p_NV = _rest(p_NV, guesses, kept)
    ends = [guess.positions[n] for guess, n in zip(guesses, kept, strict=True)]
    tokens = draw(p_NV, [uniform(at.seed, at.index, SAMPLE) for at in ends]).tolist()
    return [[*guess.drafts[:n], token] for guess, n, token in zip(guesses, kept, tokens, strict=True)]


def _accepted(p_NV: Tensor, guesses: Sequence[Guess], lenience: float) -> list[int]:
    """How many drafts of each, from the first on, are accepted."""
    starts = accumulate((len(guess.positions) for guess in guesses), initial=0)
    drafts = [
        (row + i, draft) for row, guess in zip(starts, guesses, strict=False) for i, draft in enumerate(guess.drafts)
    ]
    if not drafts:
        return [0] * len(guesses)
    rows, ids = torch.tensor(drafts, device=p_NV.device).unbind(1)
    q_of = torch.ones_like(rows, dtype=p_NV.dtype)
    row = 0
    for guess in guesses:
        n = len(guess.drafts)
        if guess.q_KV is not None:
            q_of[row : row + n] = guess.q_KV.gather(1, ids[row : row + n].unsqueeze(1)).squeeze(1)
        row += n
    chances = zip(p_NV[rows, ids].tolist(), q_of.tolist(), strict=True)
    kept = []
    for guess in guesses:
        own = [next(chances) for _ in guess.drafts]
        # Strictly below: a draft that the target never gives is refused, also by the number 0.
        refused = (
            i
            for i, (at, (p, q)) in enumerate(zip(guess.positions, own, strict=False))
            if not uniform(at.seed, at.index, ACCEPT) * q * lenience < p
        )
        kept.append(next(refused, len(guess.drafts)))
    return kept


def _rest(p_NV: Tensor, guesses: Sequence[Guess], kept: Sequence[int]) -> Tensor:
    """What the token after each guess's accepted drafts is drawn from, [Q, V]: not of sum one where one was refused."""
    starts = [*accumulate((len(guess.positions) for guess in guesses), initial=0)][:-1]
    p_QV = p_NV[[row + n for row, n in zip(starts, kept, strict=True)]]
    for p_V, guess, n in zip(p_QV, guesses, kept, strict=True):
        if n == len(guess.drafts):
            continue
        if guess.q_KV is None:
            rest_V = p_V.clone()
            rest_V[guess.drafts[n]] = 0.0
        else:
            rest_V = (p_V - guess.q_KV[n]).clamp_min_(0.0)
        # Where p and q agree up to rounding nothing is left, and a refusal was rounding, too.
        p_V.copy_(torch.where(rest_V.sum() > 0, rest_V, p_V))
    return p_QV
