"""Training: the loop and its parts. The public names, nothing else."""

from moe.train.loop import Result, train
from moe.train.watch import TrainError

__all__ = ["Result", "TrainError", "train"]
