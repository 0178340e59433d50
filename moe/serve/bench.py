"""Latency, throughput and utilisation of an engine, measured, beside what the planner says of the same machine.

`latency`: so many requests begin together, and nothing else runs. `throughput`: many requests, of which so many run
together. `serve`: requests arrive by chance (Poisson), at a rate. Prompts are random ids, and every answer has the
length that was asked for, so that a model's training does not matter to its speed. A request's clock starts when it
arrives, whether or not the engine looks at that moment; TPOT = (E2E - TTFT) / (n - 1), as vLLM's benchmark has it.
"""

import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe.errors import ConfigError
from moe.model import Transformer
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.load import under_load
from moe.plan.quantities import Sheet
from moe.plan.serving import decode
from moe.plan.shape import shape_of
from moe.serve.blocks import BLOCK_SIZE, blocks_for
from moe.serve.engine import Engine, check_served
from moe.serve.request import SamplingParams
from moe.serve.roofline import DTYPES, Pass, watch

Row = dict[str, Any]

# ------------------------------------------------------------------------------------------------------- the workload


@dataclass(frozen=True)
class Workload:
    """Requests that a benchmark makes.

    Attributes:
        kind: "random": every prompt is its own; "prefix-repetition": prompts share beginnings, as with one system
            message for many users.
        input_len, output_len: tokens of a prompt and of an answer.
        spread: both are drawn evenly from that share below to that share above.
        prefixes, prefix_len: how many different beginnings there are, and their tokens, part of `input_len`.

    Raises:
        ConfigError: a number out of range; the message names it.
    """

    kind: Literal["random", "prefix-repetition"] = "random"
    input_len: int = 32
    output_len: int = 16
    spread: float = 0.0
    prefixes: int = 4
    prefix_len: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        shared = self.kind == "prefix-repetition"
        for name, ok, rule in (
            ("kind", self.kind in ("random", "prefix-repetition"), 'must be "random" or "prefix-repetition"'),
            ("input_len", self.input_len >= 1, "must be 1 or more"),
            ("output_len", self.output_len >= 2, "must be 2 or more: there is no time between fewer tokens"),
            ("spread", 0 <= self.spread < 1, "must be in [0, 1)"),
            ("prefixes", self.prefixes >= 1, "must be 1 or more"),
            ("prefix_len", not shared or 1 <= self.prefix_len < self.shortest, "must be below the shortest prompt"),
        ):
            if not ok:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: {rule}")

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return max(1, math.ceil(self.input_len * (1 - self.spread)))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return math.floor(self.input_len * (1 + self.spread)) + math.floor(self.output_len * (1 + self.spread))

    def jobs(self, n: int, vocab_size: int) -> "list[Job]":
        """`n` requests; the same for the same seed."""
        rng = random.Random(self.seed)

        def ids(length: int) -> list[int]:
            return [rng.randrange(vocab_size) for _ in range(length)]

        def length(mean: int, least: int) -> int:
            return rng.randint(max(least, math.ceil(mean * (1 - self.spread))), math.floor(mean * (1 + self.spread)))

        shared = self.kind == "prefix-repetition"
        beginnings = [ids(self.prefix_len) for _ in range(self.prefixes)] if shared else [[]]
        found = []
        for i in range(n):
            begin = beginnings[i % len(beginnings)]
            prompt = [*begin, *ids(length(self.input_len, 1) - len(begin))]
            found.append(Job(prompt, length(self.output_len, 2)))
        return found


@dataclass(frozen=True)
class Job:
    """A request of a benchmark."""

    prompt: list[int]
    output_len: int


# ----------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Answer:
    """How long a request took, in seconds from its arrival."""

    tokens: int
    prompt: int
    cached: int
    ttft: float
    e2e: float

    @property
    def tpot(self) -> float:
        """Between tokens after the first."""
        return (self.e2e - self.ttft) / (self.tokens - 1)


