"""From logits to tokens: one set of processors, for the sampler and for the verifier of speculative decoding.

`distributions` is the definition: what it gives for a position is what a token of that position is drawn from, with
drafts or without. Random numbers are functions of (seed, position, purpose), so that a request with a seed gets the
same tokens alone and in any batch, before and after a preemption.

Shape suffixes: N positions whose next tokens are wanted, V vocabulary, Q requests.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
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
    """Logits after logit_bias, min_tokens and the penalties, at least float32 [N, V]: the greedy choice is of these.

    Penalties: Keskar et al. 2019 (repetition, of prompt and answer); OpenAI's presence and frequency (of the answer).
    """
    logits_NV = cast(logits_NV, at_least_fp32(logits_NV.dtype))
    biased, unended, repeated, counted = (_Places(logits_NV) for _ in range(4))
    for n, at in enumerate(positions):
        p = at.params
        if p.logit_bias:
            biased.add(n, p.logit_bias, p.logit_bias.values())
        if at.index - at.prompt_length < p.min_tokens:
            unended.add(n, at.ends, [0.0] * len(at.ends))
        if p.repetition_penalty != 1:
            seen = {*at.tokens, *at.drafts}
            repeated.add(n, seen, [p.repetition_penalty] * len(seen))
        if p.presence_penalty or p.frequency_penalty:
            counts = Counter((*at.tokens[at.prompt_length :], *at.drafts))
            counted.add(n, counts, [p.presence_penalty + p.frequency_penalty * count for count in counts.values()])
    if not any((biased.ids, unended.ids, repeated.ids, counted.ids)):
        return logits_NV
    z_X = logits_NV.clone().view(-1)  # the caller's stay as they are
    for places, change in (
        (biased, torch.add),
        (unended, lambda old, _: torch.full_like(old, -torch.inf)),
        (repeated, lambda old, penalty: torch.where(old > 0, old / penalty, old * penalty)),
        (counted, torch.sub),
    ):
        if places.ids:
            at_X, values = places.tensors()
            z_X[at_X] = change(z_X[at_X], values)
    return z_X.view_as(logits_NV)


class _Places:
    """Some tokens of some rows of [N, V], each with a number: all rows together, as a row apart takes as long."""

    def __init__(self, like_NV: Tensor) -> None:
        self.like_NV, self.ids, self.values = like_NV, [], []
        self.rows: list[tuple[int, int]] = []  # row, how many

    def add(self, row: int, ids: Collection[int], values: Collection[float]) -> None:
        """Ids of one row, each once."""
        self.ids += ids
        self.values += values
        self.rows.append((row, len(ids)))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The places in the flat tensor, and the numbers. An id outside of the vocabulary is an IndexError."""
        V = self.like_NV.shape[1]
        if not -V <= min(self.ids) <= max(self.ids) < V:
            raise IndexError(f"token ids of logit_bias, stops or texts must be in [0, {V})")
        rows, counts = _ids([row for row, _ in self.rows], self.like_NV), _ids([n for _, n in self.rows], self.like_NV)
        return rows.repeat_interleave(counts) * V + _ids(self.ids, self.like_NV) % V, self.like_NV.new_tensor(
            self.values
        )


