"""Where the time of a step goes: every moment between two boundaries belongs to one component and one phase.

Boundaries are the calls of the model's modules, forward and backward, the spans inside the ops (kernels/spans.py) and
optimizer steps. Time inside a component that is not inside a smaller one is its own; what belongs to none is "other".
So the parts always add up to the whole. On CUDA the boundaries are events in the stream, and nothing waits for them.

Components: embedding, norm, projections (query, key, value, output), attention (rotation, scores, cache), router,
permute, up (with the activation), down, combine, experts (what is in none of these four), mlp (a plain one), head (with
the loss), optimizer, other. Phases: forward, backward, recompute (by activation checkpointing, or pre-activations made
again), update.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.autograd.profiler import record_function
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moe.kernels.spans import listening
from moe.layers import INDIFFERENT
from moe.profile.hooks import Hook, computes_again

Part = tuple[str, str]  # component, phase
OTHER: Part = ("other", "")


@dataclass
class _Frame:
    part: Part
    annotation: Any = None


class Timing:
    """What `timing` measured.

    Attributes:
        seconds: per (component, phase), filled when the block ends.
        calls: how often each was entered.
    """

    def __init__(self, device: torch.device, annotate: bool) -> None:
        self.seconds: dict[Part, float] = {}
        self.calls: dict[Part, int] = defaultdict(int)
        self._cuda = device.type == "cuda"
        self._annotate = annotate
        self._frames: list[_Frame] = []
        self._stamps: list[tuple[Any, Part]] = []  # from this moment on, this part

    @property
    def total(self) -> float:
        """Seconds of the whole block."""
        return sum(self.seconds.values())

    @contextmanager
    def span(self, component: str, phase: str = "forward") -> Iterator[None]:
        """A piece of work inside the block. Inside something that is recomputed, it is recomputed, too."""
        if phase == "forward" and self._frames and self._frames[-1].part[1] == "recompute":
            phase = "recompute"
        self.enter((component, phase))
        try:
            yield
        finally:
            self.leave((component, phase))

    def enter(self, part: Part) -> None:
        """From here on the time is this part's, until something inside it is entered, or it is left."""
        if part[1] == "backward":
            self._drop_recomputed()
        frame = _Frame(part)
        if self._annotate:
            frame.annotation = _annotation(" ".join(part))
            frame.annotation.__enter__()
        self._frames.append(frame)
        self.calls[part] += 1
        self._mark()

    def leave(self, part: Part) -> None:
        """The time is that of what was entered before again."""
        for i in range(len(self._frames) - 1, -1, -1):
            if self._frames[i].part == part:
                self._close(self._frames.pop(i))
                break
        self._mark()

    def _drop_recomputed(self) -> None:
        """Checkpointing runs a layer again only as far as it must, and leaves what it is in by an exception."""
        while self._frames and self._frames[-1].part[1] == "recompute":
            self._close(self._frames.pop())

    @staticmethod
    def _close(frame: _Frame) -> None:
        if frame.annotation is not None:
            frame.annotation.__exit__(None, None, None)

    def _mark(self) -> None:
        if self._cuda:
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self._stamps.append((stamp, self._frames[-1].part if self._frames else OTHER))

    def _finish(self) -> None:
        self._frames.clear()
        self._mark()
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[Part, float] = defaultdict(float)
        for (begin, part), (end, _) in zip(self._stamps, self._stamps[1:], strict=False):
            seconds[part] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        self.seconds = dict(seconds)
        self._stamps.clear()


@contextmanager
def timing(model: nn.Module, *, annotate: bool = False) -> Iterator[Timing]:
    """Measures what happens inside the block: forward passes, backwards, optimizer steps, decoding.

    Of transformers' models, forward passes only: their modules are called in ways that hide where a backward ends. What
    torch.compile made of a model has no place for the clock: its time is mostly "other".

    Args:
        annotate: also name the parts in torch.profiler's traces and, on CUDA, as NVTX ranges. Costs time of its own.

    Raises:
        RuntimeError: another measurement is running.
    """
    device = next(model.parameters()).device
    found = Timing(device, annotate)
    with ExitStack() as handles, listening(found.span):
        for handle in _hooks(model, found):
            handles.callback(handle.remove)
        found._mark()
        yield found
        found._finish()


def component_of(path: str, module: nn.Module) -> str | None:
    """The component whose work a module does, ours or transformers', by its class; None for a mere container."""
    kind, name = type(module).__name__, path.rpartition(".")[2]
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return "head" if name in ("head", "lm_head") else "projections" if "att" in path else None
    for ending, component in (
        ("RMSNorm", "norm"),
        ("Attention", "attention"),
        ("Router", "router"),
        ("Experts", "experts"),
        ("MLP", "mlp"),
    ):
        if kind.endswith(ending):
            return component
    return None


def _hooks(model: nn.Module, t: Timing) -> Iterator[Any]:
    """Hooks at the beginning and the end of every component's work; their handles."""
    ours = type(model).__module__.startswith("moe.")
    for path, module in model.named_modules():
        component = component_of(path, module)
        if component is None:
            continue
        yield module.register_forward_pre_hook(_before(t, component))
        yield module.register_forward_hook(_after(t, component))
        if not ours:
            continue
        if component == "embedding":
            # Ids have no gradient: its backward begins with the output's, and ends with the weight's.
            yield module.register_forward_hook(_backward_from_output(t, component))
            weight: Any = module.weight
            if weight.requires_grad:
                yield weight.register_post_accumulate_grad_hook(_do(t.leave, (component, "backward")))
        else:
            yield module.register_full_backward_pre_hook(_do(t.enter, (component, "backward")))
            yield module.register_full_backward_hook(_do(t.leave, (component, "backward")))
    yield register_optimizer_step_pre_hook(_do(t.enter, ("optimizer", "update")))
    yield register_optimizer_step_post_hook(_do(t.leave, ("optimizer", "update")))


def _before(t: Timing, component: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        t.enter((component, _forward_phase()))

    return _indifferent(hook)


def _after(t: Timing, component: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        t.leave((component, _forward_phase()))

    return _indifferent(hook)


def _backward_from_output(t: Timing, component: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(_do(t.enter, (component, "backward")))

    return _indifferent(hook)


def _forward_phase() -> str:
    return "recompute" if computes_again() else "forward"


def _do(act: Callable[[Part], None], part: Part) -> Callable[..., None]:
    def hook(*_args: Any, **_kwargs: Any) -> None:
        act(part)

    return _indifferent(hook)


def _indifferent(function: Callable[..., None]) -> Hook:
    """A clock must not change which way a module goes: it says that it takes any call and changes nothing."""
    hook = Hook(function)
    setattr(hook, INDIFFERENT, True)
    return hook


def _annotation(name: str) -> AbstractContextManager[Any]:
    if not torch.cuda.is_available():
        return record_function(name)
    both = ExitStack()
    both.enter_context(record_function(name))
    # Ranges with a beginning and an end, unlike those that are pushed and popped, may end in another thread.
    both.callback(torch.cuda.nvtx.range_end, torch.cuda.nvtx.range_start(name))
    return both
