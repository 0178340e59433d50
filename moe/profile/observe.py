"""Sees what every router of a model chooses, in any forward pass, ours or transformers', without asking the caller.

A pass is complete when each router has spoken once, in order; what a backward computes again (activation
checkpointing) is not a pass. Shape suffixes: L layers, B batch, S sequence, T = B*S tokens, E experts, K experts per
token.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from moe.errors import NotObservable
from moe.experts import Router
from moe.hf import routers as foreign
from moe.kernels import ops


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


def _placed(called: dict[str, Tensor], T: int) -> tuple[tuple[int, int], Tensor | None, Tensor | None]:
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
    """Calls `on_pass` at the end of every forward pass of `model`.

    Raises:
        NotObservable: no routers, or, at the call, one whose result is not (logits, weights, ids).
    """
    layers = routers(model)
    spoken: list[tuple[Tensor, Tensor, Tensor]] = []
    called: dict[str, Tensor] = {}
    parameters = inspect.signature(model.forward)

    def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.clear()
        given = parameters.bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        for what, names in _CALLED_WITH.items():
            value = next((given[name] for name in names if name in given), None)
            if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
                called[what] = value

    def on_router(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Inside a backward: activation checkpointing runs the layer again.
            if torch._C._current_graph_task_id() != -1:
                return
            if layer == 0:
                spoken.clear()
            if layer == len(spoken):
                spoken.append(_routing(module, output))
            if len(spoken) == len(layers):
                ids, weights, logits = (torch.stack(parts) for parts in zip(*spoken, strict=True))
                spoken.clear()
                on_pass(Pass(ids, weights, logits, *_placed(called, ids.shape[1])))

        return hook

    handles = [model.register_forward_pre_hook(on_call, with_kwargs=True)]
    handles += [router.register_forward_hook(on_router(i)) for i, router in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routing(module: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, K], weights [T, K] and logits [T, E] from what a router returned."""
    if isinstance(module, Router):
        return output.ids_TK.detach(), output.weights_TK.detach(), output.logits_TE.detach()
    return foreign.routing_of(module, output)


# -------------------------------------------------------------------------------------------------------- overriding

# The experts, int64 [T, K], for (layer, T, device).
Given = Callable[[int, int, torch.device], Tensor]


@contextmanager
def override(model: nn.Module, given: Given) -> Iterator[None]:
    """Inside the block, the routers take the experts of `given(layer, T, device)`, int64 [T, K], weighed as ever.

    Raises:
        NotObservable: a router of transformers whose way of weighing is not known here.
    """
    handles, ours = [], []
    for layer, router in enumerate(routers(model)):
        if isinstance(router, Router):
            router.choose = _choice(router, layer, given)  # type: ignore[method-assign]
            ours.append(router)
        else:
            if type(router).__name__ not in foreign.WEIGHINGS:
                raise NotObservable(f"{type(router).__name__}: its weights cannot be made for given experts here")
            handles.append(router.register_forward_hook(_replacement(layer, given)))
    try:
        yield
    finally:
        for router in ours:
            del router.choose
        for handle in handles:
            handle.remove()


def _choice(router: Router, layer: int, given: Given) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def choose(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return ops.topk_gate(logits_TE, router.top_k, given_TK=given(layer, len(logits_TE), logits_TE.device))

    return choose


def _replacement(layer: int, given: Given) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        logits, _, ids = output
        new = given(layer, ids.shape[:-1].numel(), ids.device).view(ids.shape)
        return logits, foreign.WEIGHINGS[type(module).__name__](module, logits, new), new

    return hook
