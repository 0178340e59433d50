"""What routing does to decoding: tokens per expert and step, experts touched, and their weights' bytes and time.

In a decoding step each sequence adds one token. A batch of B is drawn as B tokens of the trace, from anywhere in it,
as independent requests would be; beside it stands what independent uniform routing would give, exactly.

Shape suffixes: L layers, T tokens, K experts per token, E experts, N drawn steps.
"""

from dataclasses import dataclass

import numpy as np

from moe.plan.experts import touched

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class StepLoad:
    """A batch size's figures, averaged over layers and drawn steps."""

    batch: int
    distinct: float  # experts that at least one token reaches
    distinct_uniform: float  # the same were routing uniform: E (1 - (1 - K/E)^B)
    idle: float  # probability that an expert gets no token
    idle_uniform: float
    busiest: float  # tokens of the busiest expert
    mean: float  # B K / E
    tokens_p5: float  # of an expert in a step
    tokens_p95: float
    tokens_p5_uniform: float
    tokens_p95_uniform: float
    mass: np.ndarray  # [batch + 1]: probability that an expert gets 0, 1, ... batch tokens
    mass_uniform: np.ndarray


def decode_steps(
    ids_TLK: np.ndarray, n_experts: int, batches: tuple[int, ...] = BATCHES, steps: int = 200, seed: int = 0
) -> list[StepLoad]:
    """Draw `steps` batches of each size from a trace's ids, [T, L, K].

    Raises:
        ValueError: no tokens.
    """
    T, L, K = ids_TLK.shape
    if not T:
        raise ValueError("the trace has no tokens")
    rng = np.random.default_rng(seed)
    found = []
    for batch in batches:
        counts = np.zeros((steps, L, n_experts), dtype=np.int64)
        layer = np.arange(L)[None, :, None]
        for n in range(steps):
            np.add.at(counts[n], (layer, ids_TLK[rng.integers(T, size=batch)]), 1)
        p = K / n_experts
        # Each of B tokens reaches an expert with probability K / E: binomial.
        uniform = _binomial(batch, p)
        low, high = _quantiles(uniform, (0.05, 0.95))
        found.append(
            StepLoad(
                batch=batch,
                distinct=float((counts > 0).sum(2).mean()),
                distinct_uniform=touched(n_experts, K, batch),
                idle=float((counts == 0).mean()),
                idle_uniform=(1 - p) ** batch,
                busiest=float(counts.max(2).mean()),
                mean=batch * p,
                tokens_p5=float(np.quantile(counts, 0.05, method="inverted_cdf")),
                tokens_p95=float(np.quantile(counts, 0.95, method="inverted_cdf")),
                tokens_p5_uniform=low,
                tokens_p95_uniform=high,
                mass=np.bincount(counts.ravel(), minlength=batch + 1) / counts.size,
                mass_uniform=uniform,
            )
        )
    return found


def _binomial(n: int, p: float) -> np.ndarray:
    """The probability of 0, 1, ... n successes."""
    k = np.arange(n + 1)
    if p >= 1:
        return (k == n).astype(float)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_mass = log_factorial[n] - log_factorial[k] - log_factorial[n - k] + k * np.log(p) + (n - k) * np.log1p(-p)
    return np.exp(log_mass)


def _quantiles(mass: np.ndarray, levels: tuple[float, ...]) -> list[float]:
    """The least k whose cumulative probability reaches each level."""
    cumulative = np.cumsum(mass)
    return [float(np.searchsorted(cumulative, level * cumulative[-1] - 1e-12)) for level in levels]
