"""Gives the routers of a model their experts, pass by pass, also where a backward computes part of a pass again.

The routes of a pass travel with it: what torch.utils.checkpoint runs again (for our blocks, for transformers' layers,
reentrant or not, nested, around a layer or the whole model) takes the experts that it took at first, however many
passes lie between, on autograd's threads, and when the block has long been left. Each checkpointed function remembers
the context (of contextvars) that it first ran in, and the passes that began inside it.

Shape suffixes: T tokens, K experts per token, E experts.
"""

import contextvars
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils import checkpoint

from moe.errors import NotObservable, TraceError
from moe.experts import Router
from moe.hf import routers as foreign
from moe.kernels import ops
from moe.profile.hooks import Hook, Shared, called_module, computes_again, uncompiled
from moe.profile.observe import called_with, placed, routers

# The experts of one pass for (layer, T, N, device), N of whose T tokens are text: int64 [T, K] or [N, K].
Given = Callable[[int, int, int, torch.device], Tensor]


@contextmanager
def override(model: nn.Module, next_pass: Callable[[], Given]) -> Iterator[None]:
    """Inside the block, each pass of `model` takes the experts that `next_pass()` gives for it, weighed as ever.

    Padding for which none are given keeps those that its router chooses. Compiled code runs eagerly meanwhile.

    Raises:
        NotObservable: a router of transformers whose way of weighing is not known here.
        TraceError: at a call, a router that is run outside of a pass or not at all, so that it cannot be steered.
    """
    steered = _Override(model, next_pass)
    with steered.in_force:
        steered.open = True
        try:
            yield
        finally:
            steered.open = False
    if not steered.began:
        warnings.warn(
            f"no pass of {type(steered.root).__name__} was replayed: the block did not call it (a copy, an exported or "
            "a captured model has none of the hooks)",
            stacklevel=4,
        )


class _Pass:
    """One pass: its experts, its call, the layers that took theirs, and the passes of other models around it."""

    def __init__(self, given: Given, called: dict[str, Tensor], around: "_Passes") -> None:
        self.given, self.called = given, called
        self.took: set[int] = set()
        self.around = around


_Passes = dict["_Override", _Pass]
_PASSES: contextvars.ContextVar[_Passes] = contextvars.ContextVar("passes that this thread is in")


