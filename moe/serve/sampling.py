"""From logits to tokens: one set of processors, for the sampler and for the verifier of speculative decoding.

`distributions` is the definition: what it gives for a position is what a token of that position is drawn from, with
drafts or without. Random numbers are functions of (seed, position, purpose), so that a request with a seed gets the
same tokens alone and in any batch, before and after a preemption.

Shape suffixes: N positions whose next tokens are wanted, V vocabulary, Q requests.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.serve.request import SamplingParams

SAMPLE, ACCEPT, DRAFT = range(3)  # what a random number is for


class Position(NamedTuple):
    """A position whose next token is wanted: its settings, and what stands before."""

    params: SamplingParams
    tokens: Sequence[int]  # of the request: its prompt, and what it has answered
    prompt_length: int
    seed: int
    ends: Collection[int] = ()  # ids that end the text
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
    """Logits after logit_bias, min_tokens and the penalties, float32 [N, V]; the most likely is the greedy choice."""
    logits_NV = logits_NV.float()
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
            row_V[_ids({*p.stop_token_ids, *(() if p.ignore_eos else at.ends)}, row_V)] = -torch.inf
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
    """What each position's next token is drawn from, float32 [N, V]: rows that sum to one, up to rounding.

    After `adjusted`: temperature, min_p, top_k, top_p, each on what the one before has left. A greedy position has all
    its probability on the most likely token, of equals the first.
    """
    logits_NV = adjusted(logits_NV, positions)
    params = [at.params for at in positions]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_NV.device).unsqueeze(1)

    # Below 1e-20 any two logits that differ are already as far apart as can be, and the quotient would overflow.
    p_NV = (logits_NV / column([max(p.temperature, 1e-20) if p.temperature else 1.0 for p in params])).softmax(-1)
    if any(p.min_p for p in params):
        least_N1 = p_NV.amax(-1, keepdim=True) * column([p.min_p for p in params])
        p_NV = p_NV.masked_fill(p_NV < least_N1, 0.0)
    cut = [n for n, p in enumerate(params) if p.temperature and (0 < p.top_k < p_NV.shape[1] or p.top_p < 1)]
    if cut:
        p_NV[cut] = _cut_off(p_NV[cut], [params[n] for n in cut])
    if greedy := [n for n, p in enumerate(params) if p.greedy]:
        best_N1 = logits_NV[greedy].argmax(-1, keepdim=True)
        p_NV[greedy] = torch.zeros_like(p_NV[greedy]).scatter_(1, best_N1, 1.0)
    return p_NV / p_NV.sum(-1, keepdim=True)


def _cut_off(p_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep the top_k likeliest, of equals the first; then the fewest that reach top_p of what is left."""
    sorted_NV, ids_NV = p_NV.sort(dim=-1, descending=True, stable=True)
    V = p_NV.shape[1]
    k_N1 = torch.tensor([[p.top_k or V] for p in params], device=p_NV.device)
    sorted_NV = sorted_NV.masked_fill(torch.arange(V, device=p_NV.device) >= k_N1, 0.0)
    total_N1 = sorted_NV.sum(-1, keepdim=True)
    before_NV = sorted_NV.cumsum(-1) - sorted_NV
    # Above 1: nothing is cut off, whatever the rounding of the sums.
    most_N1 = torch.tensor([[max(p.top_p, 1e-30) if p.top_p < 1 else 2.0] for p in params], device=p_NV.device)
    sorted_NV = sorted_NV.masked_fill(before_NV >= most_N1 * total_N1, 0.0)
    return torch.zeros_like(p_NV).scatter_(1, ids_NV, sorted_NV)


# ----------------------------------------------------------------------------------------------------------- drawing


