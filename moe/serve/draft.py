"""A smaller model that guesses the next tokens of many requests at once.

Its keys and values lie at the same places as the served model's, in pages of its own: the request's blocks are its
blocks, so that the prefix cache, preemption and abortion need no second bookkeeping. What it has computed of a request
may lag behind, and is caught up with when it is asked; what it holds decides how good its guesses are, never what the
served model answers.

Shape suffixes: N requests, K drafts of a request, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.model import Transformer
from moe.serve.pages import Pages, Segment
from moe.serve.request import Request
from moe.serve.runner import Runner
from moe.serve.sampling import DRAFT, Position, adjusted, distributions, draw, uniform
from moe.serve.scheduler import Scheduler
from moe.serve.speculative import NGram, Proposal, Proposer


@dataclass(slots=True)
class _Computed:
    """The positions of a request whose keys and values the draft model has: of its first tokens, then of guesses."""

    tokens: int
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    """Guesses by a model with the same vocabulary.

    Args:
        runner: of the served model.
        scheduler: of the engine, whose blocks it shares.
        kv_cache_dtype, quantization: of the draft model, as the engine's.

    Raises:
        ConfigError: another vocabulary than the served model's, a shorter context, or another device.
    """

    def __init__(
        self,
        draft: Transformer,
        runner: Runner,
        scheduler: Scheduler,
        kv_cache_dtype: str = "auto",
        quantization: str | None = None,
    ) -> None:
        cfg, needs = draft.cfg, runner.model.cfg
        for name, ok in (
            ("vocab_size", cfg.vocab_size == needs.vocab_size),
            ("max_seq_len", cfg.max_seq_len >= needs.max_seq_len),
        ):
            if not ok:
                raise ConfigError(
                    f"speculative: the draft model {cfg.name} has {name} = {getattr(cfg, name)}, and {needs.name} has "
                    f"{getattr(needs, name)}; it must be {'the same' if name == 'vocab_size' else 'no less'}: choose "
                    "another draft model"
                )
        pool, weight, device = scheduler.pool, draft.embedding.weight, runner.pages.device
        if weight.device != device:
            raise ConfigError(
                f"speculative: the draft model is on {weight.device}, and the model on {device}; move it: .to({device})"
            )
        pages = Pages(cfg, pool.n_blocks, pool.block_size, weight.dtype, device, kv_cache_dtype)
        self.runner = Runner(draft, pages, quantization=quantization)
        self._scheduler = scheduler
        self._computed: dict[Request, _Computed] = {}
        # Which full block of which text a block holds; it may be a former one's, which does no harm.
        self._holds: dict[int, bytes] = {}

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        """See `Proposer`. The guesses at a request are as many as there are free blocks for."""
        room = [self._scheduler.reserve(r, n) if n else 0 for r, n in zip(requests, counts, strict=True)]
        chosen = [(r, n) for r, n in zip(requests, room, strict=True) if n]
        found = iter(self._propose(*zip(*chosen, strict=True)) if chosen else [])
        return [next(found) if n else Proposal([]) for n in room]

    def behind(self, request: Request) -> int:
        """See `Proposer`."""
        return len(request.tokens) - self._known(request)

    def forget(self, request: Request) -> None:
        """See `Proposer`."""
        self._computed.pop(request, None)

    # --------------------------------------------------------------------------------------------------- guessing

    def _propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        logits_NV = self._catch_up(requests)
        drafts: list[list[int]] = [[] for _ in requests]
        rows: list[list[Tensor]] = [[] for _ in requests]
        live = list(range(len(requests)))
        while True:
            tokens, q_NV = _draw(logits_NV, [_position(requests[i], drafts[i]) for i in live])
            going = []
            for row, (i, token) in enumerate(zip(live, tokens, strict=True)):
                if token < 0:  # of logits that are no numbers: a draft model that is broken guesses nothing
                    continue
                drafts[i].append(token)
                if q_NV is not None and not requests[i].params.greedy:
                    rows[i].append(q_NV[row])
                if len(drafts[i]) < counts[i]:
                    going.append(i)
            live = going
            if not live:
                break
            logits_NV = self._run([_newest(requests[i], drafts[i]) for i in live], range(len(live)))
        for request, guesses in zip(requests, drafts, strict=True):
            self._computed[request].guesses = guesses[:-1]  # the last one's keys and values nobody needed
        # What a greedy request's guess was drawn from leaves no chance, as if it had been named.
        return [Proposal(d, torch.stack(q) if q else None) for d, q in zip(drafts, rows, strict=True)]

    def _catch_up(self, requests: Sequence[Request]) -> Tensor:
        """The logits [N, V] after each request's newest token, in passes of as many tokens as the engine's."""
        most, found = self._scheduler.max_batch_tokens, []
        segments: list[Segment] = []
        wanted: list[int] = []
        used = 0

        def flush() -> None:
            nonlocal used
            if segments:
                found.append(self._run(segments, wanted))
            segments.clear()
            wanted.clear()
            used = 0

        for r in requests:
            at, end = self._known(r), len(r.tokens)
            while at < end:
                n = min(end - at, most - used)
                segments.append(Segment(r.tokens[at : at + n], at, r.blocks))
                at, used = at + n, used + n
                if at == end:
                    wanted.append(used - 1)
                if used == most:
                    flush()
        flush()
        for r in requests:
            self._computed[r] = _Computed(len(r.tokens))
            full = len(r.tokens) // self._scheduler.pool.block_size
            self._holds.update(zip(r.blocks[:full], r.hashes[:full], strict=False))
        return torch.cat(found)

    def _run(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        size = self._scheduler.pool.block_size
        for segment in segments:
            for block in segment.blocks[segment.start // size : -(-segment.end // size)]:
                self._holds.pop(block, None)
        return self.runner(segments, wanted)

    def _known(self, r: Request) -> int:
        """Of a request's tokens, how many have their keys and values here; never the newest's, whose logits are wanted.

        Of a request that was not seen before, those in blocks of the prefix cache that the draft model has computed,
        too. Of another, also those guesses that have become its tokens.
        """
        known = self._computed.get(r)
        if known is None:
            n = 0
            for block, name in zip(r.blocks, r.hashes, strict=False):
                if self._holds.get(block) != name:
                    break
                n += self._scheduler.pool.block_size
            return min(n, len(r.tokens) - 1)
        n = known.tokens
        for token, guess in zip(r.tokens[n:], known.guesses, strict=False):
            if token != guess:
                break
            n += 1
        return min(n, len(r.tokens) - 1)


def proposer_of(
    speculative: str | Transformer | Proposer | None,
    runner: Runner,
    scheduler: Scheduler,
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
) -> Proposer | None:
    """Who guesses, by the engine's settings.

    Raises:
        ConfigError: an unknown name, or a draft model that does not fit the served one.
    """
    if speculative == "ngram":
        return NGram()
    if isinstance(speculative, Transformer):
        return DraftModel(speculative, runner, scheduler, kv_cache_dtype, quantization)
    if isinstance(speculative, str):
        raise ConfigError(f'speculative = {speculative!r}: must be "ngram", a draft model, a proposer, or None')
    return speculative


def _position(r: Request, drafts: Sequence[int]) -> Position:
    return Position(r.params, r.tokens, r.prompt_length, r.extra.seed, r.extra.ends, tuple(drafts))


def _newest(r: Request, drafts: Sequence[int]) -> Segment:
    return Segment(drafts[-1:], len(r.tokens) + len(drafts) - 1, r.blocks)


def _draw(logits_NV: Tensor, positions: Sequence[Position]) -> tuple[list[int], Tensor | None]:
    """A token for each position, and what they were drawn from: by the processors that the verifier has, too."""
    if all(at.params.greedy for at in positions):
        return adjusted(logits_NV, positions).argmax(-1).tolist(), None
    q_NV = distributions(logits_NV, positions)
    return draw(q_NV, [uniform(at.seed, at.index, DRAFT) for at in positions]).tolist(), q_NV
