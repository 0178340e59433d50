"""A model over the ranks of any mesh, with a pipeline or without: its parts on this rank, and a step's gradient."""

import torch
from torch import nn

from moe.config import Config
from moe.model import Counts, Transformer
from moe.parallel.apply import parallelize
from moe.parallel.mesh import Meshes
from moe.parallel.pipeline import Pipeline
from moe.parallel.step import Batch, Done, forward_backward
from moe.weights import init_weights


class ParallelModel:
    """A new model over the ranks; its weights are those that one process draws from the same seed.

    Attributes:
        parts: what this rank has of it: its stages of a pipeline, or its piece of the whole.

    Raises:
        ConfigError: it cannot be divided so; see `Degrees.check`.
    """

    def __init__(self, cfg: Config, meshes: Meshes, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.meshes = meshes
        self._pipeline = Pipeline(cfg, meshes, seed=seed, dtype=dtype) if meshes.degrees.pp > 1 else None
        self.parts = [made(cfg, meshes, seed, dtype)] if self._pipeline is None else self._pipeline.parts

    def parameters(self) -> list[nn.Parameter]:
        """Of all parts on this rank."""
        return [p for part in self.parts for p in part.parameters()]

    def forward_backward(self, batch: Batch, counts: Counts | None = None) -> Done:
        """As `step.forward_backward`, or `Pipeline.forward_backward`."""
        if self._pipeline is not None:
            return self._pipeline.forward_backward(batch, counts)
        return forward_backward(self.parts[0], self.meshes, batch, counts)


def made(cfg: Config, meshes: Meshes | None, seed: int, dtype: torch.dtype) -> Transformer:
    """The model over the ranks, without a pipeline; without meshes, in one process. No rank holds what it drops."""
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    if meshes is not None:
        model = parallelize(model, meshes)
    model.to_empty(device="cpu" if meshes is None else meshes.device)
    init_weights(model, seed)
    return model
