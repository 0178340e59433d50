"""The planner's prediction beside what a run measured, and the row that `moe plan calibrate` reads."""

import contextlib
import ctypes
import math
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from moe import device as devices
from moe.config import Config, ExpertsConfig
from moe.model import Transformer
from moe.plan.calibrate import FILE, append_row
from moe.plan.device import device_memory, device_step_work
from moe.plan.quantities import number
from moe.train.optimizer import build


def memory_in_use(device: torch.device) -> int:
    """Bytes that the process holds on the device now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def memory_before(device: torch.device) -> int:
    """Bytes that it holds before a model is there, but with all that training will have loaded.

    In a process, the first optimizer loads torch's compiler, 150 MB, and the first step the code of every operation: so
    a step is made, of the smallest model there is. On a GPU only tensors count, and none is there yet.
    """
    if device.type == "cpu":
        _smallest_step()
        give_back()
    return memory_in_use(device)


def give_back() -> None:
    """Returns what the heap keeps for reuse (moe/device.py), of work that is over, to the system, where it is glibc's.

    Else what the preparation of data or an earlier run once held would count as this one's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def reset_peak(device: torch.device) -> None:
    """Lets `memory_peak` count from now on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def _smallest_step() -> None:
    smallest = Config(experts=ExpertsConfig(n_experts=2)).scaled(d_model=96, n_layers=1, vocab_size=64, max_seq_len=8)
    model, tokens_BS = Transformer(smallest), torch.zeros(1, 8, dtype=torch.int64)
    loss = model(tokens_BS, tokens_BS).loss
    assert loss is not None
    loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


def memory_peak(device: torch.device) -> int:
    """The most that it held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage would count, from before exec, what the process that started this one held
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Of a process that trains on a CPU: its heap, which keeps freed memory for reuse (moe/device.py), over its tensors.
# Replicas of 16 to 23M parameters, 1,024 to 8,192 tokens at a time, took 1.19 to 1.34.
HEAP = 1.25


def process_memory(cfg: Config, micro_batch: int, dtype: torch.dtype, device: torch.device, before: int) -> int:
    """Bytes at the peak of training, `micro_batch` windows at a time, by a process that holds `before` without it."""
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    tensors = device_memory(cfg, micro_batch=micro_batch, dtype=kind)["device.peak"].to("B")
    return before + round(tensors * (HEAP if device.type == "cpu" else 1))


def flop(cfg: Config, windows: float) -> float:
    """FLOP of training on so many windows."""
    return device_step_work(cfg)["step.flops"].to("FLOP") * windows / cfg.train.batch_size


TRIAL_SECONDS, MAX_TRIAL_SECONDS = 0.3, 3.0  # of a pass through two layers, at the device's best rate


def trial_step(cfg: Config, micro_batch: int, dtype: torch.dtype, device: torch.device, rate: float) -> float | None:
    """Seconds of an optimizer step, from steps of models of one and of two layers, which are built for it.

    They take as many windows at a time as `micro_batch` or, where that would last, fewer. None where two layers would
    need more than half of the memory or one window too long. `rate` is the device's, FLOP/s.
    """
    two = replace(cfg, n_layers=2, dense=None)
    windows = micro_batch
    while windows > 1 and flop(two, windows) / rate > TRIAL_SECONDS:
        windows = math.ceil(windows / 2)
    two = replace(two, train=replace(cfg.train, batch_size=windows, micro_batch=0, batch_ramp=""))
    need = process_memory(two, windows, dtype, device, 0)
    if need > devices.memory_available(device) / 2 or flop(two, windows) / rate > MAX_TRIAL_SECONDS:
        return None
    one, both = (_trial(replace(two, n_layers=n), windows, dtype, device) for n in (1, 2))
    passed, updated = (
        first + (cfg.n_layers - 1) * max(0.0, second - first) for first, second in zip(one, both, strict=True)
    )
    return cfg.train.batch_size / windows * passed + updated


def _trial(cfg: Config, micro_batch: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and of the optimizer: the better of two."""
    with device:
        model = Transformer(cfg)
    model.activation_checkpointing = cfg.train.activation_checkpointing
    optimizers = build(model, cfg.train)
    length = cfg.train.seq_len or cfg.max_seq_len
    tokens_BS = (torch.arange(micro_batch * length, device=device) % cfg.vocab_size).view(micro_batch, length)
    times = []
    for _ in range(2):
        begun = _now(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(tokens_BS, tokens_BS).loss
        assert loss is not None
        loss.backward()
        passed = _now(device)
        optimizers.step()
        optimizers.zero_grad()
        times.append((passed - begun, _now(device) - passed))
    return min(t for t, _ in times), min(t for _, t in times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(
    cfg: Config,
    run_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    before: int,
    peak: int,
    batch: float,
    micro_batch: int,
    seconds_per_step: float,
    peak_flops: float,
) -> tuple[dict[str, float], str]:
    """Appends a row to plan.csv; returns the figures for the summary, and a line that says them.

    Args:
        before: bytes that the process held before the model was there. peak: the most while it trained.
        batch: windows of a step, on average. micro_batch: of a forward pass.
        seconds_per_step: measured. peak_flops: of the device, in FLOP/s.
    """
    work = device_step_work(cfg)
    predicted = process_memory(cfg, micro_batch, dtype, device, before)
    floor = flop(cfg, batch) / peak_flops
    row = {
        "kind": "train",
        "name": cfg.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": work["step.tokens"].value * batch / cfg.train.batch_size,  # a ramp has its own batches
        "flop": flop(cfg, batch),
        "bytes": work["step.bytes"].to("B"),
        "seconds": seconds_per_step,
        "memory": peak,
        "predicted_memory": predicted,
    }
    append_row(run_dir / FILE, row)
    figures = {
        "step_seconds": seconds_per_step,
        "step_seconds_at_peak": floor,
        "memory_bytes": peak,
        "memory_bytes_predicted": predicted,
    }
    line = (
        f"predicted and measured: a step {number(floor)} s at the device's peak, {number(seconds_per_step)} s; "
        f"memory {predicted / 1e9:.2f} GB, {peak / 1e9:.2f} GB"
    )
    return figures, line
