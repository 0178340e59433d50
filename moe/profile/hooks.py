"""How a model is watched and steered: hooks that its copies shed, and blocks in which torch.compile is not in force."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn


def computes_again() -> bool:
    """Whether this runs inside a backward: activation checkpointing runs a layer again there."""
    return torch._C._current_graph_task_id() != -1


class Hook:
    """A hook that belongs to one module: what `copy.deepcopy` or a pickle makes of it takes itself away when called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Shed":
        return _Shed()

    def __reduce__(self) -> tuple[type["_Shed"], tuple[()]]:
        return _Shed, ()


class _Shed:
    """Stands in a copy of a module where the original had a `Hook`, until the copy is first called."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        for hooks in kinds:
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]


class Shared:
    """A context that is entered with the first of those who need it and left with the last, from whichever threads."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._entered = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._entered.enter_context(self._make())
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._entered.close()


@contextmanager
def _eagerly() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


# What torch.compile made before a hook was there runs without it, and says nothing: meanwhile Python runs instead.
uncompiled = Shared(_eagerly)


def called_module(model: nn.Module) -> nn.Module:
    """The module that is called in the end, whether by itself or through torch.compile's or a parallel wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
