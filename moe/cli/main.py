"""The command line: `moe train`, `moe data prepare`, `moe generate`, and what the other files of this folder add.

Commands import what they need when they run, so that `moe --help` loads no torch. What can go wrong ends in one line on
stderr and exit status 1, or 2 where the command itself was at fault; a stack trace means a bug.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from moe.cli.chat import chat
from moe.cli.evaluate import evaluate
from moe.cli.finetune import finetune, instructions
from moe.cli.ladder import ladder
from moe.cli.plan import plan_app
from moe.cli.profile import profile_app
from moe.cli.show import printable, write
from moe.errors import MoeError

if TYPE_CHECKING:
    from moe.config import Config
    from moe.data import DataInfo

app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()
app.command(data_app, name="data")
app.command(name="eval")(evaluate)
app.command(profile_app, name="profile")
app.command(finetune)
app.command(ladder)
app.command(chat)
data_app.command(instructions)
app.command(plan_app, name="plan")


@app.command
def train(
    config: Positional[str],
    /,
    data: Path | None = None,
    out: Path | None = None,
    set_: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(name="set", metavar="KEY=VALUE ...")] = (),
    from_: Annotated[Path | None, arg(name="from")] = None,
    device: str | None = None,
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    trace_every: int = 0,
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
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

    cfg = load_config(config).with_overrides([assignment for group in set_ for assignment in group])
    from moe.train import console, train

    data_dir = data if data is not None else _default_data(cfg)
    if dry_run:
        _print_forecast(cfg, data_dir, device)
        return 0
    run_dir = out if out is not None else Path("runs") / cfg.name
    resume = "never" if fresh else "auto"
    result = train(
        cfg,
        data_dir,
        run_dir,
        resume=resume,
        start_from=from_,
        device=device,
        reporter=console.reporter(),
        trace_every=trace_every,
    )
    if result.status == "stopped":
        print(f"stopped after step {result.step:,}; the same command, without --fresh, goes on from there")
        return 128 + result.signal
    return 0


def _print_forecast(cfg: "Config", data_dir: Path, device: str | None) -> None:
    from moe.train.console import clock
    from moe.train.forecast import forecast

    f = forecast(cfg, data_dir, device)
    print(f"{cfg.name}: {f.steps:,} steps, {f.tokens:,} tokens, {f.passes:.3g} times through the data's epochs")
    share = f" of {f.available / 2**30:.1f} GiB" if f.available else ""
    print(f"memory at the peak: {f.memory / 2**30:.2f} GiB{share}")
    if f.available and f.memory > f.available:
        print("that is more than there is: halve train.micro_batch, or set train.activation_checkpointing=selective")
    print(f"time: {clock(f.seconds)} if every product ran at this machine's best rate; expect about twice that")


@data_app.command
def prepare(
    sources: Positional[tuple[str, ...]] = (),
    /,
    *,
    out: Path,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    sample: float = 1.0,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Turn documents into token shards.

    Args:
        sources: Files, directories of text, JSONL, parquet, datasets; as PATH or NAME=PATH. Default: text and code from
            installed packages. Of the Hugging Face Hub, and how much of it:
            hf:OWNER/NAME,config=...,split=train,revision=...,text=text,documents=500k,bytes=20GB.
        out: Directory to write.
        vocab_size: Ids of the byte-level BPE to train.
        tokenizer: cl100k (GPT-4's), or a tokenizer.json, instead of training one.
        sample: Fraction of the training documents to take, drawn by their names; all held-out ones are taken.
        overwrite: Replace other prepared data in the directory.
    """
    _print_data(_prepare(list(sources) or None, out, vocab_size, tokenizer, sample=sample, overwrite=overwrite))
    return 0


