"""A machine that runs the Gluon kernels' own source line by line on a CPU: warps in any order, everything late.

Triton's interpreter does not know Gluon. Here the functions' bodies run as Python, with the dozen operations that they
use replaced by ones that keep to the hardware's rules:

- the partitions of a program take turns at random, and only at random does a copy under way arrive;
- a box that is loaded is written into shared memory when it arrives, and counts its bytes then, not before;
- a product reads its operands when a wait retires it, and a store its buffer when it is waited for: whoever gives
  memory back too early reads what came after;
- a barrier counts arrivals and bytes, and knows its phase by parity alone, as mbarriers do.

It raises when all partitions wait for each other, when a barrier is arrived at too often, when a store was not fenced,
when an address is outside of its tensor, and when an element of the output is written twice.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Barrier:
    """An mbarrier of PTX ISA, 9.7.13.15: a phase ends when nothing is pending, neither arrivals nor bytes."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def arrive(self, n: int = 1) -> None:
        assert self.pending >= n, "more arrivals in a phase than the barrier counts"
        self.pending -= n
        self.turn()

    def turn(self) -> None:
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over; before the first, the one before it counts as over."""
        assert self.count, "a wait at a barrier that was not initialised"
        return self.phase & 1 != parity


class Shared:
    """Shared memory: a view of a tensor, or barriers."""

    def __init__(self, at: Any, machine: "Machine") -> None:
        self.at, self.machine = at, machine

    def index(self, i: int) -> Any:
        assert 0 <= i < len(self.at)
        return self.at[i] if isinstance(self.at, list) else Shared(self.at[i], self.machine)

    def slice(self, start: int, length: int) -> "Shared":
        assert start + length <= len(self.at)
        return Shared(self.at[start : start + length], self.machine)

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.at.view(shape), self.machine)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.at.permute(order), self.machine)

    def store(self, values: Tensor) -> None:
        assert self.at.shape == values.shape
        self.at.copy_(values)
        self.machine.running.fenced = False
        self.machine.running.pause()


class Values(torch.Tensor):
    """A tensor in registers."""

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.unbind(-1)


class Accumulator:
    """What products under way will add up to."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class Box:
    """A tensor map: boxes at coordinates, with the bounds and the 64-bit arithmetic of TMA."""

    def __init__(self, descriptor: Any) -> None:
        self.base, self.dtype, self.layout = descriptor.base, descriptor.base.dtype, descriptor.layout
        self.shape, self.strides = descriptor.shape, descriptor.strides
        self.block_type = SimpleNamespace(shape=list(descriptor.block_shape))
        self.bytes = descriptor.base.element_size() * torch.Size(descriptor.block_shape).numel()
        self.written: Counter[int] = Counter()

    def places(self, coordinates: list[int]) -> tuple[Tensor, Tensor]:
        """Which elements of the box exist [block], and where in the tensor these stand."""
        exists = torch.ones(self.block_type.shape, dtype=torch.bool)
        at = torch.zeros(self.block_type.shape, dtype=torch.int64)
        for d, n in enumerate(self.block_type.shape):
            line = [1] * len(self.shape)
            line[d] = n
            i = (torch.arange(n) + coordinates[d]).view(line)
            exists &= (i >= 0) & (i < self.shape[d])
            at += i * self.strides[d] * self.base.element_size()  # int64 wraps around, as addresses do
        at = at[exists] // self.base.element_size()
        assert ((at >= 0) & (at < self.base.numel())).all(), "an address outside of the tensor"
        return exists, at

    def flat(self) -> Tensor:
        return self.base.view(-1)


class Pointer:
    def __init__(self, t: Tensor, at: int = 0) -> None:
        self.t, self.at = t, at

    def __add__(self, n: int) -> "Pointer":
        return Pointer(self.t, self.at + n)


def load(pointer: Pointer) -> int:
    assert 0 <= pointer.at < pointer.t.numel(), "an address outside of the tensor"
    return int(pointer.t.view(-1)[pointer.at])


class Partition(threading.Thread):
    """A group of warps. It runs only while the machine lets it, from one `pause` to the next."""

    def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.function, self.arguments = function, arguments
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.until: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self.done, self.fenced = False, True
        self.products: list[tuple[Accumulator, Tensor, Tensor, bool]] = []
        self.stores: list[Callable[[], None]] = []

    def run(self) -> None:
        self.go.acquire()
        try:
            self.function(*self.arguments)
            assert not self.products, "a product that nobody waited for"
            assert not self.stores, "a store whose buffer is given up while it is read"
        except BaseException as error:
            self.error = error
        self.done = True
        self.paused.release()

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        self.until = until
        self.paused.release()
        self.go.acquire()


