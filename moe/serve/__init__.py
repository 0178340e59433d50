"""Serving: many requests at once from one model, over paged keys and values. The public names, nothing else."""

from moe.serve.engine import Engine
from moe.serve.front import AsyncEngine
from moe.serve.logprobs import Logprob
from moe.serve.output import Delta, Output
from moe.serve.request import SamplingParams
from moe.serve.step import Stats, Step

__all__ = ["AsyncEngine", "Delta", "Engine", "Logprob", "Output", "SamplingParams", "Stats", "Step"]
