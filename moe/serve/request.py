"""What is asked of the engine, and what becomes of it: sampling settings, and a request with its state. No torch."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe.errors import ConfigError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends. Names and meanings are those of vLLM and of OpenAI's API.

    Attributes:
        max_tokens: new tokens at most; None: as many as the context holds.
        min_tokens: before so many new tokens, neither an end token nor a stop string ends the text.
        n: how many answers to the same prompt.
        temperature: divides the logits; 0: the most likely token, whatever the next four say.
        top_k: choose among the k most likely; 0: among all.
        top_p: among the most likely that together have this probability.
        min_p: among those at least this fraction as likely as the most likely.
        repetition_penalty: logits of tokens in the prompt or the answer are divided by it where positive, else
            multiplied (Keskar et al. 2019).
        presence_penalty: taken off the logit of a token that the answer holds; frequency_penalty: for each time.
        logit_bias: token id -> number added to its logit.
        seed: of this request's own random numbers: the same seed gives the same tokens in any batch. None: unseeded.
        stop: strings that end the text, and are not part of it.
        stop_token_ids: tokens that end it, besides the tokenizer's end-of-text.
        ignore_eos: end-of-text does not end it.
        logprobs: give the log-probability of each new token, and of so many of the most likely; None: none.
        prompt_logprobs: the same for the tokens of the prompt.

    Raises:
        ConfigError: a value out of range; the message names the field.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        most = math.inf if self.max_tokens is None else self.max_tokens
        for name, ok, rule in (
            ("max_tokens", most >= 1, "must be 1 or more, or None for all that the context holds"),
            ("min_tokens", 0 <= self.min_tokens <= most, "must be between 0 and max_tokens"),
            ("n", self.n >= 1, "must be 1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "must be 0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "must be in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "must be above 0; 1 changes nothing"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "must be between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "must be between -2 and 2"),
            ("logit_bias", all(-100 <= b <= 100 for b in self.logit_bias.values()), "must be between -100 and 100"),
            ("stop", "" not in self.stop, "an empty string would end every text before it begins; leave it out"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "must be 0 or more, or None for none"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "must be 0 or more, or None for none"),
        ):
            if not ok:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: {rule}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a random number."""
        return self.temperature == 0


@dataclass(eq=False, slots=True)
class Request:
    """One answer in the making.

    `tokens` are the prompt and what has been accepted; `drafts` are guesses at what follows, which the next pass
    verifies; of both, the keys and values of the first `computed` are in the cache, in `blocks`.

    Attributes:
        priority: lower goes first; of equals, who came first.
        limit: tokens at most, prompt included.
        salt: what else than the tokens determines keys and values (an image's bytes): part of the prefix cache's key.
    """

    id: str
    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    limit: int
    priority: int = 0
    salt: bytes = b""
    number: int = -1  # in order of arrival; given by the scheduler
    drafts: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, as far as they were needed
    remembered: int = 0  # blocks that the prefix cache knows
    cached_tokens: int = 0  # found in the prefix cache when it was first admitted
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    extra: Any = None  # the engine's own: times, text, log-probabilities

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts requests: the first is served first, the last preempted first."""
        return self.priority, self.number

    @property
    def output(self) -> list[int]:
        """The new tokens."""
        return self.tokens[self.prompt_length :]

    @property
    def reusable(self) -> bool:
        """Whether a cached prefix may stand for its own: not where every position's logits are asked for."""
        return self.params.prompt_logprobs is None
