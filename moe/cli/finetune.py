"""`moe data instructions` and `moe finetune`: from a pre-trained model to one that answers.

As in main.py, commands import what they need when they run.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from moe.data.conversations import Prepared


def instructions(
    sources: Positional[tuple[str, ...]] = (),
    /,
    *,
    tokenizer: str,
    out: Path,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Turn conversations into tokens for moe finetune.

    Args:
        sources: JSONL or parquet files, or directories of them, as PATH or NAME=PATH. A row has messages, a list of
            {"role": system|user|assistant, "content": text}, or prompt and response. Default: functions of Python's
            standard library to be written from their docstrings, and the small talk of chatterbot-corpus if installed.
        tokenizer: The checkpoint of the model to be fine-tuned, a tokenizer.json, or cl100k.
        out: Directory to write.
        overwrite: Replace other prepared conversations in the directory.
    """
    from rich.progress import Progress

    from moe.data import prepare_conversations

    with Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("reading", total=None)

        def progress(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total)

        made = prepare_conversations(
            list(sources) or None, out, tokenizer=tokenizer, overwrite=overwrite, progress=progress
        )
    _print(made)
    return 0


def _print(made: "Prepared") -> None:
    from rich.console import Console
    from rich.table import Table

    data, index = made.data, made.data.index
    state = "already prepared" if made.reused else "prepared"
    title = f"{data.path}: {state}, template {index['template']}, {index['tokenizer_name']}, {data.vocab_size:,} ids"
    table = Table(title=title, title_justify="left")
    for name in ("source", "split", "conversations", "tokens", "of them learned", "longest"):
        table.add_column(name, justify="left" if name in ("source", "split") else "right")
    for source in data.sources:
        for split in ("train", "val"):
            sizes = data.table(source, split).n_tokens
            longest = int(sizes.max()) if len(sizes) else 0
            figures = (len(sizes), int(sizes.sum()), data.n_tokens(source, split), longest)
            table.add_row(source, split, *(f"{n:,}" for n in figures))
    console = Console(highlight=False)
    console.print(table)
    for notice in index["notices"]:
        console.print(f"notice: {notice}", markup=False, soft_wrap=True)
    if index["empty"]:
        console.print(f"without a response, left out: {index['empty']:,}", markup=False)
    if index["skipped"]:
        shown = ", ".join(index["skipped"][:3]) + (", ..." if len(index["skipped"]) > 3 else "")
        console.print(f"not valid text, left out: {len(index['skipped']):,} ({shown})", markup=False, soft_wrap=True)


def finetune(
    checkpoint: Positional[Path],
    /,
    *,
    data: Path,
    out: Path,
    epochs: float = 2.0,
    lora: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    rank: int = 8,
    alpha: float = 16.0,
    on: tuple[str, ...] = ("attention", "experts"),
    set_: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(name="set", metavar="KEY=VALUE ...")] = (),
    device: str | None = None,
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Teach a pre-trained model to answer; interrupted, the same command goes on where it stopped.

    Args:
        checkpoint: What moe train leaves in RUN/final, or any checkpoint of this program.
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
    """
    from moe.data import ConversationData
    from moe.lora import LoraConfig
    from moe.train import console, train
    from moe.train.finetune import recipe

    adapters = LoraConfig(rank, alpha, on) if lora else None
    overrides = [assignment for group in set_ for assignment in group]
    cfg = recipe(checkpoint, ConversationData.open(data), epochs=epochs, lora=lora, overrides=overrides)
    how: dict[str, Any] = {"resume": "never" if fresh else "auto", "device": device, "reporter": console.reporter()}
    result = train(cfg, data, out, start_from=checkpoint, lora=adapters, **how)
    if result.status == "stopped":
        print(f"stopped after step {result.step:,}; the same command, without --fresh, goes on from there")
        return 128 + result.signal
    return 0