class _Override:
    """The hooks of one `override`: in its block, and wherever something of its passes is computed again."""

    def __init__(self, model: nn.Module, next_pass: Callable[[], Given]) -> None:
        self.root, self.routers, self.next_pass = called_module(model), routers(model), next_pass
        for router in self.routers:
            if not isinstance(router, Router) and type(router).__name__ not in foreign.WEIGHINGS:
                raise NotObservable(f"{type(router).__name__}: its weights cannot be made for given experts here")
        self.open = self.began = False
        self.in_force = Shared(self._in_force)
        self._lock = threading.Lock()

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        with uncompiled, _REMEMBERING, ExitStack() as handles:
            before = self.root.register_forward_pre_hook(Hook(self._begin), with_kwargs=True)
            after = self.root.register_forward_hook(Hook(self._end), always_call=True)
            handles.callback(before.remove)
            handles.callback(after.remove)
            for layer, router in enumerate(self.routers):
                # First of all hooks, so that whoever watches sees what the experts get.
                hook = router.register_forward_hook(Hook(self._replacement(layer)), prepend=True)
                handles.callback(hook.remove)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        again = _AGAIN.get(None)
        if again is not None:
            given = next(again.get(self, iter(())), None)
        elif not self.open:
            return  # another thread computes a pass again; this one is none of ours
        else:
            given = None
            if not computes_again():
                self.began = True
                with self._lock:
                    given = self.next_pass()
        if given is None:
            raise TraceError(
                f"{type(self.root).__name__} is called inside a backward, and which pass that repeats is not known "
                "here: run the pass inside the block, and checkpoint with torch.utils.checkpoint"
            )
        for scope in _SCOPES.get(()):
            scope.begun.setdefault(self, []).append(given)
        around = {other: its for other, its in _PASSES.get({}).items() if other is not self}
        _PASSES.set({**around, self: _Pass(given, called_with(module, args, kwargs), around)})

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        this = _PASSES.get({}).get(self)
        if this is None:
            return
        _PASSES.set(this.around)
        missed = [i for i in range(len(self.routers)) if i not in this.took]
        if output is not None and missed:
            raise TraceError(
                f"{type(self.root).__name__} ran without its router {missed[0]} of {len(self.routers)} (a layer that "
                "was skipped, exported or captured in a CUDA graph), so its routes were not replayed; run the plain "
                "model"
            )

    def _replacement(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            this = _PASSES.get({}).get(self)
            if this is not None:
                this.took.add(layer)
                return _with_experts(module, output, layer, this)
            if not self.open or _AGAIN.get(None) is not None:
                return None  # of another block's pass, computed again
            if computes_again():
                raise TraceError(
                    f"router {layer} runs again inside a backward, and which pass that repeats is not known here: "
                    "run the pass inside the block, and checkpoint with torch.utils.checkpoint"
                )
            raise TraceError(
                f"router {layer} runs outside of a call of {type(self.root).__name__}, so which pass it belongs to is "
                "not known: call the model that replay was given, as a whole"
            )

        return hook


def _with_experts(module: nn.Module, output: Any, layer: int, this: _Pass) -> Any:
    """What the router would have returned, had it chosen the experts of this pass."""
    ours = isinstance(module, Router)
    logits, _, ids = (output.logits_TE, None, output.ids_TK) if ours else output
    own_TK = ids.flatten(0, -2)
    text_T = placed(this.called, len(own_TK))[2]
    n_text = len(own_TK) if text_T is None else int(text_T.sum())
    new_TK = this.given(layer, len(own_TK), n_text, ids.device)
    if text_T is not None and len(new_TK) < len(own_TK):
        new_TK = own_TK.index_put((text_T.to(ids.device).nonzero().squeeze(1),), new_TK)
    if ours:
        weights_TK, ids_TK = ops.topk_gate(logits, module.top_k, given_TK=new_TK)
        return output._replace(ids_TK=ids_TK, weights_TK=weights_TK)
    new = new_TK.view(ids.shape)
    return logits, foreign.WEIGHINGS[type(module).__name__](module, logits, new), new


# ----------------------------------------------------------------------------------------------------- checkpointing


class _Scope:
    """One call of torch.utils.checkpoint."""

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self.begun: dict[_Override, list[Given]] = {}  # the passes that began inside, in order

    def run_again(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the function as in its first run. The context is copied, as two backwards may run it at once."""
        return self.context.copy().run(self._again, function, args, kwargs)

    def _again(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _AGAIN.set({override: iter(given) for override, given in self.begun.items()})
        _SCOPES.set(())
        with ExitStack() as hooks:
            for override in {**_PASSES.get({}), **self.begun}:
                hooks.enter_context(override.in_force)
            return function(*args, **kwargs)


_SCOPES: contextvars.ContextVar[tuple[_Scope, ...]] = contextvars.ContextVar("checkpointed functions that now run")
_AGAIN: contextvars.ContextVar[dict[_Override, Iterator[Given]]] = contextvars.ContextVar("passes that begin again")


@contextmanager
def _scope() -> Iterator[_Scope]:
    scope = _Scope()
    token = _SCOPES.set((*_SCOPES.get(()), scope))
    try:
        yield scope
    finally:
        _SCOPES.reset(token)


@contextmanager
def _remembering() -> Iterator[None]:
    """Meanwhile both kinds of torch's checkpointing remember what a function first ran in.

    They offer no other way in: whoever checkpoints has long imported `checkpoint` itself.

    Raises:
        TraceError: this torch's checkpointing is another than that of 2.11 to 2.13.
    """
    without_reentrant = getattr(checkpoint, "_checkpoint_without_reentrant_generator", None)
    if without_reentrant is None:
        raise TraceError(
            f"routes cannot be replayed with torch {torch.__version__}, whose checkpointing is another than that of "
            "2.11 to 2.13: use one of these"
        )
    reentrant = checkpoint.CheckpointFunction.apply

    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        def again(*args: Any, **kwargs: Any) -> Any:
            return scope.run_again(function, *args, **kwargs)

        with _scope() as scope:
            yield from without_reentrant(again, *args, **kwargs)

    def apply(function: Callable[..., Any], *args: Any) -> Any:
        ran = False

        def first_or_again(*args: Any) -> Any:
            return scope.run_again(function, *args) if ran else function(*args)

        with _scope() as scope:
            try:
                return reentrant(first_or_again, *args)
            finally:
                ran = True

    checkpoint._checkpoint_without_reentrant_generator = generator
    checkpoint.CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = without_reentrant
        del checkpoint.CheckpointFunction.apply


_REMEMBERING = Shared(_remembering)