def draw(p_NV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token of each row, int64 [N]: the first whose sum with all before exceeds the row's random number.

    Rows need not sum to one. Each row's token depends on that row and its number alone.
    """
    sums_NV = p_NV.double().cumsum(-1)
    total_N1 = sums_NV[:, -1:]
    at_N1 = torch.tensor(uniforms, dtype=torch.float64, device=p_NV.device).unsqueeze(1) * total_N1
    at_N1 = torch.minimum(at_N1, total_N1.nextafter(torch.zeros_like(total_N1)))
    return torch.searchsorted(sums_NV, at_N1, right=True).squeeze(1)


def sample(logits_NV: Tensor, positions: Sequence[Position]) -> list[int]:
    """The next token of each position."""
    if all(at.params.greedy for at in positions):
        return adjusted(logits_NV, positions).argmax(-1).tolist()
    p_NV = distributions(logits_NV, positions)
    return draw(p_NV, [uniform(at.seed, at.index, SAMPLE) for at in positions]).tolist()


# --------------------------------------------------------------------------------------------------------- verifying


class Guess(NamedTuple):
    """A request's drafts and how they came about: position i follows the first i drafts, and the last follows all."""

    positions: Sequence[Position]
    drafts: Sequence[int]
    q_KV: Tensor | None  # what each draft was drawn from; None: it was named without chance


def verify(logits_NV: Tensor, guesses: Sequence[Guess], lenience: float = 1.0) -> list[list[int]]:
    """The new tokens of each request: the drafts that are accepted, and one token more (Leviathan et al. 2023).

    A draft d, drawn from q, is accepted with probability min(1, p(d) / q(d)); after the first that is not, the token
    comes from the positive part of p - q; after all, from p. So tokens are distributed as p says, whatever q.

    Args:
        logits_NV: of all positions of all guesses, one after the other.
        lenience: below 1, drafts are accepted with probability min(1, p(d) / (lenience q(d))) (ibid., A.5): more of
            them, and the distribution is no longer p.
    """
    positions = [at for guess in guesses for at in guess.positions]
    p_NV = distributions(logits_NV, positions)
    rows = p_NV.split([len(guess.positions) for guess in guesses])
    kept = [_accepted(p_KV, guess, lenience) for p_KV, guess in zip(rows, guesses, strict=True)]
    last_QV = torch.stack([_rest(p_KV, guess, n) for p_KV, guess, n in zip(rows, guesses, kept, strict=True)])
    ends = [guess.positions[n] for guess, n in zip(guesses, kept, strict=True)]
    tokens = draw(last_QV, [uniform(at.seed, at.index, SAMPLE) for at in ends]).tolist()
    return [[*guess.drafts[:n], token] for guess, n, token in zip(guesses, kept, tokens, strict=True)]


def _accepted(p_KV: Tensor, guess: Guess, lenience: float) -> int:
    """How many drafts, from the first on, are accepted."""
    if not guess.drafts:
        return 0
    ids_K1 = torch.tensor(guess.drafts, device=p_KV.device).unsqueeze(1)
    p_of = p_KV[:-1].gather(1, ids_K1).squeeze(1).tolist()
    q_of = [1.0] * len(guess.drafts) if guess.q_KV is None else guess.q_KV.gather(1, ids_K1).squeeze(1).tolist()
    for n, (at, p, q) in enumerate(zip(guess.positions, p_of, q_of, strict=False)):
        # Strictly below: a draft that the target never gives is refused, also by the number 0.
        if not uniform(at.seed, at.index, ACCEPT) * q * lenience < p:
            return n
    return len(guess.drafts)


def _rest(p_KV: Tensor, guess: Guess, n: int) -> Tensor:
    """What the token after `n` accepted drafts is drawn from, [V]: not yet of sum one."""
    p_V = p_KV[n]
    if n == len(guess.drafts):
        return p_V
    if guess.q_KV is None:
        rest_V = p_V.clone()
        rest_V[guess.drafts[n]] = 0.0
    else:
        rest_V = (p_V - guess.q_KV[n]).clamp_min(0.0)
    # Where p and q agree up to rounding nothing is left, and a refusal was rounding, too.
    return torch.where(rest_V.sum() > 0, rest_V, p_V)
