"""How many tokens to guess ahead, from what guessing has brought and cost: 0 where it does not help.

Verifying k drafts of n requests is a pass of n (1 + k) tokens. In a mixture of experts each of them may need experts
that no other token of the pass does, so a draft costs bytes, also where nothing else would have been read; published
measurements find that a fixed number of drafts loses there. What is weighed, for each batch size:

    tokens per second of k drafts = n (1 + S_1 + ... + S_k) / seconds(n, k)

S_i, the share of requests whose first i drafts are accepted, is measured at each position: one rate for all positions
promises more than there is. Seconds are a linear model of the pass (a fixed part, experts touched, tokens, positions
seen) and of the guessing (its passes and tokens), corrected by what each number of drafts has really taken. How many
experts so many tokens touch is measured, too; where it is not yet, E (1 - (1 - K/E)^T) is expected.

What is not the best choice is tried on a budget: four steps and half a percent of the time. No torch, and no clock.
"""

import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe.config import Config

if TYPE_CHECKING:
    from moe.serve.step import Step

SHARE = 0.005  # of the time, for trying what does not seem best
GRANT = 4  # steps that trying may cost besides, once
EVERY = 3  # steps from one try to the next, at least
MEMORY, LEAST = 0.99, 0.88  # what acceptance counts one request later, and at least one step later
REFRESH = 8  # steps for which a comparison is kept; of so many alike, one is looked at closely


class Observed(NamedTuple):
    """One pass: its `asked` and following lists are of the requests that were at their newest token.

    asked: drafts that were asked for. drafted: drafts that there were. accepted: of those.
    other_tokens: of the pass, parts of prompts. context: positions that all tokens saw.
    draft_tokens: that the proposer had computed. experts: distinct ones that were touched, the mean of the layers.
    """

    asked: Sequence[int]
    drafted: Sequence[int]
    accepted: Sequence[int]
    seconds: float
    draft_seconds: float = 0.0
    draft_tokens: int = 0
    other_tokens: int = 0
    context: int = 0
    experts: float | None = None


class Row(NamedTuple):
    """What is known of one number of drafts at one batch size.

    accepted: expected of them, per request and step. experts: that a layer touches. seconds: of a step, guessing
    included. rate: tokens per second.
    """

    drafts: int
    accepted: float
    experts: float
    seconds: float
    rate: float


# ------------------------------------------------------------------------------------------------------------- parts


class _Curve:
    """Of the requests that were asked for i drafts or more: how many had i, and how many had their first i accepted."""

    # Lists, here and below: of so few numbers an operation of numpy takes longer than all of Python's.
    def __init__(self, n: int) -> None:
        self.asked, self.there, self.reached, self.accepted = ([0.0] * n for _ in range(4))

    def add(self, step: "_Curve") -> None:
        kept = max(LEAST, MEMORY ** max(step.asked))
        for mine, new in zip(self._counts, step._counts, strict=True):
            mine[:] = [kept * m + n for m, n in zip(mine, new, strict=True)]

    @classmethod
    def of(cls, n: int, asked: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]) -> "_Curve":
        """Of one step."""
        step = cls(n)
        for (want, had, right), times in Counter(zip(asked, drafted, accepted, strict=True)).items():
            for counts, end in zip(step._counts, (want, had, right + 1, right), strict=True):
                for i in range(min(n, want, end)):
                    counts[i] += times
        return step

    @property
    def _counts(self) -> tuple[list[float], ...]:
        return self.asked, self.there, self.reached, self.accepted

    def rates(self, prior: "list[float] | None" = None) -> list[float]:
        """For each position, of the requests that got there, the part that was accepted.

        Where little is known it is the prior's; without one, of the first position 0, and of another 4/5 of the one
        before: nobody is promised anything.
        """
        found: list[float] = []
        weight = 1.0 if prior is None else 4.0
        for i, (reached, accepted) in enumerate(zip(self.reached, self.accepted, strict=True)):
            expected = prior[i] if prior is not None else 0.8 * found[-1] if found else 0.0
            found.append((accepted + weight * expected) / (reached + weight))
        return found

    def offered(self) -> list[float]:
        """For each position, the part of the requests that have a draft there: a text need not repeat itself."""
        return [(there + 1.0) / (asked + 1.0) for there, asked in zip(self.there, self.asked, strict=True)]


