"""Loss against compute: the power law through a ladder's rungs, and how far a prediction from it can be trusted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moe.errors import ConfigError

MIN_RUNGS = 4  # one more than the law has constants: leaving one out must still determine them
MIN_SPAN = 2.0  # the least ratio of the most to the least compute: an exponent needs some of it
ALPHAS = np.geomspace(1e-3, 3.0, 241)  # published exponents of loss over compute are 0.05 to 0.2


@dataclass(frozen=True)
class PowerLaw:
    """L(C) = irreducible + scale * C^-exponent: nats per token at a training compute of C FLOP.

    The form of Henighan et al. 2020 (arXiv:2010.14701, equation 1.1) and of the compute-optimal frontier of Hoffmann et
    al. 2022. `irreducible` (E) is what no compute removes, `scale` is A, `exponent` alpha.
    """

    irreducible: float
    scale: float
    exponent: float

    def loss(self, compute: float) -> float:
        """Nats per token at `compute` FLOP."""
        return self.irreducible + self.scale * compute**-self.exponent

    def __str__(self) -> str:
        return f"L(C) = {self.irreducible:.4g} + {self.scale:.4g} C^-{self.exponent:.4g}"


def fit(compute: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The power law with E >= 0 and A > 0 that has the least sum of squared relative residuals.

    For a given exponent the other two constants are a linear problem with two unknowns, solved exactly; the exponent is
    searched, on a grid first and then by golden section, so that the same figures always give the same law.

    Args:
        compute: training FLOP of each rung, in any order.
        losses: nats per token of held-out data, of the same rungs.

    Raises:
        ConfigError: fewer than four rungs of different compute, too little range of it, or a loss that does not fall.
    """
    C, L = _checked(compute, losses)
    law = _fit(C, L)
    if law.scale <= 0 or L[C.argmax()] >= L[C.argmin()]:
        raise ConfigError(f"the loss does not fall with compute: {_listed(C, L)}. {REMEDY}")
    return law


def leave_one_out(compute: Sequence[float], losses: Sequence[float]) -> list[PowerLaw]:
    """The laws of all rungs but the first, all but the second and so on: their spread is that of a prediction.

    One of them may be flat (A = 0) where the rest of the rungs do not improve.

    Raises:
        ConfigError: as `fit`.
    """
    C, L = _checked(compute, losses)
    return [_fit(np.delete(C, i), np.delete(L, i)) for i in range(len(C))]


REMEDY = (
    "A law needs rungs that are trained well: train all of them longer (`tokens_per_parameter`), tune the "
    "configuration at its own size (train.lr and others), or choose rungs that are further apart"
)


def _checked(compute: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    C, L = np.asarray(compute, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(C) != len(L):
        raise ConfigError(f"{len(C)} figures of compute and {len(L)} losses: there must be as many")
    if not (np.isfinite(C).all() and np.isfinite(L).all() and (C > 0).all() and (L > 0).all()):
        raise ConfigError(f"compute and losses must be positive and finite: {_listed(C, L)}")
    if (n := len(np.unique(C))) < MIN_RUNGS:
        raise ConfigError(
            f"{n} rungs of different compute: three constants and their uncertainty need {MIN_RUNGS} or more; give "
            "more `rungs`"
        )
    if (span := C.max() / C.min()) < MIN_SPAN:
        raise ConfigError(
            f"the rungs span {span:.2f} times the compute, which says nothing of larger ones: choose `rungs` that span "
            "ten times or more"
        )
    return C, L


def _listed(C: np.ndarray, L: np.ndarray) -> str:
    return ", ".join(f"{loss:.4g} at {flop:.3g} FLOP" for flop, loss in sorted(zip(C, L, strict=True)))


def _fit(C: np.ndarray, L: np.ndarray) -> PowerLaw:
    """The least-squares law of figures that are checked."""
    middle = np.exp(np.log(C).mean())  # powers of C itself would be far from 1
    x = C / middle

    def solved(alpha: float) -> tuple[float, float, float]:
        return _linear(x**-alpha, L)

    errors = [solved(alpha)[0] for alpha in ALPHAS]
    best = int(np.argmin(errors))
    low, high = np.log(ALPHAS[max(0, best - 1)]), np.log(ALPHAS[min(len(ALPHAS) - 1, best + 1)])
    alpha = float(np.exp(_golden(lambda t: solved(float(np.exp(t)))[0], low, high)))
    _, e, a = solved(alpha)
    return PowerLaw(e, float(a * middle**alpha), alpha)


def _linear(powers: np.ndarray, L: np.ndarray) -> tuple[float, float, float]:
    """The E and A, neither below 0, of the least sum of ((E + A powers) / L - 1)^2, after that sum."""
    columns = np.stack([1 / L, powers / L], axis=1)
    ones = np.ones(len(L))
    candidates = [np.linalg.lstsq(columns, ones, rcond=None)[0]]
    if candidates[0].min() < 0:  # then the best lies on an edge: one of the two is 0
        ends = columns.sum(axis=0) / (columns**2).sum(axis=0)
        candidates = [np.array([ends[0], 0.0]), np.array([0.0, ends[1]])]
    error, e, a = min((float(((columns @ c - 1) ** 2).sum()), float(c[0]), float(c[1])) for c in candidates)
    return error, e, a


def _golden(f: Callable[[float], float], low: float, high: float) -> float:
    """Where `f` is least between `low` and `high`, by golden section (Kiefer 1953)."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(60):
        if fa <= fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = f(b)
    return (low + high) / 2
