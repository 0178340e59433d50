"""Launches for which Triton does not look at everything anew.

`kernel[grid](...)` of Triton binds some thirty arguments by their names, specialises on each, and looks up by a text
what it has compiled for them. That is most of what a launch costs the host, and a token's forward has four. Here it is
kept what was compiled, under what Triton specialises on: dtype and alignment of pointers, values of numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.knobs import runtime
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


def cdiv(n: int, of: int) -> int:
    """n / of, rounded up. Triton's own, for the host as for kernels, takes microseconds."""
    return -(-n // of)


def power_of_2(n: int) -> int:
    """The smallest that is not less than n > 0."""
    return 1 << (n - 1).bit_length()


def remembered(kernel: Any) -> Any:
    """Decorates what `triton.jit` has made; the interpreter's functions stay as they are."""
    return Launcher(kernel) if isinstance(kernel, JITFunction) else kernel


class Launcher:
    """`launcher[grid](*arguments, **constants)`, as of the kernel that is its `jit`."""

    def __init__(self, jit: JITFunction) -> None:
        self.jit = jit
        known = [(i, p) for i, p in enumerate(jit.params) if not (p.is_constexpr or p.do_not_specialize)]
        self._aligned = _getter([i for i, p in known if not p.do_not_specialize_on_alignment])
        anywhere = [i for i, p in known if p.do_not_specialize_on_alignment]
        self._anywhere = _getter(anywhere) if anywhere else None
        self._made: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Arguments are all given by position, constants by name."""
        active: Any = driver.active
        device = active.get_current_device()
        looks = [
            (a.dtype, not a.data_ptr() & 15) if isinstance(a, Tensor) else a if type(a) is int else _look(a)
            for a in self._aligned(arguments)
        ]
        if self._anywhere:
            looks += [
                a.dtype if isinstance(a, Tensor) else a if type(a) is int else _look(a)
                for a in self._anywhere(arguments)
            ]
        key = (device, *looks, *constants, *constants.values())
        made = self._made.get(key)
        if made is None:
            compiled = self.jit[grid](*arguments, **constants)
            if type(compiled) is CompiledKernel:
                # In the order of the parameters; compiled kernels pass over constants.
                rest = tuple(constants[p.name] for p in self.jit.params[len(arguments) :])
                self._made[key] = compiled, rest
            return
        compiled, rest = made
        stream = active.get_current_stream(device)
        metadata, enter, leave = None, runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            metadata = compiled.launch_metadata(grid, stream, *arguments, *rest)
        else:
            enter = leave = None
        compiled.run(
            grid[0], grid[1] if len(grid) > 1 else 1, 1, stream,
            compiled.function, compiled.packed_metadata, metadata, enter, leave, *arguments, *rest,
        )  # fmt: skip


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], Sequence[Any]]:
    """Takes those from a call's arguments."""
    return itemgetter(*places) if len(places) > 1 else lambda arguments: [arguments[i] for i in places]


def _look(argument: TensorDescriptor | None) -> Any:
    return argument and (argument.base.dtype, *argument.block_shape)