class _Fit:
    """Least squares of relative errors, with coefficients of 0 or more, in which the past counts less and less.

    `trust`: features of a large one explain what any of several could.
    """

    def __init__(self, trust: Sequence[float], memory: float = 0.998) -> None:
        self._memory, self._ridge = memory, 1e-3 / np.array(trust)
        self._xx, self._xy = [[0.0] * len(trust) for _ in trust], [0.0] * len(trust)
        self._added = 0
        self._coefficients: list[float] = [0.0] * len(trust)

    def add(self, x: Sequence[float], y: float) -> None:
        relative, memory = [feature / y for feature in x], self._memory
        for row, mine in zip(self._xx, relative, strict=True):
            row[:] = [memory * old + mine * other for old, other in zip(row, relative, strict=True)]
        self._xy = [memory * old + new for old, new in zip(self._xy, relative, strict=True)]
        self._added += 1
        if self._added & (self._added - 1) == 0 or self._added % 16 == 0:
            self._solve()

    def predict(self, x: Sequence[float]) -> float:
        return sum(map(operator.mul, self._coefficients, x))

    def _solve(self) -> None:
        xx, xy = np.array(self._xx), np.array(self._xy)
        diagonal = np.diag(xx)
        used = [i for i, d in enumerate(diagonal) if d > 0]
        found = np.zeros(len(diagonal))
        while used:
            part = np.ix_(used, used)
            solution = np.linalg.solve(xx[part] + np.diag((diagonal * self._ridge)[used]), xy[used])
            if solution.min() >= 0:
                found[used] = solution
                break
            del used[int(solution.argmin())]
        self._coefficients = found.tolist()


class _Experts:
    """Distinct experts that a layer of a pass touches, by its tokens."""

    def __init__(self, n_experts: int, top_k: int) -> None:
        self.n_experts, self.top_k = n_experts, top_k
        self._ratio: dict[int, float] = {}  # measured over expected, by the tokens' power of two

    def expected(self, n_tokens: float) -> float:
        """Of tokens that choose evenly and independently."""
        return self.n_experts * (1 - (1 - self.top_k / self.n_experts) ** n_tokens)

    def add(self, n_tokens: int, touched: float) -> None:
        place, ratio = n_tokens.bit_length(), touched / self.expected(n_tokens)
        self._ratio[place] = 0.9 * self._ratio.get(place, ratio) + 0.1 * ratio

    def of(self, n_tokens: float) -> float:
        """As measured with so many tokens, or with about as many."""
        if not self._ratio:
            return self.expected(n_tokens)
        place = int(n_tokens).bit_length()
        nearest = min(self._ratio, key=lambda known: abs(known - place))
        return min(self.expected(n_tokens) * self._ratio[nearest], self.n_experts)


@dataclass(slots=True)
class _Arm:
    """A number of drafts at a batch size: what it takes over what the model says, and when that was last seen."""

    ratio: float = 1.0
    seen: float = 0.0
    last: int = -(10**6)


@dataclass(slots=True)
class _Bucket:
    """Batch sizes from one power of two to the next."""

    arms: list[_Arm]
    curve: _Curve
    n: int = 1
    context: float = 0.0
    rows: list[Row] = field(default_factory=list)
    compared: tuple[int, int] = (-REFRESH, 0)  # the step, and the batch size
    best: int = 0


class _Try(NamedTuple):
    drafts: int
    requests: Sequence[int]  # their places in the batch
    loss: float


# -------------------------------------------------------------------------------------------------------- controller