@dataclass(frozen=True)
class Limits:
    """What a user is promised, in milliseconds; None: nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met(self, answer: Answer) -> bool:
        """Whether a request counts into the goodput."""
        pairs = ((answer.ttft, self.ttft_ms), (answer.tpot, self.tpot_ms))
        return all(limit is None or 1e3 * seconds <= limit for seconds, limit in pairs)


@dataclass
class Run:
    """What one run of requests gave."""

    seconds: float
    answers: list[Answer]
    passes: list[Pass]


def drive(engine: Engine, jobs: Sequence[Job], arrivals: Sequence[float]) -> tuple[float, list[Answer]]:
    """Gives the engine each job when its time has come; (seconds until the last is done, the answers in order).

    Args:
        arrivals: seconds from the beginning, rising.

    Raises:
        ServeError: a pass failed.
    """
    names: dict[str, int] = {}
    first: dict[int, float] = {}
    found: dict[int, Answer] = {}
    start, added = time.perf_counter(), 0
    while len(found) < len(jobs):
        now = time.perf_counter() - start
        while added < len(jobs) and arrivals[added] <= now:
            job = jobs[added]
            params = SamplingParams(max_tokens=job.output_len, temperature=0, ignore_eos=True)
            names[engine.add(job.prompt, params)] = added
            added += 1
        if engine.idle:
            time.sleep(max(0.0, arrivals[added] - now))
            continue
        deltas = engine.step()
        now = time.perf_counter() - start
        for delta in deltas:
            i = names[delta.request_id]
            first.setdefault(i, now)
            if delta.output is not None:
                check_served([delta.output])
                n, prompt, cached = len(delta.output.token_ids), len(jobs[i].prompt), delta.output.cached_tokens
                found[i] = Answer(n, prompt, cached, first[i] - arrivals[i], now - arrivals[i])
    return time.perf_counter() - start, [found[i] for i in range(len(jobs))]


def poisson(n: int, rate: float, seed: int = 0) -> list[float]:
    """The times at which `n` requests arrive, at `rate` a second on average, each by itself."""
    rng, now, found = random.Random(seed), 0.0, []
    for _ in range(n):
        now += rng.expovariate(rate)
        found.append(now)
    return found


# --------------------------------------------------------------------------------------------------------- benchmarks


class Bench:
    """Measures one model on one machine.

    Args:
        machine: `moe.serve.roofline.machine`, against which utilisation and rooflines are taken.
        settings: of the engine, beside `max_running` and `num_blocks`.

    Attributes:
        passes: a row for each pass of the model, by the number of the row that it belongs to.
        plan_rows: the same for `moe plan calibrate`. reports: what speculation's controllers found.

    Raises:
        ConfigError: a workload that is longer than the model's context.
    """

    def __init__(self, model: Transformer, machine: Hardware, workload: Workload, **settings: Any) -> None:
        self.model, self.machine, self.workload, self.settings = model, machine, workload, settings
        context = model.cfg.max_seq_len
        if workload.longest > context:
            raise ConfigError(
                f"input_len = {workload.input_len}, output_len = {workload.output_len}: make up to {workload.longest} "
                f"tokens, and the context of {model.cfg.name} is {context}; lower one of them"
            )
        self.shape = shape_of(model.cfg)
        self.layout = Layout(weights=self.dtype, kv_cache=self.dtype)
        self.passes: list[Row] = []
        self.plan_rows: list[dict[str, Any]] = []
        self._runs = 0
        self.reports: list[str] = []

    @property
    def dtype(self) -> str:
        """Of the weights, as the planner calls it."""
        dtype = self.model.embedding.weight.dtype
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype}: the planner knows {', '.join(DTYPES.values())}")
        return DTYPES[dtype]

    def latency(self, batches: Sequence[int], rounds: int = 3) -> Iterator[Row]:
        """A row for each batch size: so many requests begin together and end together."""
        for batch in batches:
            engine = self._engine(batch)
            run = self._run(engine, [(self._jobs(batch, i), [0.0] * batch) for i in range(rounds)])
            plan = decode(self.shape, self.layout, self.machine, batch=batch, context=self._context, collectives=False)
            yield {"batch": batch, **self._row(run), **_planned(plan, "decode")}

    def throughput(self, batches: Sequence[int], requests: int) -> Iterator[Row]:
        """A row for each number of requests that run together at most: all are there from the beginning."""
        for batch in batches:
            run = self._run(self._engine(batch), [(self._jobs(requests), [0.0] * requests)])
            yield {"batch": batch, **self._row(run), **_planned(self._loaded(1e9, batch), "load")}

    def serve(self, rates: Sequence[float], requests: int, max_running: int, limits: Limits) -> Iterator[Row]:
        """A row for each rate of requests a second."""
        for rate in rates:
            arrivals = poisson(requests, rate, self.workload.seed)
            run = self._run(self._engine(max_running), [(self._jobs(requests), arrivals)])
            good = sum(map(limits.met, run.answers)) / run.seconds
            yield {"rate": rate, **self._row(run), "goodput": good, **_planned(self._loaded(rate, max_running), "load")}

    # ------------------------------------------------------------------------------------------------------- parts

    def _loaded(self, rate: float, max_running: int) -> Sheet:
        w = self.workload
        return under_load(
            self.shape, self.layout, self.machine, rate=rate, prompt=w.input_len, output=w.output_len,
            max_running=max_running,
        )  # fmt: skip

    @property
    def _context(self) -> int:
        return self.workload.input_len + self.workload.output_len // 2

    def _jobs(self, n: int, more: int = 0) -> list[Job]:
        return replace(self.workload, seed=self.workload.seed + more).jobs(n, self.model.cfg.vocab_size)

    def _engine(self, max_running: int) -> Engine:
        """With the blocks that so many of the longest requests need."""
        blocks = max_running * blocks_for(self.workload.longest, self.settings.get("block_size", BLOCK_SIZE))
        return Engine(self.model, max_running=max_running, num_blocks=blocks, **self.settings)

    def _run(self, engine: Engine, parts: Sequence[tuple[list[Job], list[float]]]) -> Run:
        """One after the other, after a few tokens that do not count."""
        warm = self._jobs(min(engine.scheduler.max_running, 4), more=-1)
        drive(engine, [Job(job.prompt, 2) for job in warm], [0.0] * len(warm))
        seconds, answers = 0.0, []
        with watch(engine, self.machine) as roofline:
            for jobs, arrivals in parts:
                took, found = drive(engine, jobs, arrivals)
                seconds, answers = seconds + took, answers + found
        self.passes += [{"row": self._runs, **p.as_dict()} for p in roofline.passes()]
        self.plan_rows += roofline.plan_rows()
        self._runs += 1
        if engine.controller is not None:
            self.reports.append(engine.controller.report())
        return Run(seconds, answers, roofline.passes())

    def _row(self, run: Run) -> Row:
        """The measured figures: times in milliseconds, rates a second, shares of 1."""
        tokens = sum(a.tokens for a in run.answers)
        prompts = sum(a.prompt for a in run.answers)
        flop = sum(p.load.flop for p in run.passes)
        peak = self.machine.peak(self.machine.compute_dtype(self.dtype)).to("FLOP/s")
        row: Row = {"requests": len(run.answers), "running": statistics.fmean(p.requests for p in run.passes)}
        for name, values in (
            ("ttft", [a.ttft for a in run.answers]),
            ("tpot", [a.tpot for a in run.answers]),
            ("e2e", [a.e2e for a in run.answers]),
        ):
            row |= {f"{name}_ms": 1e3 * statistics.median(values), f"{name}_p99_ms": 1e3 * percentile(values, 0.99)}
        model_s, host_s = sum(p.seconds for p in run.passes), sum(p.host_seconds for p in run.passes)
        return {
            **row,
            "throughput": tokens / run.seconds,
            "total_throughput": (tokens + prompts) / run.seconds,
            "utilisation": flop / (run.seconds * peak),
            "roofline": sum(p.floor for p in run.passes) / model_s,
            "host": host_s / (host_s + model_s),
            "cached": sum(a.cached for a in run.answers) / prompts,
            "experts": statistics.fmean(p.experts for p in run.passes),
            "experts_expected": statistics.fmean(p.experts_expected for p in run.passes),
            "experts_most": statistics.fmean(p.experts_most for p in run.passes),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that so many of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _planned(sheet: Sheet, key: str) -> Row:
    """The planner's three axes."""
    return {
        "plan_tpot_ms": sheet[f"{key}.latency"].to("ms"),
        "plan_throughput": sheet[f"{key}.throughput"].to("token/s"),
        "plan_utilisation": sheet[f"{key}.utilisation"].to("x"),
    }
