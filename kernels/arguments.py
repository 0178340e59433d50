"""What all ops here ask of their arguments, and what they do where torch calls them in an unusual way.

Shapes, dtypes and devices are looked at in the ops' functions, eager and compiled, on the meta device and of fakes
alike. Values, which ids are inside and which not, are looked at inside the custom ops, where there are always values:
on a CPU, where looking costs nothing, an error names the value and its row; elsewhere looking would wait for the
device, and an id outside ends in an assertion on the device, as in torch's own indexing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from moe.kernels import cards


def check_kinds(**tensors: Tensor | None) -> None:
    """Tensors on one device, floating-point but for ids and targets, which are int64.

    Raises:
        ValueError: one that is not; the message names it.
    """
    check_device(**tensors)
    for name, t in tensors.items():
        if t is not None and not (t.dtype == torch.int64 if name in ("ids", "targets") else t.is_floating_point()):
            wanted = "int64" if name in ("ids", "targets") else "floating point"
            raise ValueError(f"{name} must be {wanted}; got {t.dtype}")


def check_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all are tensors, dense ones, on one device."""
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise ValueError(f"{name} must be a tensor; got {type(t).__name__}")
        if t is not None and t.layout != torch.strided:
            raise ValueError(f"{name} must be dense; got {t.layout}: give {name}.to_dense()")
    devices = [t.device for t in tensors.values() if t is not None]
    if devices.count(devices[0]) < len(devices):
        found = ", ".join(f"{name} {t.device}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"all tensors must be on one device; got {found}")


def check_integers(what: str, ids: Any) -> None:
    """For a model's inputs.

    Raises:
        ValueError: no tensor, or not of int64 (tokens may be int32, too; documents, which are only compared, anything
            but floating point).
    """
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"{what} of type {type(ids).__name__}: must be a tensor of int64, as torch.tensor makes of ints"
        )
    fits = not ids.is_floating_point() if what == "documents" else ids.dtype in (torch.int64, torch.int32)
    if not fits or (what == "targets" and ids.dtype != torch.int64):
        raise ValueError(f"{what} of {ids.dtype}: must be int64, as {what}.long() gives")


def check_vocabulary(what: str, ids: Tensor, n: int, name: str, unless: int | None = None) -> None:
    """Raises ValueError for ids outside [0, n), the vocabulary of the model `name`, where looking costs nothing."""
    if not can_read(ids) or not ids.numel():
        return
    low, high = (bound.item() for bound in (ids if unless is None else ids.masked_fill(ids == unless, 0)).aminmax())
    if low < 0 or high >= n:
        raise ValueError(
            f"{what} id {low if low < 0 else high} is outside the vocabulary of {n} ids ({name}): the text was encoded "
            "with another tokenizer"
        )


def check_ids(ids: Tensor, n: int, name: str) -> None:
    """For the inside of custom ops: every id [T, K] is in [0, n).

    Raises:
        ValueError: on a CPU, an id outside; the message names it and its row. Elsewhere: an assertion on the device.
    """
    if ids.device.type != "cpu":
        torch.ops.aten._assert_async.msg(((ids >= 0) & (ids < n)).all(), f"{name} outside [0, {n})")
    elif ids.numel():
        low, high = (bound.item() for bound in ids.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"{name} = {_place(ids, (ids < 0) | (ids >= n))}: must be in [0, {n})")


def _place(ids: Tensor, wrong: Tensor) -> str:
    at = wrong.nonzero()[0].tolist()
    return f"{ids[tuple(at)].item()} in row {at[0]}"


@torch.library.custom_op("gpt4_moe::checked_choice", mutates_args=())
def checked_choice(ids: Tensor, n: int, name: str) -> Tensor:
    """A copy of ids [..., K] that are all in [0, n) and differ within each row; raises as `check_ids`."""
    check_ids(ids, n, name)
    ordered = ids.sort(-1).values
    distinct = (ordered.diff(dim=-1) > 0).all(-1)
    if ids.device.type != "cpu":
        torch.ops.aten._assert_async.msg(distinct.all(), f"{name}: an id twice in one row")
    elif not distinct.all():
        row = (~distinct).nonzero()[0].tolist()
        raise ValueError(f"{name} has row {row[-1]} = {ids[tuple(row)].tolist()}: the ids of a row must differ")
    return ids.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("gpt4_moe::checked_ids", mutates_args=())
def checked_ids(ids: Tensor, n: int, name: str) -> Tensor:
    """A copy of ids [..., K] that are all in [0, n); raises as `check_ids`."""
    check_ids(ids, n, name)
    return ids.clone(memory_format=torch.contiguous_format)


def _like(ids: Tensor, n: int, name: str) -> Tensor:
    return ids.new_empty(ids.shape)


for _op in (checked_choice, checked_ids):
    _op.register_fake(_like)
    # Any leading dimensions do, so a batch of calls is one call.
    _op.register_vmap(lambda info, dims, ids, n, name, op=_op: (op(ids.movedim(dims[0], 0), n, name), 0))


def float32_precision(asked: str | None, x: Tensor) -> str:
    """How Triton multiplies float32 operands: exactly, unless the caller allows less, here or else in torch."""
    if x.dtype != torch.float32:
        return "ieee"
    # What `allow_tf32` and `set_float32_matmul_precision` set can be read here, too; the other way round it raises.
    if asked or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return asked or "ieee"
    return "ieee" if x.device.type == "cuda" and cards.why_not_precision(x.device, "tf32") else "tf32"


_HERE = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """For the inside of custom ops: a context whose current device is the tensor's, as Triton launches on that one."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def transformed() -> bool:
    """Whether torch.func's transforms, or forward-mode differentiation, are at work.

    They do not go through custom ops: what is computed then has to be differentiable torch all the way, in shapes that
    do not depend on values.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_values(x: Tensor) -> bool:
    """Whether a tensor's values can be looked at: not on meta, in a fake tensor, in a graph that is being traced (what
    was seen would become a constant of it), or under a transform of torch.func."""
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return False
    if torch.jit.is_tracing() or get_proxy_mode() is not None:  # type: ignore[attr-defined]
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]


def undispatched(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op may be called without torch's dispatcher: nobody traces, watches or stands in for these tensors."""
    plain = all(t is None or type(t) in (Tensor, nn.Parameter) for t in others)
    return plain and has_values(x) and torch._C._len_torch_dispatch_stack() == 0


def can_read(x: Tensor) -> bool:
    """Whether that costs no wait for a device either."""
    return x.device.type == "cpu" and has_values(x)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; devices without one, such as meta, may be asked too."""
    # Dynamo of torch 2.11 cannot ask; of what code is compiled for, meta alone has none.
    has_one = device_type != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device_type)
    return has_one and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, *tensors: Tensor | None) -> Sequence[Any]:
    """The tensors as autocast, where it is on, wants them: in its dtype, but float64 stays, as everywhere in torch."""
    if not autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def no_second_derivative(*gradients: Tensor | None) -> None:
    """For backward functions: raises where a gradient comes to what only the backward reads."""
    if any(g is not None for g in gradients):
        raise RuntimeError(
            "this op has no second derivative by backward(create_graph=True): take torch.func.grad of torch.func.grad"
        )