class Controller:
    """Chooses the number of drafts, and learns from every pass.

    Args:
        num_drafts: at most.
        n_experts, top_k: of each layer; 1 and 1 for a dense model.
        expert_bytes: of one expert, in all layers together.
    """

    def __init__(self, num_drafts: int, n_experts: int = 1, top_k: int = 1, expert_bytes: int = 0) -> None:
        self.num_drafts, self.expert_bytes = num_drafts, expert_bytes
        self._experts = _Experts(n_experts, top_k)
        self._curve = _Curve(num_drafts)
        # Fixed, experts, tokens, tokens of prompts, thousands of positions: while they have not been told apart, time
        # goes into the first two, as it does where weights are read.
        self._pass = _Fit((1, 1, 0.05, 0.05, 0.05))
        self._guessing = _Fit((1, 0.1))
        self._level = 1.0  # how slow the machine is just now
        self._buckets: dict[int, _Bucket] = {}
        self._step = self._tried = 0
        self._try: _Try | None = None
        self._allowance, self._grant = 0.0, [0.0, 0.0]
        self._price = (0, 0.0)  # at a batch size, of what could not be afforded
        self._asked: dict[Hashable, int] = {}
        self._draft_tokens = 0

    @classmethod
    def of_model(cls, num_drafts: int, cfg: Config, bytes_per_number: int) -> "Controller":
        """For a model of this shape, and numbers of this size in its experts."""
        e = cfg.experts
        gates = 2 if e.activation == "swiglu" else 1
        n_bytes = (gates + 1) * e.d_ff * cfg.d_model * bytes_per_number
        return cls(num_drafts, e.n_experts, e.top_k, n_bytes * cfg.n_moe_layers)

    def choose(self, requests: Sequence[Hashable], room: Sequence[int], behind: Callable[[Any], int]) -> list[int]:
        """The number of drafts for each request, all of which are at their newest token.

        Args:
            room: how many tokens may still follow each request's next.
            behind: how many tokens the proposer would have to compute of one before it can guess.
        """
        bucket = self._bucket(len(requests))
        self._compare(bucket, len(requests))
        self._try = self._worth_trying(bucket, requests, behind) if self._step - self._tried >= EVERY else None
        drafts, chosen = bucket.best, range(len(requests))
        if self._try is not None:
            self._tried, drafts, chosen = self._step, self._try.drafts, self._try.requests
        elif drafts:
            chosen = [i for i in chosen if self._worth_catching_up(bucket, behind(requests[i]), room[i])]
        counts = [0] * len(requests)
        if not drafts:
            self._asked, self._draft_tokens = {}, 0
            return counts
        for i in chosen:
            counts[i] = max(0, min(drafts, room[i]))
        self._asked = dict(zip(requests, counts, strict=True))
        self._draft_tokens = sum(behind(r) + n - 1 for r, n in self._asked.items() if n)
        return counts

    def learn(self, seen: Observed) -> None:
        """From one pass."""
        self._step += 1
        n, total = len(seen.asked), seen.seconds + seen.draft_seconds
        self._allowance += SHARE * total
        n_tokens = n + sum(seen.drafted)
        if seen.experts is not None:
            self._experts.add(n_tokens + seen.other_tokens, seen.experts)
        x = self._features(n_tokens, seen.other_tokens, seen.context)
        z = float(max(seen.asked, default=0)), float(seen.draft_tokens)
        if any(seen.asked) or self._step % REFRESH == 0 or self._step < 4 * REFRESH:
            self._pass.add(x, seen.seconds)
        if z[0] and seen.draft_seconds > 0:
            self._guessing.add(z, seen.draft_seconds)
        if not n or seen.other_tokens:  # not to be compared with others
            if self._try is not None:
                self._allowance -= self._try.loss
            self._try = None
            return
        bucket = self._bucket(n)
        bucket.n, bucket.context = n, seen.context / n
        if any(seen.asked):
            step = _Curve.of(self.num_drafts, seen.asked, seen.drafted, seen.accepted)
            self._curve.add(step)
            bucket.curve.add(step)
        self._correct(bucket, seen, total, self._pass.predict(x) + self._guessing.predict(z))
        self._account(bucket, seen, total)

    def __call__(self, step: "Step") -> None:
        """The same, as one of `Engine.listeners`."""
        if not self._asked and self._try is None and self._step >= 4 * REFRESH and self._step % REFRESH:
            self._step += 1  # as the ones before; where guessing is off, it is to cost nothing
            self._allowance += SHARE * (step.schedule_s + step.forward_s + step.sample_s)
            return
        pairs = [(w, n) for w, n in zip(step.works, step.accepted, strict=True) if w.samples and w.n == 1 + w.n_drafts]
        asked = [self._asked.get(work.request, 0) for work, _ in pairs]
        drafted, accepted = [work.n_drafts for work, _ in pairs], [n for _, n in pairs]
        others = step.n_tokens - sum(drafted) - len(pairs)
        experts = step.experts if self._try is not None or self._step % REFRESH == 0 else None
        seconds = step.schedule_s + step.forward_s + step.sample_s
        tokens = self._draft_tokens if any(asked) else 0
        context = sum(step.contexts)
        self.learn(Observed(asked, drafted, accepted, seconds, step.propose_s, tokens, others, context, experts))

    # ------------------------------------------------------------------------------------------------- what is known

    def rows(self, n_requests: int) -> list[Row]:
        """For each number of drafts, what it would give and take at this batch size."""
        bucket = self._bucket(n_requests)
        rates = bucket.curve.rates(self._curve.rates())
        offered, accepted, share, there, found = bucket.curve.offered(), 0.0, 1.0, 0.0, []
        for k in range(self.num_drafts + 1):
            if k:
                share *= rates[k - 1]
                accepted, there = accepted + share, there + offered[k - 1]
            seconds = self._seconds(bucket, n_requests, k, n_requests * there, n_requests * k)
            tokens = n_requests * (1 + accepted)
            experts = self._experts.of(n_requests * (1 + there))
            found.append(Row(k, accepted, experts, seconds, tokens / seconds if seconds else 0.0))
        return found

    def report(self) -> str:
        """For each batch size that there was: what the best number of drafts gives, with the figures."""
        lines = []
        for place in sorted(self._buckets):
            n = self._buckets[place].n
            none, *others = self.rows(n)
            if none.rate:
                lines.append(self._sentence(n, none, max(others, key=lambda row: row.rate)))
        return "\n".join(lines) or "nothing was measured yet"

    def _sentence(self, n: int, none: Row, best: Row) -> str:
        shares = np.diff([row.accepted for row in self.rows(n)[: best.drafts + 1]])
        before, after = (row.experts * self.expert_bytes / 1e6 for row in (none, best))
        requests, drafts = f"{n} request{'s' * (n > 1)}", f"{best.drafts} draft{'s' * (best.drafts > 1)}"
        return (
            f"{requests}, {drafts}: {1 + best.accepted:.2f} tokens a request and step "
            f"(accepted at each position: {', '.join(f'{share:.2f}' for share in shares)}); "
            f"{best.experts:.1f} experts a layer instead of {none.experts:.1f} "
            f"({after:.1f} MB instead of {before:.1f}), {best.seconds * 1e3:.2f} ms instead of "
            f"{none.seconds * 1e3:.2f}: {best.rate / none.rate:.2f}x the tokens per second. "
            + ("Speculation helps." if best.rate > none.rate else "Speculation will not help here.")
        )

    # ----------------------------------------------------------------------------------------------------- choosing

    def _bucket(self, n: int) -> _Bucket:
        place = n.bit_length()
        if place not in self._buckets:
            arms = [_Arm() for _ in range(self.num_drafts + 1)]
            self._buckets[place] = _Bucket(arms, _Curve(self.num_drafts), n)
        return self._buckets[place]

    def _compare(self, bucket: _Bucket, n: int) -> None:
        if self._step - bucket.compared[0] < REFRESH and bucket.compared[1] == n:
            return
        bucket.rows, bucket.compared = self.rows(n), (self._step, n)
        # Before there is anything to compare with, nothing.
        known = bucket.arms[0].seen >= 1
        bucket.best = max(bucket.rows, key=lambda row: row.rate).drafts if known else 0

    def _worth_trying(self, bucket: _Bucket, requests: Sequence[Hashable], behind: Callable[[Any], int]) -> _Try | None:
        """What was not seen for long, and costs little: as many requests, those least behind, as the budget allows."""
        n, rows, best = len(requests), bucket.rows, bucket.rows[bucket.best]
        dear = self._price[0] == n and self._allowance < self._price[1]
        if bucket.arms[0].seen < 1 or self._allowance <= 0 or dear or not best.rate:
            return None
        order = sorted(range(n), key=lambda i: behind(requests[i]))
        tokens = np.cumsum([behind(requests[i]) for i in order]).tolist()

        def loss(k: int, m: int) -> float:
            if not k:
                return max(0.0, rows[0].seconds - n / best.rate)
            seconds = self._seconds(bucket, n, k if m == n else 0, m * k, tokens[m - 1] + m * (k - 1), passes=k)
            return max(0.0, seconds - (n + m * rows[k].accepted) / best.rate)

        others = [k for k in range(self.num_drafts + 1) if k != bucket.best]
        losses, cheapest = {k: loss(k, n) for k in others}, np.inf
        for k in sorted(
            others, key=lambda k: (bucket.arms[k].last - self._step) / (losses[k] + 0.05 * rows[0].seconds)
        ):
            m, lost = n, losses[k]
            while m and lost > self._allowance:
                m = m // 2 if k else 0
                lost = loss(k, m) if m else lost
            if m:
                return _Try(k, order[:m], lost)
            cheapest = min(cheapest, lost)
        self._price = n, cheapest
        return None

    def _worth_catching_up(self, bucket: _Bucket, behind: int, room: int) -> bool:
        """Whether what a request has left to say pays for what the proposer has to read of it first."""
        none, best = bucket.rows[0], bucket.rows[bucket.best]
        saved = 1 / none.rate - 1 / best.rate
        return saved * room >= self._guessing.predict((0.0, float(behind))) * self._level

    def _features(self, n_tokens: float, others: float, context: float) -> tuple[float, ...]:
        return 1.0, self._experts.of(n_tokens + others), float(n_tokens), float(others), context / 1e3

    def _seconds(
        self, bucket: _Bucket, n: int, k: int, drafted: float, draft_tokens: float, passes: int | None = None
    ) -> float:
        """Of a step in which n requests verify so many drafts in all, corrected as steps of `k` drafts were."""
        x = self._features(n + drafted, 0, n * bucket.context)
        guessing = self._guessing.predict((float(k if passes is None else passes), float(draft_tokens)))
        return self._level * self._ratio(bucket, k) * (self._pass.predict(x) + guessing)

    def _ratio(self, bucket: _Bucket, k: int) -> float:
        """A number of drafts that was not seen yet is taken for the nearest that was."""
        known = [i for i, arm in enumerate(bucket.arms) if arm.seen]
        return bucket.arms[min(known, key=lambda i: abs(i - k))].ratio if known else 1.0

    # ----------------------------------------------------------------------------------------------------- learning

    def _correct(self, bucket: _Bucket, seen: Observed, total: float, predicted: float) -> None:
        """How slow the machine is changes quickly and for all, how far the model is off only slowly."""
        k, n = max(seen.asked), len(seen.asked)
        if 2 * sum(seen.asked) < n * k or predicted <= 0:
            return
        arm = bucket.arms[k]
        off = min(max(total / (predicted * self._level), 0.25), 4.0)
        if arm.seen:
            off_arm = min(max(off / arm.ratio, 0.8), 1.25)  # a step that was held up is one, however long
            self._level *= off_arm**0.2
            arm.ratio *= off_arm ** (1 / min(arm.seen + 1, 20))
        else:
            arm.ratio = off
        arm.seen, arm.last = arm.seen + 1, self._step

    def _account(self, bucket: _Bucket, seen: Observed, total: float) -> None:
        """What a try has cost is taken off the budget."""
        if self._grant[1] == 0 and not any(seen.asked):
            # Of the first two plain steps the shorter one: something may have been made ready in the other.
            first, self._grant[0] = self._grant[0], total
            if first:
                self._grant[1] = GRANT * min(first, total)
                self._allowance += self._grant[1]
        tried, self._try = self._try, None
        if tried is None:
            return
        bucket.arms[tried.drafts].last, bucket.compared = self._step, (-REFRESH, 0)
        rows = self.rows(len(seen.asked))
        best = max(row.rate for row in rows)
        needed = sum(1 + rows[n].accepted for n in seen.asked) / best
        # A step that was held up is not the try's fault.
        self._allowance -= max(0.0, min(total, 2 * (tried.loss + needed)) - needed)
