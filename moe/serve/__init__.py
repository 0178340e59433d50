"""Serving: many requests at once from one model, over paged keys and values. The public names, nothing else."""

from moe.serve.engine import Engine, Stats, Step
from moe.serve.output import Delta, Logprob, Output
from moe.serve.request import SamplingParams

__all__ = ["Delta", "Engine", "Logprob", "Output", "SamplingParams", "Stats", "Step"]
