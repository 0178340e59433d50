"""How differently two models see the same text: their probabilities of every token, beside their routes.

Shape suffixes: T tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.errors import SubjectError
from moe.evaluate import Window
from moe.profile.subject import Subject, log_probabilities
from moe.profile.trace import Comparison, Trace, compare, record


@dataclass(frozen=True)
class LogProbabilityChange:
    """What becomes of ln p of the text's tokens from one model to another; nats per token."""

    tokens: int
    gap: float  # mean |ln p' - ln p|
    gain: float  # mean ln p' - ln p: above 0, the other finds the text likelier
    divergence: float  # mean p'/p - 1 - ln p'/p, never negative; KL(p || p') where the text was drawn from p


@dataclass(frozen=True)
class Reading:
    """What a model made of a text."""

    path: Path
    windows: list[Window]
    log_p_T: dict[str, Tensor]  # per source
    trace: Trace


def log_probability_change(one_T: Tensor, other_T: Tensor) -> LogProbabilityChange:
    """From the natural logarithms of the tokens' probabilities under two models.

    The divergence is the estimator k3 of Schulman, "Approximating KL divergence" (2020).
    """
    ratio_T = other_T.double() - one_T.double()
    divergence = torch.expm1(ratio_T) - ratio_T
    return LogProbabilityChange(
        len(ratio_T), float(ratio_T.abs().mean()), float(ratio_T.mean()), float(divergence.mean())
    )


def read(subject: Subject, windows: list[Window], batch: int, trace: Path) -> Reading:
    """Runs the text through a model once, and records the routes in a new trace."""
    with record(subject.model, trace):
        log_p_T = log_probabilities(subject, windows, batch)
    return Reading(subject.path, windows, log_p_T, Trace.open(trace))


def compare_readings(one: Reading, other: Reading) -> tuple[dict[str, LogProbabilityChange], Comparison]:
    """Per source how the probabilities change, and per layer how the routes do.

    Raises:
        SubjectError: other tokens, or models of another number of layers, experts or experts per token.
    """
    for name in ("n_layers", "n_experts", "top_k"):
        if getattr(one.trace, name) != getattr(other.trace, name):
            raise SubjectError(
                f"{other.path}: {name} = {getattr(other.trace, name)}, but {getattr(one.trace, name)} in {one.path}: "
                "routes are compared of models of one shape, as before and after fine-tuning"
            )
    same = len(one.windows) == len(other.windows) and all(
        a[0] == b[0] and (a[1].tolist(), a[2].tolist()) == (b[1].tolist(), b[2].tolist())
        for a, b in zip(one.windows, other.windows, strict=True)
    )
    if not same:
        raise SubjectError(
            f"{other.path}: reads the text as other tokens than {one.path}, whose tokenizer or context is another; "
            "give `data`, or a `seq_len` that both contexts hold"
        )
    changes = {name: log_probability_change(log_p_T, other.log_p_T[name]) for name, log_p_T in one.log_p_T.items()}
    if len(changes) > 1:
        both = (torch.cat(list(r.log_p_T.values())) for r in (one, other))
        changes["all"] = log_probability_change(*both)
    return changes, compare(one.trace, other.trace)
