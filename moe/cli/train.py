"""`moe train`. As in main.py, the command imports what it needs when it runs."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from moe.cli import usage
from moe.cli.data import default_data, default_place
from moe.cli.flags import Flag, Settings, assignments

if TYPE_CHECKING:
    from moe.config import Config


def train(
    config: Positional[str],
    /,
    data: Path | None = None,
    out: Path | None = None,
    set_: Settings = (),
    from_: Annotated[Path | None, arg(name="from")] = None,
    device: str | None = None,
    fresh: Flag = False,
    trace_every: int = 0,
    dry_run: Flag = False,
) -> int:
    """Train a model; interrupted, the same command goes on where it stopped.

    Args:
        config: A shipped configuration (replica-tiny, replica-nano, ...) or a TOML file.
        data: Prepared data (moe data prepare). Default: text and code from installed packages, prepared in data/.
        out: Directory of the run. Default: runs/NAME.
        set_: Settings to change, such as train.lr=3e-4.
        from_: A checkpoint to begin with, for the next stage of a recipe: more context, other data.
        device: cuda or cpu. Default: cuda where there is one.
        fresh: Start anew; an older run in the directory is moved aside.
        trace_every: Record the routing of every so many steps in RUN/traces, for moe profile; 0 records none.
        dry_run: Say what the run would take, in steps, memory and time, and start nothing.
    """
    from moe.config import load_config

    cfg = load_config(config).with_overrides(assignments(set_))
    from moe.device import pick_device
    from moe.train import console, train
    from moe.train.forecast import check_memory

    if dry_run:
        print_forecast(cfg, data, device)
        return 0
    if data is None:
        check_memory(cfg, pick_device(device))  # before hours of preparing data for what cannot be
    data_dir = data if data is not None else default_data(cfg)
    run_dir = out if out is not None else Path("runs") / cfg.name
    resume = "never" if fresh else "auto"
    result = train(
        cfg,
        data_dir,
        run_dir,
        resume=resume,
        start_from=from_,
        device=device,
        reporter=usage.speaking(console.reporter(), "--out", "--fresh"),
        trace_every=trace_every,
    )
    if result.status == "stopped":
        with contextlib.suppress(OSError):  # the terminal may be what was closed
            print(f"stopped after step {result.step:,}; the same command, without --fresh, goes on from there")
        return 128 + result.signal
    return 0


def print_forecast(cfg: "Config", data: Path | None, device: str | None) -> None:
    """What a run would take; without `data`, on the default data, which need not be prepared."""
    from moe.device import pick_device
    from moe.errors import TrainError
    from moe.train.console import clock
    from moe.train.forecast import GIB, check_memory, forecast

    default, is_there = default_place(cfg)
    if data is None and is_there:
        data = default
    f = forecast(cfg, data, device, trial=True)
    passes = f"{f.passes:.3g} times through the data's epochs" if f.passes else f"data to be prepared in {default}"
    print(f"{cfg.name}: {f.steps:,} steps, {f.tokens:,} tokens, {passes}")
    if data is None:  # measured: 1.07 GB for a vocabulary of 512
        print("memory to prepare the data first: about 1.1 GiB")
    share = f" of {f.available / GIB:.1f} GiB" if f.available else ""
    print(f"memory at the peak: {f.memory / GIB:,.2f} GiB{share}")
    if f.available and f.memory > f.available:
        remedy = "that is more than there is: halve train.micro_batch, or set train.activation_checkpointing=selective"
        try:
            check_memory(cfg, pick_device(device))
        except TrainError as error:  # which knows what the weights alone take
            remedy = str(error)
        print(remedy)
    tried = f"about {clock(f.likely)}, by two layers tried here now; " if f.likely else ""
    print(f"time: {tried}{clock(f.seconds)} if every product ran at this machine's best rate")