class Machine:
    """Runs a kernel's programs one after the other. Called as `machine[grid](*arguments, **constants)`."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.random, self.program = random.Random(seed), 0
        self.running: Any = None
        self.arrivals: list[Callable[[], None]] = []
        self.known: dict[Any, Callable[..., Any]] = {}
        self.kernel = self.as_python(kernel)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4

            def given(value: Any) -> Any:
                if hasattr(value, "block_shape"):
                    return Box(value)
                return Pointer(value) if isinstance(value, Tensor) else value

            operands = [given(value) for value in arguments]
            for self.program in range(grid[0]):
                self.kernel(*operands, **constants)

        return launch

    def as_python(self, jitted: Any) -> Callable[..., Any]:
        """A kernel's function with the operations of this machine, and so are the functions that it calls."""
        f = jitted.fn
        if f not in self.known:
            scope = {**f.__globals__, **self.operations()}
            self.known[f] = FunctionType(f.__code__, scope, f.__name__, f.__defaults__)
            for name in f.__code__.co_names:
                if hasattr(f.__globals__.get(name), "fn"):
                    scope[name] = self.as_python(f.__globals__[name])
        return self.known[f]

    def operations(self) -> dict[str, Any]:
        gl = SimpleNamespace(
            program_id=lambda axis: self.program,
            load=load,
            zeros=lambda shape, dtype, layout: torch.full(shape, torch.nan).as_subclass(Values),
            allocate_shared_memory=self.allocate,
            static_range=range,
            warp_specialize=self.warp_specialize,
            NVMMADistributedLayout=lambda *_: None,
            NVMMASharedLayout=lambda **_: None,
            int64="barriers",
            float32=torch.float32,
        )
        tl = SimpleNamespace(load=load, minimum=minimum, maximum=maximum, cdiv=lambda a, b: -(-a // b), exp=torch.exp)
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None, init=self.init, wait=self.wait, expect=self.expect, arrive=self.arrive
        )
        return {
            "gl": gl,
            "tl": tl,
            "mbarrier": mbarrier,
            "tma": SimpleNamespace(store_wait=self.store_wait),
            "load_box": self.load_box,
            "store_box": self.store_box,
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
        }

    # ------------------------------------------------------------------------------------------------- partitions

    def warp_specialize(
        self, functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]
    ) -> None:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        partitions = [Partition(f, arguments) for f, arguments in functions]
        for p in partitions:
            p.start()
        while not all(p.done for p in partitions):
            ready: list[Any] = [p for p in partitions if not p.done and p.until()]
            ready += self.arrivals
            assert ready, "deadlock: every partition waits"
            chosen = self.random.choice(ready)
            if not isinstance(chosen, Partition):
                self.arrivals.remove(chosen)
                chosen()
                continue
            self.running = chosen
            chosen.go.release()
            chosen.paused.acquire()
            if chosen.error:
                raise chosen.error
        assert not self.arrivals, "a load that nobody waited for"

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        if dtype == "barriers":
            return Shared([Barrier() for _ in range(shape[0])], self)
        return Shared(torch.full(shape, torch.nan), self)

    # --------------------------------------------------------------------------------------------------- barriers

    def init(self, barrier: Barrier, count: int) -> None:
        assert not barrier.count
        barrier.count = barrier.pending = count

    def wait(self, barrier: Barrier, parity: int) -> None:
        assert parity in (0, 1)
        self.running.pause(lambda: barrier.passed(parity))

    def expect(self, barrier: Barrier, n: int) -> None:
        barrier.bytes += n
        barrier.arrive()

    def arrive(self, barrier: Barrier, count: int, pred: bool = True) -> None:
        if pred:
            barrier.arrive(count)
        self.running.pause()

    # ----------------------------------------------------------------------------------------------------- copies

    def load_box(self, box: Box, coordinates: list[int], barrier: Barrier, to: Shared) -> None:
        assert list(to.at.shape) == box.block_type.shape

        def arrive() -> None:
            exists, at = box.places(coordinates)
            to.at.zero_()
            to.at[exists] = box.flat()[at].float()
            barrier.bytes -= box.bytes
            assert barrier.bytes >= 0, "more bytes than the barrier expects"
            barrier.turn()

        self.arrivals.append(arrive)
        self.running.pause()

    def store_box(self, box: Box, coordinates: list[int], of: Shared) -> None:
        assert list(of.at.shape) == box.block_type.shape
        assert self.running.fenced, "TMA would read what was written before the fence"

        def read() -> None:
            exists, at = box.places(coordinates)
            box.written.update(at.tolist())
            assert max(box.written.values(), default=0) <= 1, "an element of the output is written twice"
            box.flat()[at] = of.at[exists].to(box.dtype)

        self.running.stores.append(read)
        self.running.pause()

    def store_wait(self, pending: int) -> None:
        self.running.pause()
        while len(self.running.stores) > pending:
            self.running.stores.pop(0)()

    def fence(self) -> None:
        if self.running:
            self.running.fenced = True

    # --------------------------------------------------------------------------------------------------- products

    def warpgroup_mma(self, a: Shared, b: Shared, acc: Any, use_acc: bool, is_async: bool) -> Accumulator:
        assert is_async
        acc = acc if isinstance(acc, Accumulator) else Accumulator(acc)
        self.running.products.append((acc, a.at, b.at, use_acc))
        self.running.pause()
        return acc

    def warpgroup_mma_wait(self, pending: int, deps: tuple[Any]) -> Any:
        (acc,) = deps
        while len(self.running.products) > pending:
            into, a, b, use_acc = self.running.products.pop(0)
            product = a @ b
            into.values = (into.values + product if use_acc else product).as_subclass(Values)
        return acc.values if pending == 0 else acc


def minimum(a: Any, b: Any) -> Any:
    return torch.clamp(a, max=b) if isinstance(a, Tensor) else min(a, b)


def maximum(a: Any, b: Any) -> Any:
    return torch.clamp(a, min=b) if isinstance(a, Tensor) else max(a, b)
