"""Triton's real JIT compiler and launcher on a GPU that is not there (fakecuda.c).

So one learns what a launch costs the host, whether each launch and tensor map is one that the card takes, and how many
kernels a sequence of calls compiles.

`install` comes before the import of moe.kernels, in a process of its own: it tells torch and Triton of the card.
Tensors may be on "meta", of any size, or on the CPU. A launch or map that the card would refuse raises.
"""

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from moe.kernels.cards import CARDS, Card, refusal

HERE = Path(__file__).parent


# Those that there can be.
ARCHITECTURES = [arch for arch, card in CARDS.items() if card.capability and not refusal(card)]


class Counts(NamedTuple):
    """Of a call: launches, tensor maps, and those among both that the card refused."""

    launches: int
    maps: int
    faults: int


class Standin:
    """What `install` returns."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._read = [getattr(library, f"standin_{name}") for name in Counts._fields]
        for function in self._read:
            function.restype = ctypes.c_long

    def counts(self) -> Counts:
        """Since the beginning."""
        return Counts(*(function() for function in self._read))

    def count(self, call: Callable[[], Any]) -> Counts:
        """Of one call."""
        before = self.counts()
        call()
        return Counts(*(b - a for a, b in zip(before, self.counts(), strict=True)))

    @contextmanager
    def compilations(self) -> Iterator[dict[str, set[str]]]:
        """Inside, kernels are neither compiled nor launched; by name, the specialisations that would be compiled.

        Of those that this process has not launched before.
        """
        from triton import knobs

        found: dict[str, set[str]] = {}

        def hook(*, key: str, fn: Any, **_: Any) -> bool:
            found.setdefault(f"{fn.module.rpartition('.')[2]}.{fn.name}", set()).add(str(key))
            return True  # which tells the JIT to let it be

        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
        try:
            yield found
        finally:
            knobs.runtime.jit_cache_hook = before


def install(arch: str = "sm_90") -> Standin:
    """Put the card where torch.cuda and Triton look for one.

    Raises:
        RuntimeError: it is too late for it, as the kernels are imported already.
    """
    if "moe.kernels.tiles" in sys.modules:
        raise RuntimeError("install comes before the import of moe.kernels, which looks for a GPU")
    card = CARDS[arch]
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["GPT4_MOE_TILES"] = os.devnull + "/none"  # no file of tuned tiles
    library = _build()
    library.standin_card(*capability(card), card.multiprocessors, card.shared)
    _tell_torch(card)
    _tell_triton()
    return Standin(library)


def capability(card: Card) -> tuple[int, int]:
    assert card.capability is not None
    return card.capability


def _build() -> ctypes.CDLL:
    """Compile and load the library, by the name under which everything looks for CUDA's."""
    import triton

    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    path = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", path]
    subprocess.run([*command, HERE / "fakecuda.c"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _tell_torch(card: Card) -> None:
    major, minor = capability(card)
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=card.multiprocessors,
        shared_memory_per_block_optin=card.shared,
        name=f"no GPU ({card.arch})",
    )
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: (major, minor)
    torch.cuda.get_device_name = lambda device=None: properties.name


def _tell_triton() -> None:
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = torch.cuda.get_device_capability
    triton.runtime.driver.set_active(driver)