@app.command
def generate(
    checkpoint: Positional[Path],
    /,
    prompt: str = "",
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="STR")] = (),
    trace: Path | None = None,
    device: str | None = None,
) -> int:
    """Continue a prompt, token by token.

    Args:
        checkpoint: What moe train leaves in RUN/final, or any checkpoint of this program.
        prompt: The text to continue; empty begins a document.
        max_tokens: The most tokens to generate; the context may be full before.
        temperature: 0 always takes the likeliest token.
        top_k: Draw from the likeliest K tokens; 0 from all.
        top_p: Draw from the likeliest tokens that together reach this probability; 1 from all.
        seed: Of the draws.
        stop: A string that ends the text and is not printed; may be given again.
        trace: Record the routing of the prompt and of every generated token here, for moe profile.
        device: cuda or cpu. Default: cuda where there is one.
    """
    import torch

    from moe import checkpoint as checkpoints
    from moe.device import pick_device
    from moe.errors import ConfigError
    from moe.generate import TextStream, stream
    from moe.profile import record

    where = pick_device(device)
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    model = checkpoints.load(checkpoint, device=where)
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if sys.stdout.isatty():
        write(f"\033[2m{printable(prompt)}\033[0m")
    try:
        text = TextStream(tokenizer, stop)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        with contextlib.nullcontext() if trace is None else record(model, trace):
            for next_1 in stream(model, torch.tensor([ids], device=where), max_tokens, **sampling):
                write(printable(text.push(int(next_1))))
                if text.done:
                    break
    except ValueError as error:
        raise ConfigError(str(error)) from error
    write(printable(text.finish()) + ("\n" if sys.stdout.isatty() else ""))
    return 0


# ------------------------------------------------------------------------------------------------------------- data


def _default_data(cfg: "Config") -> Path:
    """Text and code of installed packages in `data/`, prepared for the model's vocabulary if they are not yet."""
    from moe.data.shards import INDEX_FILE
    from moe.tokenizer import CL100K_SPECIAL

    has_cl100k = cfg.vocab_size > max(CL100K_SPECIAL.values())
    place = Path("data") / f"default-{'cl100k' if has_cl100k else cfg.vocab_size}"
    if not (place / INDEX_FILE).is_file():
        print(f"preparing the default data in {place}", flush=True)
        _print_data(_prepare(None, place, cfg.vocab_size, "cl100k" if has_cl100k else None))
    return place


def _prepare(sources: list[str] | None, out: Path, vocab_size: int, tokenizer: str | None, **how: Any) -> Any:
    """`moe.data.prepare` under a progress bar, on a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from moe.data import prepare

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        reading = bar.add_task("reading", total=None)
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                bar.update(reading, total=1, completed=1)
                tasks[phase] = bar.add_task(phase, total=total or None)
            bar.update(tasks[phase], completed=done)

        return prepare(sources, out, vocab_size=vocab_size, tokenizer=tokenizer, progress=progress, **how)


def _print_data(info: "DataInfo") -> None:
    from rich.console import Console
    from rich.table import Table

    state = "already prepared" if info.reused else "prepared"
    table = Table(title=f"{info.path}: {state}, {info.tokenizer_name}, {info.vocab_size:,} ids", title_justify="left")
    for name in ("source", "split", "documents", "tokens", "bytes"):
        table.add_column(name, justify="left" if name in ("source", "split") else "right")
    for source, splits in info.splits.items():
        for split, size in splits.items():
            table.add_row(source, split, f"{size.documents:,}", f"{size.tokens:,}", f"{size.bytes:,}")
    console = Console(highlight=False)
    console.print(table)
    for notice in info.notices:
        console.print(f"notice: {notice}", markup=False, soft_wrap=True)
    if info.skipped:
        shown = ", ".join(info.skipped[:3]) + (", ..." if len(info.skipped) > 3 else "")
        console.print(f"not text, left out: {len(info.skipped):,} ({shown})", markup=False, soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------- errors


def _fail(error: BaseException) -> None:
    from rich.console import Console
    from rich.text import Text

    message = " ".join(str(error).split()) or type(error).__name__
    Console(stderr=True, highlight=False).print(Text("error: ", style="red") + Text(message), soft_wrap=True)


def _version() -> str:
    """The line of `moe --version`: what a report of a bug needs. Loads nothing."""
    from importlib.metadata import PackageNotFoundError, version

    from moe import __version__

    parts = [f"gpt4-moe {__version__}", f"Python {sys.version.partition(' ')[0]}"]
    for package in ("torch", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    return ", ".join(parts)


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    if (sys.argv[1:] if args is None else args)[:1] == ["--version"]:
        print(_version())
        sys.exit(0)
    try:
        status = app.cli(
            prog="moe",
            description="gpt4-moe: train and run small replicas of the mixture-of-experts GPT-4. "
            "moe --version names its version.",
            args=args,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it exits
        status = 1
    except (MoeError, OSError, ImportError) as error:
        _fail(error)
        status = error.exit_status if isinstance(error, MoeError) else 1
    sys.exit(status)


if __name__ == "__main__":
    main()
