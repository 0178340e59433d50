"""Serving: many requests at once from one model, over paged keys and values. The public names, nothing else."""

from moe.serve.engine import Engine, Output, Stats
from moe.serve.request import SamplingParams
from moe.serve.scheduler import QueueFullError

__all__ = ["Engine", "Output", "QueueFullError", "SamplingParams", "Stats"]
