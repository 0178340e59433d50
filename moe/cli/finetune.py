"""`moe finetune`: from a pre-trained model to one that answers.

As in main.py, the command imports what it needs when it runs.
"""

import contextlib
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from moe.cli import usage
from moe.cli.flags import Flag, Settings, assignments
from moe.cli.train import print_forecast


def finetune(
    checkpoint: Positional[Path],
    /,
    *,
    data: Path,
    out: Path,
    epochs: float = 2.0,
    lora: Flag = False,
    rank: int = 8,
    alpha: float = 16.0,
    on: tuple[str, ...] = ("attention", "experts"),
    set_: Settings = (),
    device: str | None = None,
    fresh: Flag = False,
    dry_run: Flag = False,
) -> int:
    """Teach a pre-trained model to answer; interrupted, the same command goes on where it stopped.

    Args:
        checkpoint: A run of moe train (RUN is its RUN/final), or any checkpoint of this program.
        data: Prepared conversations (moe data instructions).
        out: Directory of the run; RUN/final is then for moe chat.
        epochs: Passes over the conversations.
        lora: Freeze the model and train low-rank adapters, which RUN/adapter.safetensors then holds.
        rank: Of the adapters.
        alpha: Their scale is alpha / rank.
        on: What gets adapters: attention, experts or both.
        set_: Settings to change, such as train.lr=1e-4 train.seq_len=1024.
        device: cuda or cpu. Default: cuda where there is one.
        fresh: Start anew; an older run in the directory is moved aside.
        dry_run: Say what the run would take, in steps, memory and time, and start nothing.
    """
    from moe.data import ConversationData
    from moe.lora import LoraConfig
    from moe.train import console, train
    from moe.train.finetune import recipe

    adapters = LoraConfig(rank, alpha, on) if lora else None
    overrides = assignments(set_)
    cfg = recipe(checkpoint, ConversationData.open(data), epochs=epochs, lora=lora, overrides=overrides)
    if dry_run:
        print_forecast(cfg, data, device)
        return 0
    how: dict[str, Any] = {
        "resume": "never" if fresh else "auto",
        "device": device,
        "reporter": usage.speaking(console.reporter(), "--out", "--fresh"),
    }
    result = train(cfg, data, out, start_from=checkpoint, lora=adapters, **how)
    if result.status == "stopped":
        with contextlib.suppress(OSError):  # the terminal may be what was closed
            print(f"stopped after step {result.step:,}; the same command, without --fresh, goes on from there")
        return 128 + result.signal
    return 0
