"""What a run will take, before anything of it starts: steps, memory, and the least time that this machine allows."""

from dataclasses import dataclass
from pathlib import Path

from moe import device as devices
from moe.config import Config
from moe.data import open_data
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
    rate = devices.peak_flops(where, dtype)
    return Forecast(
        steps=schedule.steps,
        tokens=schedule.windows * stream.seq_len,
        passes=schedule.windows / stream.windows_per_epoch,
        memory=predicted.process_memory(cfg, schedule.micro_batch, dtype, where, predicted.memory_before(where)),
        available=predicted.memory_available(where),
        seconds=predicted.flop(cfg, schedule.windows) / rate,
    )
