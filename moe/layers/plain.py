"""Products, norms, a plain MLP, and the one rule for paths that stand in for them.

Shape suffixes: B batch, S sequence, D model width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels import ops
from moe.kernels.arguments import autocasts, transformed
from moe.weights import made_by_init_weights


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, rotations, routers and losses compute."""
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), but for free where x has it: in a step of generation the call would count."""
    return x if x.dtype == dtype else x.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off for a block of code; where it is off already, for free."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


# Marks a hook that takes whatever a module is called with and changes nothing, such as a clock's.
INDIFFERENT = "_indifferent_to_the_call"


def untouched(module: nn.Module, kind: type[nn.Module], *, called: bool = False) -> bool:
    """Whether a module is exactly ours, so that a fused path may stand in for it: the one rule for all of them.

    It is of the class `kind` itself, whose way of being called is the one that is written in it; nothing in its
    instance takes the place of a method; no hook, of its own or of all modules, waits for its call or its backward; its
    parameters and buffers are plain tensors, and it has no bias, as none of ours has. Anything else (an adapter, a
    quantised weight, a patched forward, a shard) must be called as the module that it is.

    Args:
        called: the fused path still calls the module, only with other arguments: then FSDP, whose hooks gather the
            weights, and hooks marked `INDIFFERENT` are welcome.
    """
    sharded = called and any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    if type(module) is not kind and not (sharded and kind in type(module).__mro__):
        return False
    if _replaces_a_method(module, kind) or _global_hooks() or not _as_written(kind):
        return False
    if module._parameters.get("bias") is not None:
        return False
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        if any(not (called and _indifferent(hook)) for hook in hooks.values()):
            return False
    tensors = (*module._parameters.values(), *module._buffers.values())
    return sharded or all(type(t) in (nn.Parameter, Tensor) for t in tensors if t is not None)


# What every module has, `forward` among it.
_METHODS = tuple(name for name in dir(nn.Module) if callable(getattr(nn.Module, name)))


def _replaces_a_method(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether something in the instance takes the place of a method of its class."""
    if torch.compiler.is_compiling():  # Dynamo of torch 2.11 looks names up in an instance, but cannot go through it
        return any([name in module.__dict__ for name in _METHODS])
    return any(callable(getattr(kind, name, None)) for name in module.__dict__)


def _as_written(kind: type[nn.Module]) -> bool:
    """Whether a class is called as its own lines say: nobody has put another `forward` or `__call__` into it since."""
    if torch.compiler.is_compiling():  # Dynamo does not look at code
        return True
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        forward = owner.__dict__.get("forward")
        if forward is not None and not _written_in(owner, forward):
            return False
    return kind.__call__ is nn.Module.__call__


def _written_in(owner: type, forward: Any) -> bool:
    code = getattr(forward, "__code__", None)  # of what is called, whatever functools.wraps says of it
    names = code is not None and (code.co_qualname, forward.__globals__.get("__name__"))
    return names == (f"{owner.__qualname__}.forward", owner.__module__)


def _indifferent(hook: Any) -> bool:
    return hasattr(hook, INDIFFERENT) or str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def _global_hooks() -> bool:
    modules = torch.nn.modules.module
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return any(getattr(modules, f"_global_{name}") for name in names)


# ------------------------------------------------------------------------------------------------- products and norms


class Linear(nn.Linear):
    """A bias-free nn.Linear that leaves its weight to `init_weights`, the one place where weights are made."""

    reset_parameters = made_by_init_weights

    def __init__(self, d_in: int, d_out: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw values
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.register_parameter("bias", None)


class Head(Linear):
    """The output layer: logits, or with targets their loss without ever holding the logits."""

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [..., D] -> logits [..., V]; with targets [...] the sum of -log softmax(logits)[target], a scalar."""
        if targets_BS is None:
            return super().forward(x_BSD)
        return ops.linear_cross_entropy(x_BSD.flatten(0, -2), self.weight, targets_BS.flatten())

    if TYPE_CHECKING:
        # Of nn.Module it is Any.
        def __call__(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor: ...


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in at least float32."""

    reset_parameters = made_by_init_weights

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def extra_repr(self) -> str:
        """For repr: width and epsilon."""
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        x_wide, weight = cast(x, wide), cast(self.weight, wide)
        with without_autocast(x.device.type):
            if x.device.type != "cpu" or transformed():
                return cast(F.rms_norm(x_wide, weight.shape, weight, self.eps), x.dtype)
            if torch.is_grad_enabled():
                return cast(_CpuRMSNorm.apply(x_wide, weight, self.eps), x.dtype)
            return cast((x_wide * _inverse_rms(x_wide, self.eps)).mul_(weight), x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (torch.linalg.vecdot(x, x) / x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


class _CpuRMSNorm(torch.autograd.Function):
    """RMS norm for a CPU, where torch has no fused one: fewer passes over memory, fewer operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        scaled = x * scale
        if torch.compiler.is_compiling():  # Dynamo of torch 2.11 loses the gradients of what was changed in place
            return scaled * weight
        return scaled.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        # With s = 1 / rms(x): dx = s w dy - s^3 x mean(w dy x), dw = sum over rows of s x dy.
        x, weight, scale = ctx.saved_tensors
        product = dy * x
        mean = (product @ weight).unsqueeze(-1) / x.shape[-1]
        dx = (dy * weight).mul_(scale).addcmul_(x, mean * scale**3, value=-1)
        return dx, scale.flatten() @ product.flatten(0, -2), None


class MLP(nn.Module):
    """A plain MLP, gated or not: what a layer without experts has. Gate and up are one product, as an expert's are."""

    def __init__(self, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w_in = Linear(d_model, ops.ACTIVATIONS[activation] * d_ff)
        self.w_out = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        h = rearrange(self.w_in(x), "... (g f) -> ... g f", g=ops.ACTIVATIONS[self.activation])
        return self.w_out(ops.activate(h, self.activation))