def _ids(ids: Collection[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)


def distributions(logits_NV: Tensor, positions: Sequence[Position]) -> Tensor:
    """What each position's next token is drawn from, at least float32 [N, V]: rows that sum to one, up to rounding.

    After `adjusted`: temperature, min_p, top_k, top_p, each on what the one before has left. A greedy position has all
    its probability on the most likely token, of equals the first.
    """
    z_NV = adjusted(logits_NV, positions)
    params = [at.params for at in positions]
    if any(p.temperature != 1 for p in params):
        # Below 1e-20 any two logits that differ are already as far apart as can be, and the quotient would overflow.
        z_NV = z_NV / _column([max(p.temperature, 1e-20) if p.temperature else 1.0 for p in params], z_NV)
    if cut := [n for n, p in enumerate(params) if p.greedy or p.min_p or p.top_k or p.top_p < 1]:
        z_NV = _put(z_NV, cut, _cut(_take(z_NV, cut), [params[n] for n in cut]))
    return z_NV.softmax(-1)


def _cut(z_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """All but what min_p, top_k and top_p leave, which is of each row the likeliest, of equals the first, is -inf."""
    V = z_NV.shape[1]
    # Few of the vocabulary tell for most settings at most places; sorting all of it takes ten times as long.
    few = min(V, max(1024, *(p.top_k for p in params)))
    n_N1, least_N1, told_N1 = _limits(z_NV, params, few)
    if rows := (~told_N1).nonzero()[:, 0].tolist():
        n_R1, least_R1, _ = _limits(_take(z_NV, rows), [params[n] for n in rows], V)
        n_N1, least_N1 = _put(n_N1, rows, n_R1), _put(least_N1, rows, least_R1)
    out_NV = z_NV < least_N1
    if (V - out_NV.sum(-1, keepdim=True) > n_N1).any():
        equal_NV = z_NV == least_N1
        room_N1 = n_N1 - (z_NV > least_N1).sum(-1, keepdim=True)
        out_NV |= equal_NV & (equal_NV.cumsum(-1) > room_N1)
    return z_NV.masked_fill(out_NV, -torch.inf)


def _limits(z_NV: Tensor, params: Sequence[SamplingParams], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """How many tokens of each row are left, the logit of the last of them, and whether the `width` likeliest tell."""
    V = z_NV.shape[1]
    sorted_NW = _largest(z_NV, width)
    k_N1 = _column([1 if p.greedy else p.top_k or V for p in params], z_NV)
    min_p_N1 = _column([p.min_p for p in params], z_NV)
    top_p_N1 = _column([p.top_p if p.top_p < 1 else 2.0 for p in params], z_NV)  # 2: whatever the rounding of sums
    left_NW = (torch.arange(width, device=z_NV.device) < k_N1) & (sorted_NW >= sorted_NW[:, :1] + min_p_N1.log())
    n_N1 = left_NW.sum(-1, keepdim=True)
    told_N1 = (n_N1 < width) | (k_N1 <= width) | (width == V)
    if any(p.top_p < 1 for p in params):
        left_NW = sorted_NW.masked_fill(~left_NW, -torch.inf)
        total_N1 = left_NW.logsumexp(-1, keepdim=True)
        if not told_N1.all():
            total_N1 = torch.where(told_N1, total_N1, z_NV.logsumexp(-1, keepdim=True))
        p_NW = (left_NW - total_N1).exp()
        before_NW = p_NW.cumsum(-1) - p_NW
        n_N1 = torch.minimum(n_N1, (before_NW < top_p_N1).sum(-1, keepdim=True))
        told_N1 |= (n_N1 < width) & (min_p_N1 == 0)
    n_N1 = n_N1.clamp_min(1)
    return n_N1, sorted_NW.gather(1, n_N1 - 1), told_N1


def _largest(x_NV: Tensor, n: int) -> Tensor:
    """The n largest of each row, in falling order."""
    if x_NV.device.type != "cpu":
        return x_NV.topk(n).values
    # On a CPU topk keeps a heap; numpy partitions with vector instructions, ten times as fast.
    values_NV, V = x_NV.numpy(), x_NV.shape[1]
    if n < V:
        values_NV = np.partition(values_NV, V - n, axis=-1)[:, V - n :]
    return torch.from_numpy(np.sort(values_NV, axis=-1)).flip(-1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _take(x_NV: Tensor, rows: Sequence[int]) -> Tensor:
    """Those rows; of all no copy."""
    return x_NV if len(rows) == len(x_NV) else x_NV.index_select(0, _ids(rows, x_NV))


def _put(x_NV: Tensor, rows: Sequence[int], values_RV: Tensor) -> Tensor:
    """With other values in those rows."""
    return values_RV if len(rows) == len(x_NV) else x_NV.index_copy(0, _ids(rows, x_NV), values_RV)


# ----------------------------------------------------------------------------------------------------------- drawing

_BLOCK = 256


def draw(p_NV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token of each row, int64 [N]: the first whose sum with all before exceeds the row's random number; -1 for a
    row that is no distribution, having a NaN or nothing but zeros.

    Rows need not sum to one. Each row's token depends on that row and its number alone.
    """
    V = p_NV.shape[1]
    whole = V // _BLOCK * _BLOCK
    # First which block, then where in it: sums in float64 over all would be the longest part of sampling.
    parts_NB = p_NV[:, :whole].unflatten(1, (V // _BLOCK, _BLOCK)).sum(-1)
    ends_NB = torch.cat([parts_NB, p_NV[:, whole:].sum(-1, keepdim=True)], 1).double().cumsum(-1)
    total_N1 = ends_NB[:, -1:]
    at_N1 = torch.tensor(uniforms, dtype=torch.float64, device=p_NV.device).unsqueeze(1) * total_N1
    at_N1 = torch.minimum(at_N1, total_N1.nextafter(torch.zeros_like(total_N1)))
    block_N1 = torch.searchsorted(ends_NB, at_N1, right=True).clamp_max(ends_NB.shape[1] - 1)
    before_N1 = torch.where(block_N1 > 0, ends_NB.gather(1, (block_N1 - 1).clamp_min(0)), 0.0)
    ids_NS = block_N1 * _BLOCK + torch.arange(_BLOCK, device=p_NV.device)
    p_NS = p_NV.gather(1, ids_NS.clamp_max(V - 1)).double().masked_fill_(ids_NS >= V, 0.0)
    sums_NS = p_NS.cumsum(-1) + before_N1
    # A block's sum may be a rounding above those of its parts.
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
    """The new tokens of each request: the drafts that are accepted, and one token more. Without drafts: sampling.

    A draft that was named without chance is accepted where the token drawn at its place is the same, which has the
    probability p(d): the tokens are those without drafts. A draft d drawn from q is accepted with probability
    min(1, p(d) / q(d)); after the first that is not, the token comes from the positive part of p - q; after all, from p
    (Leviathan et al. 2023). So tokens are distributed as p says, whatever q. A token is -1 where the logits are no
    numbers.

    Args:
        logits_NV: of all positions of all guesses, one after the other.
        lenience: below 1, drafts are accepted with probability min(1, p(d) / (lenience q(d))) (ibid., A.5): more of
            them, and the distribution is no longer p.
    """
    ways = [_way(guess, lenience) for guess in guesses]
    if len({*ways}) == 1:
        return ways[0](logits_NV, guesses, lenience)
    starts = [*accumulate((len(guess.positions) for guess in guesses), initial=0)]
    found: dict[_Way, Iterator[list[int]]] = {}
    for way in {*ways}:
        own = [n for n, one in enumerate(ways) if one is way]
        part_NV = _take(logits_NV, [row for n in own for row in range(starts[n], starts[n + 1])])
        found[way] = iter(way(part_NV, [guesses[n] for n in own], lenience))
    return [next(found[way]) for way in ways]


_Way = Callable[[Tensor, Sequence[Guess], float], list[list[int]]]


def _way(guess: Guess, lenience: float) -> _Way:
    if guess.positions[0].params.greedy:
        return _compare_with_best
    return _compare_with_drawn if not guess.drafts or (guess.q_KV is None and lenience == 1) else _accept_or_refuse


def _compare_with_best(logits_NV: Tensor, guesses: Sequence[Guess], _: float) -> list[list[int]]:
    z_NV = adjusted(logits_NV, [at for guess in guesses for at in guess.positions])
    best_N1 = z_NV.argmax(-1, keepdim=True)  # of a NaN, where there is one
    return _agreeing(torch.where(z_NV.gather(1, best_N1).isfinite(), best_N1, -1).squeeze(1), guesses)


def _compare_with_drawn(logits_NV: Tensor, guesses: Sequence[Guess], _: float) -> list[list[int]]:
    positions = [at for guess in guesses for at in guess.positions]
    uniforms = [uniform(at.seed, at.index, SAMPLE) for at in positions]
    return _agreeing(draw(distributions(logits_NV, positions), uniforms), guesses)


def _agreeing(chosen_N: Tensor, guesses: Sequence[Guess]) -> list[list[int]]:
    """The tokens chosen at the positions of each guess, up to the first that is not the draft there."""
    chosen, found, row = chosen_N.tolist(), [], 0
    for guess in guesses:
        n = next((i for i, draft in enumerate(guess.drafts) if draft != chosen[row + i]), len(guess.drafts))
        found.append(chosen[row : row + n + 1])
        row += len(guess.positions)
    return found


def _accept_or_refuse(logits_NV: Tensor, guesses: Sequence[Guess], lenience: float) -> list[list[int]]:
    p_NV = distributions(logits_NV, [at for guess in guesses for at in guess.positions])
    kept = _accepted(p_NV, guesses, lenience)
    ends = [guess.positions[n] for guess, n in zip(guesses, kept, strict=True)]
    tokens = draw(_rest(p_NV, guesses, kept), [uniform(at.seed, at.index, SAMPLE) for at in ends]).tolist()
    return [[*guess.drafts[:n], token] for guess, n, token in zip(guesses, kept, tokens, strict=True)]


def _accepted(p_NV: Tensor, guesses: Sequence[Guess], lenience: float) -> list[int]:
    """How many drafts of each, from the first on, are accepted."""
    starts = accumulate((len(guess.positions) for guess in guesses), initial=0)
    drafts = [
        (row + i, draft) for row, guess in zip(starts, guesses, strict=False) for i, draft in enumerate(guess.drafts)
    ]
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
    starts = accumulate((len(guess.positions) for guess in guesses), initial=0)
    p_QV = _take(p_NV, [row + n for row, n in zip(starts, kept, strict=False)])
    refused = [i for i, (guess, n) in enumerate(zip(guesses, kept, strict=True)) if n < len(guess.drafts)]
    rest_RV = p_QV.index_select(0, _ids(refused, p_QV))
    for rest_V, i in zip(rest_RV, refused, strict=True):
        guess, n = guesses[i], kept[i]
        if guess.q_KV is None:
            rest_V[guess.drafts[n]] = 0.0
        else:
            rest_V -= guess.q_KV[n]
    rest_RV.clamp_min_(0.0)
    # Where p and q agree up to rounding nothing is left, and a refusal was rounding, too.
    rest_RV = torch.where(rest_RV.sum(-1, keepdim=True) > 0, rest_RV, _take(p_QV, refused))
    return _put(p_QV, refused, rest_RV)
