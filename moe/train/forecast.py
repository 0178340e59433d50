"""What a run will take, before anything of it starts: steps, memory, and the least time that this machine allows."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe import device as devices
from moe.config import Config
from moe.data import open_data
from moe.errors import DataError, TrainError
from moe.plan.device import device_memory
from moe.train import predicted, start
from moe.train.schedule import Schedule, micro_batch

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """Of a whole run. `memory` is that of the process at its peak, `available` what the device has; bytes.

    `seconds` is the floor: all FLOP at the rate of a large product, measured now or from the data sheet.
    """

    steps: int
    tokens: int
    passes: float | None  # of the data, each source its number of epochs; None without data
    memory: int
    available: int
    seconds: float
    likely: float | None = None  # seconds, from the time of layers that were tried here; without evaluation and saving


def forecast(cfg: Config, data_dir: str | Path | None, device: str | None = None, *, trial: bool = False) -> Forecast:
    """Opens the data and writes nothing.

    Args:
        data_dir: None where they are not prepared yet: the length must then be one in steps or tokens.
        trial: makes steps of two layers of the model, where these fit, for `likely`; else no model is built.

    Raises:
        DataError, ConfigError: as `train` would.
    """
    where = devices.pick_device(device)
    dtype = devices.pick_dtype(cfg.train, where)
    windows, seq_len = None, cfg.train.seq_len or cfg.max_seq_len
    if data_dir is not None:
        data = open_data(data_dir)
        data.check_compatible(cfg.vocab_size)
        windows = start.open_stream(cfg, data).windows_per_epoch
    elif cfg.train.tokens == "epochs":
        raise DataError('train.tokens = "epochs" is the length of the data: prepare them first (moe data prepare)')
    schedule = Schedule(cfg.train, seq_len, windows or 0)
    with devices.callers_state(where):
        rate = devices.peak_flops(where, dtype)
        before = predicted.memory_before(where)
        memory = predicted.process_memory(cfg, schedule.micro_batch, dtype, where, before)
        step = predicted.trial_step(cfg, schedule.micro_batch, dtype, where, rate) if trial else None
    return Forecast(
        steps=schedule.steps,
        tokens=schedule.windows * seq_len,
        passes=schedule.windows / windows if windows else None,
        memory=memory,
        available=devices.memory_available(where),
        seconds=predicted.flop(cfg, schedule.windows) / rate,
        likely=None if step is None else step * schedule.windows / cfg.train.batch_size,
    )


def check_memory(cfg: Config, device: torch.device, frozen: bool = False) -> None:
    """Raises TrainError, with the figures, where the tensors of a training step are more than the device holds.

    That is a floor: a process needs more, as `forecast` says. Reads no data and allocates nothing.

    Args:
        frozen: adapters alone are trained: the weights are all that is sure to be there.
    """
    available = devices.memory_available(device)
    dtype = devices.pick_dtype(cfg.train, device)
    length = cfg.train.seq_len or cfg.max_seq_len
    windows = micro_batch(cfg.train, length)
    sheet = device_memory(cfg, micro_batch=windows, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    parts = {name: sheet[f"device.{name}"].to("B") for name in ("weights", "gradients", "optimizer", "activations")}
    standing = parts["weights"] if frozen else sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    peak = standing if frozen else sheet["device.peak"].to("B")
    if not available or peak <= available:
        return
    figures = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in list(parts.items())[: 1 if frozen else 4])
    if standing > available:
        remedy = "train a smaller model, such as replica-small, or on a larger machine"
    else:
        remedy = f"lower train.micro_batch (now {windows}), or set train.activation_checkpointing = selective or full"
    raise TrainError(
        f"{cfg.name} does not fit: a step needs {peak / GIB:,.1f} GiB of memory ({figures}) and {device} has "
        f"{available / GIB:,.1f} GiB; {remedy}"
    )
