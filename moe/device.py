"""Where and in which precision to compute, how much the device can do, and what makes a process on a CPU faster."""

import ctypes
import os
import platform
import sys
import time
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


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s that utilisation is measured against: the data sheet's, or a large product's, measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        hardware = device_hardware(torch.cuda.get_device_name(device))
        if hardware is not None:
            return hardware.peak("bf16").to("FLOP/s")
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best = min(_seconds(a) for _ in range(4))
    return 2 * size**3 / best


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

    Nothing here changes a result, apart from denormals.

    By default glibc gives every large tensor back to the kernel when it is freed, and the next one is zeroed anew, page
    by page: adding two 64 MB tensors takes 23 ms so, and 6 to 8 ms when the memory stays. Denormals, which vanishing
    gradients and optimizer averages are full of, cost a hundred cycles each.

    Returns:
        Whether the allocator was tuned: on Linux with glibc only.
    """
    torch.set_flush_denormal(True)
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 * 2**20))
    return all([mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings])
