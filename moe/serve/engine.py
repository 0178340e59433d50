"""The engine: requests go in at any time, every step computes some tokens of many of them, and answers come out.

engine = Engine(model, tokenizer)
outputs = engine.generate(["Once upon a time", "def main("], SamplingParams(max_tokens=64))
"""

import operator
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moe.errors import ConfigError, ServeError
from moe.model import Transformer
from moe.serve.blocks import BLOCK_SIZE, BlockPool
from moe.serve.choice import Choice, choose, wanted
from moe.serve.controller import Controller
from moe.serve.draft import proposer_of
from moe.serve.output import Answer, Delta, Group, Listener, Output
from moe.serve.pages import Pages, Segment
from moe.serve.request import FinishReason, Request, SamplingParams
from moe.serve.room import blocks_that_fit
from moe.serve.runner import Runner
from moe.serve.scheduler import Scheduler, StepPlan, Work
from moe.serve.speculative import Proposer
from moe.serve.step import Stats, Step
from moe.tokenizer import Tokenizer

Prompt = str | Sequence[int]

# After so many passes that went through, a budget that was halved for want of memory is doubled again.
_CALM = 64


class Engine:
    """Serves one model. For one thread; `AsyncEngine` is for many callers.

    Args:
        tokenizer: for prompts that are text, and answers as text.
        block_size: tokens of a block of the cache.
        num_blocks: how many; None: as many as `max_running` full contexts need, or as there is memory for.
        max_batch_tokens: tokens of one pass at most. max_running: requests in a pass at most.
        max_waiting: requests that wait at most; None: any number.
        prefix_cache: keep keys and values for prompts that begin alike.
        kv_cache_dtype: of keys and values, see `moe.serve.pages`. quantization, batch_invariant: see `Runner`.
        speculative: who guesses tokens ahead: "ngram", the request's own text; a smaller model with the same
            vocabulary; None: no one.
        num_drafts: guesses a step, at most.
        adaptive: how many, from 0 to `num_drafts`, is chosen by what guessing brings and costs (`Controller`); what a
            seeded request answers may then depend on time, where a draft model guesses, though not its distribution.
            False: always `num_drafts`.
        lenience: 1: tokens are distributed as without guesses. Below 1, a guess is accepted with probability
            min(1, p / (lenience q)): more of them, and the answers are no longer the model's own. Greedy requests stay
            as they are.
        device: of keys and values; None: that of the weights.

    Attributes:
        controller: whose `report()` says what speculation brings, with the figures; None where not `adaptive`.
        listeners: called with a `Step` after every pass.
        stats: counts since the engine was made.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        block_size: int = BLOCK_SIZE,
        num_blocks: int | None = None,
        max_batch_tokens: int = 2048,
        max_running: int = 64,
        max_waiting: int | None = None,
        prefix_cache: bool = True,
        kv_cache_dtype: str = "auto",
        quantization: str | None = None,
        batch_invariant: bool = False,
        speculative: str | Transformer | Proposer | None = None,
        num_drafts: int = 4,
        adaptive: bool = True,
        lenience: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        if num_drafts < 1:
            raise ConfigError(f"num_drafts = {num_drafts}: must be 1 or more; speculative=None turns guessing off")
        if not 0 < lenience <= 1:
            raise ConfigError(f"lenience = {lenience}: must be above 0, and at most 1, which is exact")
        self.model, self.tokenizer, self.quantization = model, tokenizer, quantization
        self.context = model.cfg.max_seq_len
        weight = model.embedding.weight
        device = weight.device if device is None else device
        if num_blocks is None:
            models = [model, speculative] if isinstance(speculative, Transformer) else [model]
            num_blocks = blocks_that_fit(models, block_size, max_running, device, kv_cache_dtype)
        pool = BlockPool(num_blocks, block_size, prefix_cache=prefix_cache)
        pages = Pages(model.cfg, num_blocks, block_size, weight.dtype, device, kv_cache_dtype)
        self.runner = Runner(model, pages, quantization=quantization, batch_invariant=batch_invariant)
        self.scheduler = Scheduler(
            pool, max_batch_tokens=max_batch_tokens, max_running=max_running, max_waiting=max_waiting
        )
        self.proposer = proposer_of(speculative, self.runner, self.scheduler, kv_cache_dtype, quantization)
        self.num_drafts, self.lenience = num_drafts, lenience
        self.controller: Controller | None = None
        self.listeners: list[Callable[[Step], Any]] = []
        if self.proposer is not None and adaptive:
            self.controller = Controller.of_model(num_drafts, model.cfg, 1 if quantization else weight.element_size())
            self.listeners.append(self.controller)
            self.runner.record = True
        self._propose_s = 0.0
        self.stats = Stats()
        self._groups: dict[str, Group] = {}
        self._named = 0
        self._budget = max_batch_tokens
        self._calm = 0
        self._deltas: list[Delta] = []

    # ------------------------------------------------------------------------------------------------- requests

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        listener: Listener | None = None,
    ) -> str:
        """Takes a request and returns its name.

        Args:
            priority: lower goes first.
            listener: called with each `Delta` of its answers, the last of which has the whole.

        Raises:
            ConfigError: a prompt that is empty, too long, holds ids the model does not have, or is text without a
                tokenizer; settings that do not fit the model; or a request that could never fit into the cache.
            QueueFullError: too many wait already.
        """
        params = params or SamplingParams()
        tokens = self._tokens(prompt)
        self._check(params)
        request_id = request_id or f"request-{self._named}"
        self._named += 1
        if request_id in self._groups:
            raise ConfigError(f"request_id = {request_id!r}: is the name of a request that is not done yet")
        group = Group(request_id, listener, [], [])
        seed = secrets.randbits(63) if params.seed is None else params.seed
        for index in range(params.n):
            group.active.append(self._request(group, index, tokens, params, seed, priority))
        first, *others = group.active
        self.scheduler.add(first)
        for request in others:
            request.number = first.number + request.extra.index
        self._groups[request_id] = group
        group.held = others
        if not self.scheduler.pool.prefix_cache:
            self._release(group)
        return request_id

    def abort(self, request_id: str) -> None:
        """The request's answers end here, with reason "abort"; one that is unknown or done is left alone."""
        group = self._groups.get(request_id)
        for request in [] if group is None else [*group.active]:
            self._finish(request, "abort")

    @contextmanager
    def listening(self, listener: Callable[[Step], Any]) -> Iterator[None]:
        """Inside the block `listener` gets every step, with its routing."""
        before, self.runner.record = self.runner.record, True
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)
            self.runner.record = before

    def abort_all(self) -> None:
        """Every request ends here, with reason "abort"."""
        for request_id in [*self._groups]:
            self.abort(request_id)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle

    def _request(
        self, group: Group, index: int, tokens: list[int], params: SamplingParams, seed: int, priority: int
    ) -> Request:
        """One of the answers to a prompt; all but the first take the prompt's keys and values from the cache."""
        if index:
            params = replace(params, prompt_logprobs=None)
        # The last token of all comes from a full context, and needs no place in it.
        most = self.context + 1
        limit = most if params.max_tokens is None else min(most, len(tokens) + params.max_tokens)
        name = group.id if params.n == 1 else f"{group.id}/{index}"
        eot = set() if self.tokenizer is None or params.ignore_eos else {self.tokenizer.eot_id}
        answer = Answer(group, index, seed + index, self.tokenizer, eot | set(params.stop_token_ids), params.stop)
        return Request(name, len(tokens), [*tokens], params, limit, priority, extra=answer)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("prompt: text needs a tokenizer; make the engine with one, or give ids")
            prompt = self.tokenizer.encode(prompt)
        tokens = [operator.index(i) for i in prompt]
        if not tokens:
            raise ConfigError("prompt = []: must have at least one token")
        self._check_ids("prompt", tokens)
        if len(tokens) > self.context:
            name = self.model.cfg.name
            raise ConfigError(
                f"prompt: the context of {name} is {self.context}, and it has {len(tokens)} tokens; cut it"
            )
        return tokens

    def _check(self, params: SamplingParams) -> None:
        """Against the model and the tokenizer; the rest SamplingParams has checked itself."""
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        if params.stop and self.tokenizer is None:
            raise ConfigError(f"stop = {params.stop!r}: text needs a tokenizer; make the engine with one, or leave out")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.model.cfg.vocab_size:
                raise ConfigError(f"{name} = {getattr(params, name)}: the vocabulary has {self.model.cfg.vocab_size}")

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        vocabulary = self.model.cfg.vocab_size
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise ConfigError(f"{name} has id {wrong}: must be an id of the vocabulary, 0 to {vocabulary - 1}")

    # ----------------------------------------------------------------------------------------------------- a step

    def step(self) -> list[Delta]:
        """One pass of the model; what it adds to the answers, and what was aborted since the last.

        For want of memory a pass gives nothing, and the next ones are of half as many tokens, for a while. A pass that
        fails for another reason, or with a single token, ends its requests with reason "error"; others go on.
        """
        began = time.perf_counter()
        plan = self._plan()
        if plan.works:
            planned = time.perf_counter()
            try:
                logits_NV = self._run(plan.works)
                ran = time.perf_counter()
                choices = choose(plan.works, logits_NV, self.tokenizer, self.lenience)
            except Exception as error:  # nothing is written down yet, so the requests are as they were
                self._fail(plan.works, error)
            else:
                seconds = self._propose_s, planned - began, ran - planned, time.perf_counter() - ran
                blocks = [work.request.blocks for work in plan.works]  # whoever is done gives them back
                self._take(plan.works, choices)
                self._report(plan.works, choices, blocks, seconds)
                self._propose([work.request for work in plan.works if work.samples])
        deltas, self._deltas = self._deltas, []
        return deltas

    def _plan(self) -> StepPlan:
        plan, now = self.scheduler.plan(self._budget), time.perf_counter()
        for request in plan.preempted:
            self._forget(request)
        for work in plan.works:
            work.request.extra.begun = work.request.extra.begun or now
        self.stats.preemptions += len(plan.preempted)
        return plan

    def _run(self, works: Sequence[Work]) -> Tensor:
        """The logits after the `wanted` tokens of each work, [N, V]."""
        segments, rows, row = [], [], 0
        for work in works:
            segments.append(Segment(work.token_ids, work.start, work.request.blocks))
            rows += [row + i for i in chain(*wanted(work))]
            row += work.n
        return self.runner(segments, rows)

    def _take(self, works: Sequence[Work], choices: Sequence[Choice]) -> None:
        """Writes down what a pass has brought."""
        self.stats.steps += 1
        self._calm += 1
        if self._calm % _CALM == 0:
            self._budget = min(2 * self._budget, self.scheduler.max_batch_tokens)
        for work, choice in zip(works, choices, strict=True):
            if not work.request.finish_reason:  # it may have been aborted by who listens
                self._take_one(work, choice)

    def _take_one(self, work: Work, choice: Choice) -> None:
        request, answer, group = work.request, work.request.extra, work.request.extra.group
        if -1 in choice.tokens:
            error = ArithmeticError("the model's logits are no numbers (NaN): look at its weights and their dtype")
            self._end([request], error, spoiled=True)
            return
        self.stats.tokens += work.n
        answer.prompt_logprobs += choice.prompt_logprobs
        if not work.samples:
            self.scheduler.advance(work, [])
            return
        n, text, reason = answer.take(request, choice.tokens)
        self.scheduler.advance(work, choice.tokens[:n])
        self.stats.drafted += work.n_drafts
        self.stats.accepted += len(choice.tokens) - 1
        self.stats.new_tokens += n
        answer.logprobs += choice.logprobs[:n]
        self._release(group)
        logprobs = None if request.params.logprobs is None else choice.logprobs[:n]
        delta = Delta(group.id, answer.index, choice.tokens[:n], text, logprobs)
        if reason:
            self._finish(request, reason, delta)
        else:
            self._deliver(group, delta)

    def _propose(self, requests: Sequence[Request]) -> None:
        """Drafts for the next pass, of requests that are at their newest token."""
        began, self._propose_s = time.perf_counter(), 0.0
        requests = [r for r in requests if not r.finish_reason]
        if self.proposer is None or not requests:
            return
        # The last token of all is never worth a guess: the pass that verifies the others gives it.
        room = [r.limit - len(r.tokens) - 1 for r in requests]
        if self.controller is None:
            counts = [max(0, min(self.num_drafts, n)) for n in room]
        else:
            counts = self.controller.choose(requests, room, self.proposer.behind)
        if not any(counts):
            return
        try:
            proposals = self.proposer.propose(requests, counts)
        except Exception as error:
            if _out_of_memory(error):  # then without
                self.stats.out_of_memory += 1
            else:
                self._end(requests, error)
            return
        for request, proposal in zip(requests, proposals, strict=True):
            request.drafts, request.extra.q_KV = proposal
        self._propose_s = time.perf_counter() - began

    def _report(
        self,
        works: Sequence[Work],
        choices: Sequence[Choice],
        blocks: Sequence[Sequence[int]],
        seconds: tuple[float, float, float, float],
    ) -> None:
        if self.listeners:
            accepted = [max(0, len(choice.tokens) - 1) for choice in choices]
            step = Step(self.stats.steps, works, accepted, *seconds, self.runner.routing, blocks)
            for listener in self.listeners:
                listener(step)

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        """For want of memory the next passes are of half as many tokens; else this one's requests end."""
        n_tokens = sum(work.n for work in works)
        if _out_of_memory(error):
            self.stats.out_of_memory += 1
            if n_tokens > 1:
                self._budget, self._calm = n_tokens // 2, 0
                return
        self._end([work.request for work in works], error)

    def _end(self, requests: Sequence[Request], error: Exception, spoiled: bool = False) -> None:
        """These end with an error, and with each all answers to its prompt.

        Args:
            spoiled: their keys and values may be no numbers, and are not to be met with by who has the blocks next.
        """
        for group in {request.extra.group for request in requests}:
            for request in [*group.active]:
                if spoiled:
                    self.runner.pages.wipe(self.scheduler.pool.discard(request.blocks))
                self._finish(request, "error", error=error)

    def _release(self, group: Group) -> None:
        """The prompt is computed: the other answers to it begin."""
        for request in group.held:
            self.scheduler.add(request)
        group.held = []

    def _finish(
        self, request: Request, reason: FinishReason, delta: Delta | None = None, error: Exception | None = None
    ) -> None:
        if request.finish_reason:  # who listens to another answer's end has aborted this one
            return
        answer = request.extra
        request.finish_reason = reason
        self.scheduler.finish(request)
        self._forget(request)
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        delta = delta or Delta(answer.group.id, answer.index, [], "", None if request.params.logprobs is None else [])
        text = delta.text + answer.finish()
        whole = answer.group.finish(request, answer.output(request, error))
        if whole is not None:
            del self._groups[whole.id]
        self._deliver(answer.group, delta._replace(text=text, finish_reason=reason, output=whole))

    def _forget(self, request: Request) -> None:
        if self.proposer is not None:
            self.proposer.forget(request)

    def _deliver(self, group: Group, delta: Delta) -> None:
        self._deltas.append(delta)
        if group.listener is not None:
            group.listener(delta)

    # -------------------------------------------------------------------------------------------------- answers

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """The answers to the prompts, in their order; of `n` to one prompt the first, which has the others.

        Args:
            params: for all, or one for each.

        Raises:
            ConfigError, QueueFullError: see `add`; none of the prompts is answered then.
            ServeError: a pass failed.
        """
        one = isinstance(prompts, str) or (isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], int))
        every: list[Prompt] = [prompts] if one else list(prompts)  # type: ignore[list-item,arg-type]
        settings = [params] * len(every) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(settings) != len(every):
            raise ConfigError(f"params: {len(settings)} for {len(every)} prompts; give one for each, or one for all")
        names: list[str] = []
        done: dict[str, Output] = {}
        deltas: deque[Delta] = deque()
        try:
            for prompt, p in zip(every, settings, strict=True):
                names.append(self.add(prompt, p, listener=deltas.append))
            while len(done) < len(names):
                self.step()
                outputs = [delta.output for delta in deltas if delta.output]
                deltas.clear()
                check_served(outputs)
                done |= {output.id: output for output in outputs}
        finally:
            for name in names:
                self.abort(name)
        return [done[name] for name in names]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """The answers to one prompt as they grow; others that were added grow with them. Closed early, it aborts.

        Raises:
            ConfigError, QueueFullError: see `add`.
            ServeError: a pass failed.
        """
        deltas: deque[Delta] = deque()
        name = self.add(prompt, params, listener=deltas.append)
        try:
            while True:
                while deltas:
                    delta = deltas.popleft()
                    check_served([delta.output] if delta.output else [])
                    yield delta
                    if delta.output:
                        return
                self.step()
        finally:
            self.abort(name)


def check_served(outputs: Iterable[Output]) -> None:
    """Raises ServeError where an answer ended with an error."""
    for output in outputs:
        for one in output.outputs:
            if one.error is not None:
                raise ServeError(f"{one.id}: {type(one.error).__name__}: {one.error}") from one.error


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
