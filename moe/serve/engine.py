"""The engine: requests go in at any time, every step computes some tokens of many of them, and answers come out.

engine = Engine(model, tokenizer)
outputs = engine.generate(["Once upon a time", "def main("], SamplingParams(max_tokens=64))
"""

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moe.errors import ConfigError
from moe.generate import TextStream
from moe.model import Transformer
from moe.serve.blocks import BlockPool
from moe.serve.pages import Pages, Segment
from moe.serve.request import FinishReason, Request, SamplingParams
from moe.serve.runner import Runner
from moe.serve.sampling import Guess, Position, verify
from moe.serve.scheduler import Scheduler, Work
from moe.serve.speculative import ngram
from moe.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Output:
    """An answer, whole or so far.

    Attributes:
        text: without the stop string or end token; empty where the engine has no tokenizer.
        cached_tokens: of the prompt, whose keys and values were there already.
        queue_s, ttft_s, tpot_s: seconds until the first pass, until the first token, and between tokens after it.
    """

    id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    cached_tokens: int = 0
    preemptions: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(slots=True)
class _State:
    """The engine's own part of a request."""

    seed: int
    ends: set[int]
    stream: TextStream | None
    added: float
    text: str = ""
    begun: float = 0.0
    first: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class Stats:
    """Counts since the engine was made."""

    steps: int = 0
    tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Serves one model.

    Args:
        tokenizer: for prompts that are text, and answers as text.
        block_size: tokens of a block of the cache. num_blocks: how many; None: what `max_running` full contexts need.
        max_batch_tokens: tokens of one pass at most. max_running: requests in a pass at most.
        prefix_cache: keep keys and values for prompts that begin alike.
        speculative: "ngram", guesses from the request's own text; None: none.
        num_drafts: guesses a step, at most.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        block_size: int = 16,
        num_blocks: int | None = None,
        max_batch_tokens: int = 2048,
        max_running: int = 64,
        max_waiting: int | None = None,
        prefix_cache: bool = True,
        speculative: str | None = None,
        num_drafts: int = 4,
    ) -> None:
        if speculative not in (None, "ngram"):
            raise ConfigError(f'speculative = {speculative!r}: must be "ngram" or None')
        self.model, self.tokenizer = model, tokenizer
        self.context = model.cfg.max_seq_len
        per_request = -(-self.context // block_size)
        pool = BlockPool(num_blocks or max_running * per_request, block_size, prefix_cache=prefix_cache)
        weight = model.embedding.weight
        self.runner = Runner(model, Pages(model.cfg, pool.n_blocks, block_size, weight.dtype, weight.device))
        self.scheduler = Scheduler(
            pool, max_batch_tokens=max_batch_tokens, max_running=max_running, max_waiting=max_waiting
        )
        self.num_drafts = num_drafts if speculative else 0
        self.stats = Stats()
        self._requests: dict[str, Request] = {}
        self._named = 0

    # ------------------------------------------------------------------------------------------------- requests

    def add(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None, priority: int = 0
    ) -> str:
        """Takes a request and returns its name.

        Raises:
            ConfigError: a prompt that is empty, too long, holds ids the model does not have, or is text without a
                tokenizer; or a request that could never fit.
            QueueFullError: too many wait already.
        """
        params = params or SamplingParams()
        tokens = self._tokens(prompt)
        request_id = request_id or f"request-{self._named}"
        self._named += 1
        if request_id in self._requests:
            raise ConfigError(f"request_id = {request_id!r}: is the name of a request that is not done yet")
        limit = self.context if params.max_tokens is None else min(self.context, len(tokens) + params.max_tokens)
        request = Request(request_id, len(tokens), tokens, params, limit, priority)
        eot = set() if self.tokenizer is None or params.ignore_eos else {self.tokenizer.eot_id}
        stream = None if self.tokenizer is None else TextStream(self.tokenizer, params.stop, eot)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request.extra = _State(seed, eot | set(params.stop_token_ids), stream, time.perf_counter())
        self.scheduler.add(request)
        self._requests[request_id] = request
        return request_id

    def abort(self, request_id: str) -> None:
        """The request ends here; one that is unknown or done is left alone."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.finish_reason = "abort"
            self.scheduler.finish(request)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("prompt: text needs a tokenizer; make the engine with one, or give ids")
            prompt = self.tokenizer.encode(prompt)
        tokens = list(prompt)
        if not tokens:
            raise ConfigError("prompt = []: must have at least one token")
        vocabulary = self.model.cfg.vocab_size
        for i in tokens:
            if not 0 <= i < vocabulary:
                raise ConfigError(f"prompt has id {i}: must be an id of the vocabulary, 0 to {vocabulary - 1}")
        if len(tokens) >= self.context:
            raise ConfigError(
                f"prompt of {len(tokens)} tokens: the context of {self.model.cfg.name} is {self.context}, and one must "
                "be left for the answer; cut the prompt"
            )
        return tokens

    # ---------------------------------------------------------------------------------------------------- steps

    def step(self) -> list[Output]:
        """One pass of the model; the requests that have new tokens, as far as they are."""
        plan, now = self.scheduler.plan(), time.perf_counter()
        self.stats.preemptions += len(plan.preempted)
        if not plan.works:
            return []
        segments, wanted, row = [], [], 0
        for work in plan.works:
            segments.append(Segment(work.token_ids, work.start, work.request.blocks))
            row += work.n
            if work.samples:
                wanted += range(row - 1 - work.n_drafts, row)
            work.request.extra.begun = work.request.extra.begun or now
        logits_NV = self.runner(segments, wanted)
        return self._take(plan.works, logits_NV)

    def _take(self, works: Sequence[Work], logits_NV: Tensor) -> list[Output]:
        sampling = [work for work in works if work.samples]
        found = iter(verify(logits_NV, [_guess(work) for work in sampling]) if sampling else [])
        self.stats.steps += 1
        outputs = []
        for work in works:
            request = work.request
            self.stats.tokens += work.n
            tokens = self._accept(request, next(found)) if work.samples else []
            if work.samples:
                self.stats.drafted += work.n_drafts
                self.stats.accepted += min(len(tokens), work.n_drafts + 1) - 1
                self.stats.new_tokens += len(tokens)
            self.scheduler.advance(work, tokens)
            if not tokens:
                continue
            if request.finish_reason:
                self.scheduler.finish(request)
                self._requests.pop(request.id, None)
                self.stats.finished[request.finish_reason] = self.stats.finished.get(request.finish_reason, 0) + 1
            elif self.num_drafts:
                room = request.limit - len(request.tokens) - 1
                request.drafts = ngram(request.tokens, min(self.num_drafts, room)) if room > 0 else []
            outputs.append(_output(request))
        return outputs

    def _accept(self, request: Request, tokens: list[int]) -> list[int]:
        """Those before the end, and why it ends."""
        state: _State = request.extra
        now = time.perf_counter()
        state.first, state.last = state.first or now, now
        length = len(request.tokens)
        for n, token in enumerate(tokens, 1):
            new = length + n - request.prompt_length
            ended = token in state.ends and new > request.params.min_tokens
            if state.stream is not None:
                state.text += state.stream.push(token)
                ended |= state.stream.done
            if ended or length + n == request.limit:
                request.finish_reason = "stop" if ended else "length"
                if state.stream is not None:
                    state.text += state.stream.finish()
                return tokens[:n]
        return tokens

    # -------------------------------------------------------------------------------------------------- answers

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """The answers to the prompts, in their order.

        Args:
            params: for all, or one for each.
        """
        one = isinstance(prompts, str) or (isinstance(prompts, Sequence) and all(isinstance(p, int) for p in prompts))
        every: list[Prompt] = [prompts] if one else list(prompts)  # type: ignore[list-item,arg-type]
        settings = [params] * len(every) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(settings) != len(every):
            raise ConfigError(f"params: {len(settings)} for {len(every)} prompts; give one for each, or one for all")
        names = [self.add(prompt, p) for prompt, p in zip(every, settings, strict=True)]
        done = {output.id: output for output in self.run() if output.finish_reason}
        return [done[name] for name in names]

    def run(self) -> Iterator[Output]:
        """Steps until nothing is left to do; what every step gives."""
        while not self.scheduler.idle:
            yield from self.step()


def _guess(work: Work) -> Guess:
    r, state = work.request, work.request.extra
    drafts = r.drafts[: work.n_drafts]
    positions = [
        Position(r.params, r.tokens, r.prompt_length, state.seed, state.ends, tuple(drafts[:i]))
        for i in range(len(drafts) + 1)
    ]
    return Guess(positions, drafts, None)


def _output(request: Request) -> Output:
    state: _State = request.extra
    n = len(request.tokens) - request.prompt_length
    return Output(
        request.id,
        request.tokens[: request.prompt_length],
        request.output,
        state.text,
        request.finish_reason,
        request.cached_tokens,
        request.preemptions,
        state.begun - state.added,
        state.first - state.added,
        (state.last - state.first) / (n - 1) if n > 1 else 0.0,
    )
