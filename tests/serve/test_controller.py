"""The controller against simulated machines: what it loses where guessing loses, and what it misses where it helps."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest

from moe import Transformer
from moe.serve.controller import Controller, Observed
from moe.serve.draft import DraftModel
from moe.serve.engine import Engine
from moe.serve.request import SamplingParams
from moe.serve.step import Step
from tests.conftest import tiny_config

K = 8


@dataclass
class Machine:
    """Seconds and luck by formulas that the controller does not know; noise as of a machine that others use, too."""

    rates: tuple[float, ...]  # of acceptance, at each position that was reached
    fixed: float = 1.0  # milliseconds
    expert: float = 1.0
    token: float = 0.02
    draft_pass: float = 0.3
    draft_token: float = 0.01
    n_experts: int = 16
    top_k: int = 2
    noise: float = 0.05
    offered: float = 1.0
    seed: int = 0

    def experts(self, n_tokens: float) -> float:
        # Fewer than independent tokens would touch: they are of one text.
        return self.n_experts * (1 - (1 - self.top_k / self.n_experts) ** (0.8 * n_tokens + 0.2))

    def seconds(self, n: int, drafted: float) -> float:
        tokens = n + drafted
        return (self.fixed + self.expert * self.experts(tokens) + self.token * tokens) / 1e3

    def guessing(self, k: int, tokens: float) -> float:
        return (self.draft_pass * k + self.draft_token * tokens) / 1e3 if k else 0.0

    def gain(self, k: int) -> float:
        share, total = self.offered, 0.0
        for rate in self.rates[:k]:
            share *= rate
            total += share
        return total

    def rate(self, n: int, k: int) -> float:
        """Tokens per second, exactly, of a fixed number of drafts."""
        return n * (1 + self.gain(k)) / (self.seconds(n, n * k * self.offered) + self.guessing(k, n * k))

    def best(self, n: int) -> tuple[int, float]:
        return max(((k, self.rate(n, k)) for k in range(K + 1)), key=lambda pair: pair[1])

    def run(
        self, n: int, steps: int, controller: Controller | None = None
    ) -> tuple[float, float, Controller, list[int]]:
        """Expected tokens and seconds of so many steps (without the noise that is seen), and what was chosen."""
        rng = random.Random(self.seed)
        controller = controller or Controller(K, self.n_experts, self.top_k, 1000)
        behind, tokens, total, chosen = [40] * n, 0.0, 0.0, []
        for step in range(steps):
            counts = controller.choose(range(n), [1000] * n, behind.__getitem__)
            chosen.append(max(counts))
            drafted = [k if rng.random() < self.offered else 0 for k in counts]
            accepted = []
            for k in drafted:
                right = 0
                while right < k and rng.random() < self.rates[right]:
                    right += 1
                accepted.append(right)
            draft_tokens = sum(b + k - 1 for b, k in zip(behind, counts, strict=True) if k)
            seconds, guessing = self.seconds(n, sum(drafted)), self.guessing(max(counts), draft_tokens)
            tokens += sum(1 + self.gain(k) for k in counts)
            total += seconds + guessing
            behind = [
                1 + (right == k) if k else b + 1 + right for b, k, right in zip(behind, counts, accepted, strict=True)
            ]
            luck = [max(0.5, rng.gauss(1, self.noise)) for _ in range(2)]
            # What a busy machine does now and then.
            luck[0] *= 5 if rng.random() < 0.01 else 1
            touched = self.experts(n + sum(drafted)) if step % 4 == 0 else None
            controller.learn(
                Observed(
                    counts, drafted, accepted, seconds * luck[0], guessing * luck[1], draft_tokens, 0, 100 * n, touched
                )
            )
        return tokens, total, controller, chosen


LOSING = {
    "a random draft": Machine((0.02,) * K),
    "a fair draft, dear experts": Machine((0.35,) * K, fixed=0.1),
    "a good draft that takes long": Machine((0.7,) * K, draft_pass=6.0),
    "a text that seldom repeats": Machine((0.3,) * K, draft_pass=0.0, draft_token=0.0, offered=0.1),
}
WINNING = {
    "a good draft": Machine((0.9,) * K, fixed=4.0),
    "good at first": Machine((0.95, 0.9, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1), fixed=3.0),
    "a dense model": Machine((0.8,) * K, n_experts=1, top_k=1, expert=10.0),
    "a text that repeats": Machine((0.9,) * K, fixed=3.0, draft_pass=0.0, draft_token=0.0, offered=0.8),
}


@pytest.mark.parametrize(
    ("machine", "n"),
    [
        pytest.param(machine, n, id=f"{name}-{n}")
        for name, machine in LOSING.items()
        for n in (1, 8, 64)
        if machine.best(n)[0] == 0  # at others guessing helps
    ],
)
def test_where_guessing_loses_it_costs_two_percent_in_all(machine: Machine, n: int) -> None:
    tokens, seconds, controller, _ = machine.run(n, 1000)
    assert tokens / seconds >= 0.98 * machine.rate(n, 0)
    assert "will not help here" in controller.report()


@pytest.mark.parametrize("n", [1, 8, 64])
@pytest.mark.parametrize("machine", WINNING.values(), ids=WINNING)
def test_where_guessing_helps_it_comes_within_ten_percent_of_the_best_number(machine: Machine, n: int) -> None:
    best, rate = machine.best(n)
    tokens, seconds, controller, _ = machine.run(n, 1000)
    assert tokens / seconds >= 0.9 * rate, (best, controller.report())


def test_one_rate_for_all_positions_would_promise_more() -> None:
    """The second machine's first draft is nearly always right and its third seldom: the curve says so."""
    machine = WINNING["good at first"]
    _, _, controller, _ = machine.run(8, 600)
    rows = controller.rows(8)
    gains = [b.accepted - a.accepted for a, b in pairwise(rows)]
    assert gains[:3] == pytest.approx([0.95, 0.95 * 0.9, 0.95 * 0.9 * 0.3], abs=0.08)


