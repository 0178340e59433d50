"""gpt4-moe: the mixture-of-experts GPT-4 of the 2023 article, as working PyTorch. The public names, nothing else.

Names load on first use (PEP 562), so that `import moe.plan` and `moe plan` never import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe import data, hf, plan, profile, serve, train
    from moe.checkpoint import load, load_tokenizer, save
    from moe.config import Config, load_config
    from moe.errors import ConfigError, MoeError
    from moe.model import Transformer

    class kernels:
        """A folder without __init__.py, which a type checker would call empty."""

        from moe.kernels import ops


__version__ = "0.1.0"

_HOME = {
    "Config": "moe.config",
    "ConfigError": "moe.errors",
    "MoeError": "moe.errors",
    "load_config": "moe.config",
    "Transformer": "moe.model",
    "save": "moe.checkpoint",
    "load": "moe.checkpoint",
    "load_tokenizer": "moe.checkpoint",
}

__all__ = [
    "Config",
    "ConfigError",
    "MoeError",
    "Transformer",
    "data",
    "hf",
    "kernels",
    "load",
    "load_config",
    "load_tokenizer",
    "plan",
    "profile",
    "save",
    "serve",
    "train",
]


if not TYPE_CHECKING:  # a type checker that saw it would take any name for Any

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        if name == "kernels":
            importlib.import_module("moe.kernels.ops")  # which sets moe.kernels.ops
        if name in __all__:
            return importlib.import_module(f"moe.{name}")
        raise AttributeError(f"module 'moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
