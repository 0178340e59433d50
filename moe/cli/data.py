"""`moe data`: documents and conversations to tokens. As in main.py, commands import what they need when they run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tyro.conf import Positional

from moe.cli import show
from moe.cli.flags import Flag
from moe.cli.show import draw_table, print_left_out, print_notices, progress_bar

if TYPE_CHECKING:
    from moe.config import Config
    from moe.data import DataInfo
    from moe.data.conversations import Prepared

data_app = tyro.extras.SubcommandApp()


@data_app.command
def prepare(
    sources: Positional[tuple[str, ...]] = (),
    /,
    *,
    out: Path,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    validation: str | None = None,
    sample: float = 1.0,
    overwrite: Flag = False,
) -> int:
    """Turn documents into token shards.

    Args:
        sources: Files, directories of text, JSONL, CSV, parquet, datasets; as PATH or NAME=PATH, with ,split=NAME,
            ,validation=NAME or ,text=COLUMN after it where needed. Default: text and code from installed packages.
            Of the Hugging Face Hub, and how much of it:
            hf:OWNER/NAME,config=...,split=train,revision=...,text=text,documents=500k,bytes=20GB.
        out: Directory to write.
        vocab_size: Ids of the byte-level BPE to train.
        tokenizer: cl100k (GPT-4's), or a tokenizer.json, instead of training one.
        validation: What to hold out: a fraction, or text of its own as PATH or NAME=PATH. Default: the splits that
            sources come with, else 0.05: one document in twenty, or the end of a long one.
        sample: Fraction of the training documents to take, drawn by their names; all held-out ones are taken.
        overwrite: Replace other prepared data in the directory.
    """
    how = {"validation": validation, "sample": sample, "overwrite": overwrite}
    _print_data(_prepare(list(sources) or None, out, vocab_size, tokenizer, **how))
    return 0


def default_data(cfg: "Config") -> Path:
    """Text and code of installed packages in `data/`, prepared for the model's vocabulary if they are not yet."""
    place, is_there = default_place(cfg)
    if not is_there:
        print(f"preparing the default data in {place}", flush=True)
        _print_data(_prepare(None, place, cfg.vocab_size, "cl100k" if place.name.endswith("cl100k") else None))
    return place


def default_place(cfg: "Config") -> tuple[Path, bool]:
    """Where `default_data` is for this model, and whether it is prepared."""
    from moe.data.shards import INDEX_FILE
    from moe.tokenizer import CL100K_SPECIAL

    has_cl100k = cfg.vocab_size > max(CL100K_SPECIAL.values())
    place = Path("data") / f"default-{'cl100k' if has_cl100k else cfg.vocab_size}"
    return place, (place / INDEX_FILE).is_file()


def _prepare(sources: list[str] | None, out: Path, vocab_size: int, tokenizer: str | None, **how: Any) -> Any:
    """`moe.data.prepare` under a progress bar, on a terminal."""
    from moe.data import prepare

    with progress_bar() as bar:
        reading = bar.add_task("reading", total=None)
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                bar.update(reading, total=1, completed=1)
                tasks[phase] = bar.add_task(phase, total=total or None)
            bar.update(tasks[phase], completed=done)

        return prepare(sources, out, vocab_size=vocab_size, tokenizer=tokenizer, progress=progress, **how)


def _print_data(info: "DataInfo") -> None:
    state = "already prepared" if info.reused else "prepared"
    title = f"{info.path}: {state}, {info.tokenizer_name}, {info.vocab_size:,} ids"
    rows = [
        [source, split, f"{size.documents:,}", f"{size.tokens:,}", f"{size.bytes:,}"]
        for source, splits in info.splits.items()
        for split, size in splits.items()
    ]
    draw_table(title, ["source", "split", "documents", "tokens", "bytes"], rows, {"source", "split"})
    console = show.console()
    print_notices(console, info.notices)
    print_left_out(console, "not text", info.skipped)


# ----------------------------------------------------------------------------------------------------- conversations


@data_app.command
def instructions(
    sources: Positional[tuple[str, ...]] = (),
    /,
    *,
    tokenizer: str,
    out: Path,
    overwrite: Flag = False,
) -> int:
    """Turn conversations into tokens for moe finetune.

    Args:
        sources: JSONL, parquet, CSV or JSON files, or directories of JSONL and parquet, as PATH or NAME=PATH. A row has
            messages, a list of {"role": system|user|assistant, "content": text}, or the fields of ShareGPT, Alpaca, or
            prompt and response or completion. Default: functions of Python's standard library to be written from their
            docstrings, and the small talk of chatterbot-corpus if installed.
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
    _print_conversations(made)
    return 0


def _print_conversations(made: "Prepared") -> None:
    data, index = made.data, made.data.index
    state = "already prepared" if made.reused else "prepared"
    title = f"{data.path}: {state}, template {index['template']}, {index['tokenizer_name']}, {data.vocab_size:,} ids"
    rows = []
    for source in data.sources:
        for split in ("train", "val"):
            sizes = data.table(source, split).n_tokens
            longest = int(sizes.max()) if len(sizes) else 0
            figures = (len(sizes), int(sizes.sum()), data.n_tokens(source, split), longest)
            rows.append([source, split, *(f"{n:,}" for n in figures)])
    columns = ["source", "split", "conversations", "tokens", "of them learned", "longest"]
    draw_table(title, columns, rows, {"source", "split"})
    console = show.console()
    print_notices(console, index["notices"])
    if index["empty"]:
        console.print(f"without a response, left out: {index['empty']:,}", markup=False)
    print_left_out(console, "not valid text", index["skipped"])
