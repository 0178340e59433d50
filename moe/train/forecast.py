"""What a run will take, before anything of it starts: steps, memory, and the least time that this machine allows."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe.config import Config
from moe.data import open_data
from moe.plan.device import device_memory, device_step_work
from moe.train import device as devices
from moe.train import predicted, start
from moe.train.schedule import Schedule


@dataclass(frozen=True)
class Forecast:
    """Of a whole run. `memory` is that of the process at its peak, `available` what the device has; bytes.

    `seconds` is the floor: all FLOP at the rate of a large product, measured now or from the data sheet.
    """

    steps: int
    tokens: int
    passes: float  # of the data, each source its number of epochs
    memory: int
    available: int
    seconds: float


def forecast(cfg: Config, data_dir: str | Path, device: str | None = None) -> Forecast:
    """Opens the data, builds no model, writes nothing.

    Raises:
        DataError, ConfigError: as `train` would.
    """
    where = devices.pick_device(device)
    dtype = devices.pick_dtype(cfg.train, where)
    data = open_data(data_dir)
    data.check_compatible(cfg.vocab_size)
    stream = start.open_stream(cfg, data)
    schedule = Schedule(cfg.train, stream.seq_len, stream.windows_per_epoch)
    micro_batch = cfg.train.micro_batch or max(size for _, size in schedule.stages)
    rate = devices.peak_flops(where, dtype)
    sheet = device_memory(cfg, micro_batch=micro_batch, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    flop = device_step_work(cfg)["step.flops"].to("FLOP") * schedule.windows / cfg.train.batch_size
    return Forecast(
        steps=schedule.steps,
        tokens=schedule.windows * stream.seq_len,
        passes=schedule.windows / stream.windows_per_epoch,
        memory=predicted.memory_in_use(where) + round(sheet["device.peak"].to("B")),
        available=predicted.memory_available(where),
        seconds=flop / rate,
    )
