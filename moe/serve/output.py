"""What comes out of the engine: answers, the pieces that each step adds to them, and an answer in the making."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from moe.serve.detokenize import TextStream
from moe.serve.logprobs import Logprobs
from moe.serve.request import FinishReason, Request
from moe.tokenizer import Tokenizer


@dataclass(slots=True)
class Output:
    """An answer.

    Attributes:
        index: which of the `n` answers to its prompt.
        text: without the stop string or end token; empty where the engine has no tokenizer.
        logprobs: for each of token_ids. prompt_logprobs: for each of prompt_token_ids, but nothing for the first.
        cached_tokens: of the prompt, whose keys and values were there already.
        queue_s, ttft_s, tpot_s: seconds until the first pass, until the first token, and between tokens after it.
        siblings: the other answers to the prompt, on the first; `outputs` has them all.
        error: why there is no more of it, where finish_reason is "error".
    """

    id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    siblings: list["Output"] = field(default_factory=list)
    error: Exception | None = None

    @property
    def outputs(self) -> list["Output"]:
        """All `n` answers, this one first."""
        return [self, *self.siblings]


class Delta(NamedTuple):
    """What one step added to an answer: joined, the deltas' `token_ids` and `text` are the answer's.

    `text` may lag behind `token_ids`, where a character is not complete or a stop string may have begun.
    `finish_reason`, with the last. `output`, with the last of a prompt's last answer: the whole.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    output: Output | None = None


Listener = Callable[[Delta], Any]


@dataclass(eq=False, slots=True)
class Group:
    """The answers to one prompt."""

    id: str
    listener: Listener | None
    active: list[Request]  # those not done yet
    held: list[Request]  # of them, those that begin once the first has computed the prompt
    done: list[Output] = field(default_factory=list)

    def finish(self, request: Request, output: Output) -> Output | None:
        """One is done; the whole, once all are."""
        self.active.remove(request)
        self.done.append(output)
        if self.active:
            return None
        first, *others = sorted(self.done, key=lambda one: one.index)
        first.siblings = others
        return first


class Answer:
    """An answer in the making: what the engine keeps of a request, beside its tokens.

    Attributes:
        seed: of its random numbers. ends: ids that end it. stops: strings that do.
        prompt_logprobs: as far as the prompt is scored.
    """

    def __init__(
        self, group: Group, index: int, seed: int, tokenizer: Tokenizer | None, ends: set[int], stops: Sequence[str]
    ) -> None:
        self.group, self.index, self.seed, self.ends = group, index, seed, ends
        self._stream = None if tokenizer is None else TextStream(tokenizer, stops, ())
        self.text = ""
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs | None] = [None]
        self.q_KV: Tensor | None = None  # what the request's drafts were drawn from
        self.added = time.perf_counter()
        self.begun = self.first = self.last = 0.0

    @property
    def n_scored(self) -> int:
        """Positions of the prompt whose next token has its log-probability."""
        return len(self.prompt_logprobs) - 1

    def take(self, request: Request, tokens: Sequence[int]) -> tuple[int, str, FinishReason | None]:
        """New tokens, up to the end: how many they are, the text that may be shown now, and why it ends, if it does."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        text, length = "", len(request.tokens)
        for n, token in enumerate(tokens, 1):
            may_end = length + n - request.prompt_length > request.params.min_tokens
            reason: FinishReason | None = "length" if length + n == request.limit else None
            if may_end and token in self.ends:
                reason = "stop"
            elif self._stream is not None:
                text += self._stream.push(token, may_end)
                reason = "stop" if self._stream.done else reason
            if reason:
                tokens = tokens[:n]
                break
        else:
            reason = None
        self.text += text
        return len(tokens), text, reason

    def finish(self) -> str:
        """No more tokens come: the text that was held back."""
        text = "" if self._stream is None else self._stream.finish()
        self.text += text
        return text

    def output(self, request: Request, error: Exception | None = None) -> Output:
        """What it has become."""
        p, answer = request.params, request.output
        between = (self.last - self.first) / (len(answer) - 1) if len(answer) > 1 else 0.0
        return Output(
            id=self.group.id,
            index=self.index,
            prompt_token_ids=request.tokens[: request.prompt_length],
            token_ids=answer,
            text=self.text,
            finish_reason=request.finish_reason or "abort",
            logprobs=None if p.logprobs is None else self.logprobs,
            prompt_logprobs=None if p.prompt_logprobs is None else self.prompt_logprobs,
            cached_tokens=request.cached_tokens,
            preemptions=request.preemptions,
            queue_s=max(0.0, self.begun - self.added),
            ttft_s=max(0.0, self.first - self.added),
            tpot_s=between,
            error=error,
        )
