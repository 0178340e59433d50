"""Where and in which precision to compute, how much the device can do, and what makes a process on a CPU faster."""

import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moe.config import TrainConfig
from moe.errors import ConfigError
from moe.plan.hardware import device_hardware


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; None takes CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device = {name!r}: cannot be used here ({reason}); cpu always can") from None


def pick_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype:
    """What matrix products compute in; weights and optimizer stay float32.

    "auto": bfloat16 on CUDA, and on CPUs with instructions for it (amx_bf16, avx512_bf16), where it is faster than
    float32; without them it is several times slower. GPT4_MOE_CPU_BF16 = 1 or 0 in the environment says what the CPU
    has, for results that do not depend on the machine.
    """
    if cfg.dtype != "auto":
        return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    said = os.environ.get("GPT4_MOE_CPU_BF16", "")
    if said not in ("", "0", "1"):
        raise ConfigError(f"GPT4_MOE_CPU_BF16 = {said!r} in the environment: must be 1 or 0, or not be set")
    return said == "1" if said else not {"amx_bf16", "avx512_bf16"}.isdisjoint(_cpu_flags())


def device_name(device: torch.device) -> str:
    """What a device calls itself; of a CPU the processor, and how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {_cpu_info('model name') or platform.machine()}"


def _cpu_flags() -> set[str]:
    return set(_cpu_info("flags").split())


def _cpu_info(field: str) -> str:
    """What Linux says of the first processor; "" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s that utilisation is measured against: the data sheet's, or a large product's, measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        hardware = device_hardware(torch.cuda.get_device_name(device))
        if hardware is not None:
            return hardware.peak("bf16").to("FLOP/s")
    # On a CPU that has to emulate the dtype, a large product takes seconds, and a small one says the same.
    sizes = (256, 1024) if device.type == "cpu" else (8192,)
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = min(_seconds(a) for _ in range(4))
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.005:
            break
    return best


def _seconds(a: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------- a process on a CPU

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_cpu() -> bool:
    """Keeps freed memory for reuse and rounds denormal numbers to zero. Call once, before the first large tensor.

    Nothing here changes a result, apart from denormals; `callers_state` takes that back.

    By default glibc gives every large tensor back to the kernel when it is freed, and the next one is zeroed anew, page
    by page: adding two 64 MB tensors takes 23 ms so, and 6 to 8 ms when the memory stays. Denormals, which vanishing
    gradients and optimizer averages are full of, cost a hundred cycles each.

    Returns:
        Whether the allocator was tuned: on Linux with glibc only.
    """
    flush_denormals(True)
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 * 2**20))
    return all([mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings])


def flush_denormals(on: bool) -> None:
    """Whether denormals are rounded to zero, in this thread and in those that torch shares its work among.

    torch.set_flush_denormal alone sets the mode of the calling thread; the threads of its pool have that of the moment
    when they were started. They are reached through the OpenMP library that torch comes with, on Linux.
    """
    torch.set_flush_denormal(on)
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
    if parallel is not None and torch.get_num_threads() > 1:
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: torch.set_flush_denormal(on) and None)
        parallel(body, None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))


def flushes_denormals() -> bool:
    """Whether this thread rounds denormals to zero."""
    smallest = torch.ones(1, dtype=torch.int32, device="cpu").view(torch.float32)
    return not (smallest * 1).view(torch.int32).item()


@contextmanager
def callers_state(device: torch.device) -> Iterator[None]:
    """What training wants of torch's state inside; whatever happens there, the caller's own is there again afterwards.

    Inside: gradients are recorded and new tensors are float32. Kept for the caller: that, how denormals are rounded,
    the number of threads, the precision of float32 products, and the random generators.
    """
    flushing, dtype, threads = flushes_denormals(), torch.get_default_dtype(), torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            if torch.get_float32_matmul_precision() != precision:
                torch.set_float32_matmul_precision(precision)
            if flushes_denormals() != flushing:
                flush_denormals(flushing)


# ------------------------------------------------------------------------------------------------------------- memory

# Where a control group, as it is seen from inside a container, says what it may use and what it uses: versions 2 and 1.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def memory_available(device: torch.device) -> int:
    """What the device has in all, or a container's share of it; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
    return int(min([installed, *(_bytes(limit) for limit, _ in CGROUPS)]))


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors may take: on CUDA what the driver has and what torch holds unused; on a CPU what Linux
    calls available, within the limit of a container. Elsewhere all memory that is installed."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = memory_available(device) or 2**32
    groups = ((_bytes(limit), _bytes(used)) for limit, used in CGROUPS)
    return int(max(0, min([free, *(limit - used for limit, used in groups if used < math.inf)])))


def _bytes(file: Path) -> float:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf
