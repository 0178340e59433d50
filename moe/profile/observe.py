"""Sees what every router of a model chooses, in any forward pass, ours or transformers', without asking the caller.

A pass is complete when each router has spoken once, in order; what a backward computes again (activation
checkpointing) is not a pass. Shape suffixes: L layers, B batch, S sequence, T = B*S tokens, E experts, K experts per
token.
"""

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from moe.errors import NotObservable
from moe.experts import Router
from moe.hf import routers as foreign
from moe.profile.hooks import Hook, called_module, computes_again, uncompiled


class Pass(NamedTuple):
    """The routing of one forward pass. Tensors are detached, on the model's device."""

    ids_LTK: Tensor  # int64, in falling order of score
    weights_LTK: Tensor  # routing weights, in the router's dtype
    logits_LTE: Tensor  # router logits, before any bias
    shape: tuple[int, int]  # B, S
    tokens_T: Tensor | None  # int64, where the model was called with ids
    text_T: Tensor | None = None  # bool, False at padding; None where all is text

    def text(self) -> "Pass":
        """The same without its padding, as one sequence."""
        if self.text_T is None:
            return self
        at = self.text_T.nonzero().squeeze(1)
        ids_LTK, weights_LTK, logits_LTE = (x.index_select(1, at) for x in self[:3])
        tokens_T = None if self.tokens_T is None else self.tokens_T[at]
        return Pass(ids_LTK, weights_LTK, logits_LTE, (1, len(at)), tokens_T)


def routers(model: nn.Module) -> list[nn.Module]:
    """The model's routers in the order of its layers.

    Ours, and those of transformers' models that return (logits, weights, ids), as Mixtral, Qwen3-MoE, OLMoE and
    gpt-oss do.

    Raises:
        NotObservable: there is none.
    """
    found = [m for m in model.modules() if isinstance(m, Router) or foreign.is_router(m)]
    if not found:
        raise NotObservable(
            f"{type(model).__name__} has no router that is known here: want moe.experts.Router, or a TopKRouter "
            "of transformers (Mixtral, Qwen3-MoE, OLMoE, gpt-oss)"
        )
    return found


def n_experts(router: nn.Module) -> int:
    """Experts of a router: the rows of its weight."""
    weight: Any = router.weight
    return len(weight)


# What models call the token ids, and the mask of what is text.
_CALLED_WITH = {"tokens": ("input_ids", "tokens_BS"), "mask": ("attention_mask", "mask_BS")}


def called_with(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The token ids and the mask, [B, S] each, of a call of the model: what it has of them."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given |= given.get("kwargs", {})
    found = {}
    for what, names in _CALLED_WITH.items():
        value = next((given[name] for name in names if name in given), None)
        if isinstance(value, Tensor) and value.ndim == 2 and (what == "mask" or not value.is_floating_point()):
            found[what] = value
    return found


def placed(called: dict[str, Tensor], T: int) -> tuple[tuple[int, int], Tensor | None, Tensor | None]:
    """(B, S), tokens_T and text_T of a pass of T tokens, as far as the call says."""
    tokens, mask = called.get("tokens"), called.get("mask")
    if tokens is not None and tokens.numel() != T:
        tokens = None
    if mask is not None and tokens is not None and len(mask) == len(tokens):
        mask = mask[:, -tokens.shape[1] :]  # with a cache, a mask is also of what is in it
    if mask is not None and mask.numel() != T:
        mask = None
    known = tokens if tokens is not None else mask
    shape = (1, T) if known is None else (known.shape[0], known.shape[1])
    return shape, None if tokens is None else tokens.flatten(), None if mask is None else mask.flatten().bool()


@contextmanager
def observe(model: nn.Module, on_pass: Callable[[Pass], None]) -> Iterator[None]:
    """Calls `on_pass` at the end of every forward pass of `model`, from whichever threads, one at a time.

    Compiled code runs eagerly meanwhile: torch.compile keeps no place for hooks that came after it. Where passes went
    unseen all the same, a warning at the end of the block says so.

    Raises:
        NotObservable: no routers, or, at the call, one whose result is not (logits, weights, ids).
    """
    layers, root = routers(model), called_module(model)
    watch = _Watch(len(layers), on_pass)
    with uncompiled, ExitStack() as handles:
        for handle in (
            root.register_forward_pre_hook(Hook(watch.begin), with_kwargs=True),
            root.register_forward_hook(Hook(watch.end), always_call=True),
            *(r.register_forward_hook(Hook(partial(watch.router, i))) for i, r in enumerate(layers)),
        ):
            handles.callback(handle.remove)
        yield
    if not watch.passes or watch.passes < watch.calls:
        warnings.warn(
            f"{type(root).__name__}: {watch.calls} calls in the block, of which {watch.passes} passes through all of "
            f"its {len(layers)} routers were seen; a copy, an exported or a captured model has none of the hooks: run "
            "the model itself inside the block",
            stacklevel=4,
        )


class _Watch:
    """What has been seen of the passes."""

    def __init__(self, n_layers: int, on_pass: Callable[[Pass], None]) -> None:
        self.n_layers, self.on_pass = n_layers, on_pass
        self.calls = self.passes = 0
        self._lock = threading.Lock()
        self._own = _Thread()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._own.called = called_with(module, args, kwargs)

    def end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._own.called = {}
        if output is not None and not computes_again():  # None: it ended in an exception
            with self._lock:
                self.calls += 1

    def router(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own = self._own
        if computes_again():
            return
        if layer == 0:
            own.spoken.clear()
        if layer == len(own.spoken):
            own.spoken.append(_routing(module, output))
            if torch._C._functorch.is_batchedtensor(own.spoken[-1][0]):  # type: ignore[attr-defined]
                own.spoken.clear()
                raise NotObservable(
                    "routing inside of torch.func.vmap has no values to count: call the model on the whole batch"
                )
        if len(own.spoken) == self.n_layers:
            where = own.spoken[0][0].device  # the layers of a model may be on several
            ids, weights, logits = (
                torch.stack([part.to(where) for part in parts]) for parts in zip(*own.spoken, strict=True)
            )
            own.spoken.clear()
            seen = Pass(ids, weights, logits, *placed(own.called, ids.shape[1]))
            with self._lock:
                self.on_pass(seen)
                self.passes += 1


class _Thread(threading.local):
    """A thread's own pass: what the routers said so far, and what the model was called with."""

    def __init__(self) -> None:
        self.spoken: list[tuple[Tensor, Tensor, Tensor]] = []
        self.called: dict[str, Tensor] = {}


def _routing(module: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, K], weights [T, K] and logits [T, E] from what a router returned."""
    if isinstance(module, Router):
        return output.ids_TK.detach(), output.weights_TK.detach(), output.logits_TE.detach()
    return foreign.routing_of(module, output)
