"""The command line: puts the commands of this folder together, and ends with a status.

Commands import what they need when they run, so that `moe --help` loads no torch. What can go wrong ends in one line on
stderr and exit status 1, or 2 where the command itself was at fault; a stack trace means a bug.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.conf import PositionalMetavarFromFieldName

from moe.cli import usage
from moe.cli.bench import bench_app
from moe.cli.chat import chat
from moe.cli.configs import configs
from moe.cli.data import data_app
from moe.cli.evaluate import evaluate
from moe.cli.export import export
from moe.cli.finetune import finetune
from moe.cli.generate import generate
from moe.cli.ladder import ladder
from moe.cli.plan import plan_app
from moe.cli.profile import profile_app
from moe.cli.train import train
from moe.cli.verify import verify
from moe.errors import MoeError

app = tyro.extras.SubcommandApp()
app.command(train)
app.command(data_app, name="data", help="Turn documents or conversations into tokens to train on.")
app.command(generate)
app.command(finetune)
app.command(chat)
app.command(name="eval")(evaluate)
app.command(export)
app.command(ladder)
app.command(profile_app, name="profile", help="Measure what the router does, and where the time of a step goes.")
app.command(plan_app, name="plan", help="Compute what a model costs to train and to serve, and check the article.")
app.command(bench_app, name="bench", help="Measure latency, throughput and utilisation of serving, beside the plan.")
app.command(verify)
app.command(configs)


def _parse(args: Sequence[str]) -> Any:
    return app.cli(
        prog="moe",
        description="gpt4-moe: train and run small replicas of the mixture-of-experts GPT-4. "
        "moe --version names its version.",
        args=args,
        config=(PositionalMetavarFromFieldName,),
        registry=usage.readable,
    )


def _run(args: Sequence[str]) -> Any:
    """Runs a command. What is said of the library's arguments is said of the command's flags."""
    path = usage.command_of(app, args)
    if not sys.stdout.isatty() and not {"-h", "--help"}.isdisjoint(args):
        return usage.show_page(_parse, args)
    try:
        with usage.one_line(_parse, path, args):
            return _parse(args)
    except (MoeError, ImportError) as error:
        said = str(error)
        error.args = (usage.in_flags(said, usage.flags_of(_parse, path)),)
        raise


def _fail(error: BaseException) -> None:
    from rich.console import Console
    from rich.text import Text

    said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    message = " ".join(said.split()) or type(error).__name__
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
    words = sys.argv[1:] if args is None else list(args)
    if words[:1] == ["--version"]:
        print(_version())
        sys.exit(0)
    try:
        try:
            status = _run(words)
        except SystemExit as end:  # of a help page
            status = end.code or 0
        sys.stdout.flush()  # so that a closed pipe is noticed here
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