def test_it_knows_the_experts_and_the_bytes() -> None:
    machine = LOSING["a random draft"]
    _, _, controller, _ = machine.run(1, 400)
    rows = controller.rows(1)
    for row in (rows[0], rows[4]):
        assert row.experts == pytest.approx(machine.experts(1 + row.drafts), rel=0.15)
        assert row.seconds == pytest.approx(
            machine.seconds(1, row.drafts) + machine.guessing(row.drafts, row.drafts), rel=0.2
        )
    report = controller.report()
    assert report.startswith("1 request, ")
    assert "2.0 " in report or "1.9 " in report  # experts of one token


def test_it_follows_when_the_text_changes() -> None:
    poor, good = Machine((0.02,) * K, fixed=4.0), Machine((0.9,) * K, fixed=4.0)
    _, _, controller, chosen = poor.run(8, 300)
    assert sum(k == 0 for k in chosen[-50:]) >= 40
    _, _, controller, chosen = good.run(8, 600, controller)
    assert sorted(chosen[-50:])[10] >= 4
    _, _, controller, chosen = poor.run(8, 100, controller)
    assert sum(k == 0 for k in chosen[-50:]) >= 40


# ------------------------------------------------------------------------------------------------- within the engine


class Clock:
    """Stands between the engine and its controller, and gives each step the seconds of a formula."""

    def __init__(self, engine: Engine, seconds: Callable[[Step], float], guessing: float) -> None:
        assert engine.controller is not None
        self.controller, self.seconds, self.guessing = engine.controller, seconds, guessing
        self.steps: list[Step] = []
        engine.listeners[engine.listeners.index(engine.controller)] = self

    def __call__(self, step: Step) -> None:
        self.steps.append(step)
        drafts = max(step.drafted)
        self.controller(
            replace(step, schedule_s=0.0, sample_s=0.0, forward_s=self.seconds(step), propose_s=drafts * self.guessing)
        )


def serve(engine: Engine) -> None:
    p = SamplingParams(temperature=0, max_tokens=20)
    engine.generate([[i % 61, i % 7, 3] for i in range(60)], [p] * 60)


def test_the_engine_stops_guessing_where_it_does_not_help() -> None:
    target = Transformer(tiny_config(), seed=3)
    engine = Engine(target, max_running=4, speculative=Transformer(tiny_config(n_layers=1), seed=9))
    clock = Clock(engine, lambda step: 1e-3 * step.n_tokens, 1e-3)
    proposer = engine.proposer
    assert isinstance(proposer, DraftModel)
    calls, runner = [], proposer.runner

    def counted(*arguments: Any) -> Any:
        calls.append(engine.stats.steps)
        return runner(*arguments)

    proposer.runner = counted  # type: ignore[assignment]
    serve(engine)
    assert engine.stats.accepted < 0.2 * engine.stats.drafted
    late = [n for n in calls if n > engine.stats.steps // 2]
    # A draft model that is not asked does not run, nor keep up: a try or two.
    assert len(set(late)) <= engine.stats.steps // 20
    assert sum(sum(step.drafted) for step in clock.steps[len(clock.steps) // 2 :]) <= 20
    assert "Speculation will not help here" in engine.controller.report()  # type: ignore[union-attr]


def test_the_engine_guesses_where_it_helps() -> None:
    target = Transformer(tiny_config(), seed=3)
    engine = Engine(target, max_running=4, speculative=target, num_drafts=4)
    clock = Clock(engine, lambda step: 1e-3, 1e-5)
    serve(engine)
    decoding = [
        w for step in clock.steps[len(clock.steps) // 2 :] for w in step.works if w.samples and w.n == 1 + w.n_drafts
    ]
    # All but what the end of an answer cuts off.
    assert sum(w.n_drafts for w in decoding) / len(decoding) > 3
    assert "Speculation helps" in engine.controller.report()  # type: ignore[union-attr]


def test_prompt_lookup_is_chosen_from_its_own_curve() -> None:
    """A draft that is not there costs nothing, and brings nothing."""
    target = Transformer(tiny_config(), seed=3)
    engine = Engine(target, max_running=4, speculative="ngram")
    Clock(engine, lambda step: 1e-3 * (1 + 0.01 * step.n_tokens), 0.0)
    serve(engine)
    assert engine.stats.drafted > 0
    assert engine.controller is not None
    assert engine.controller.rows(4)[4].accepted < 4
