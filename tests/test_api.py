"""The public interface, frozen: names and signatures in api.txt, commands and options in commands.txt.

A change of either shows in a diff. Where it is meant: `python -m tests.test_api --write`, and a line in CHANGELOG.md.
"""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FACADES = ("moe", "moe.kernels.ops", "moe.data", "moe.hf", "moe.plan", "moe.profile", "moe.train")
# Columns of the terminal that help is drawn for, here and wherever the tests run.
WIDE = "300"

# ------------------------------------------------------------------------------------------------------- names


def signature(node: ast.FunctionDef) -> str:
    """`name(a: int = 1) -> str`, as the source has it: the same under every version of Python."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def members(node: ast.ClassDef) -> Iterator[str]:
    """A class's public fields and methods, and what it takes to make one."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (item.name == "__init__" or not item.name.startswith("_")):
            markers = [f"@{ast.unparse(d)} " for d in item.decorator_list]
            yield "".join(markers) + signature(item)
        elif isinstance(item, ast.AnnAssign) and not ast.unparse(item).startswith("_"):
            yield ast.unparse(item)


def described(name: str, value: Any) -> list[str]:
    """The lines of one public name: a function's signature, a class with its members, a constant with its value."""
    if inspect.ismodule(value):
        return [f"module {name}"]
    if not callable(value):
        return [f"{name} = {value!r}"]
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return [f"class {name}({bases})" if bases else f"class {name}", *(f"    {line}" for line in members(node))]
    assert isinstance(node, ast.FunctionDef)
    markers = [f"@{ast.unparse(d)} " for d in node.decorator_list]
    return ["".join(markers) + f"def {signature(node)}"]


def api() -> str:
    """Every public name of every facade, in the order of the alphabet."""
    lines = []
    for facade in FACADES:
        module = importlib.import_module(facade)
        lines.append(f"# {facade}")
        for name in sorted(module.__all__):
            lines += described(name, getattr(module, name))
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- commands


def commands(app: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words that name each command under this app, after `moe`."""
    for name, spec in sorted(app._subcommands.items()):
        path = (*words, name.replace("_", "-"))
        yield from commands(spec.target, path) if hasattr(spec.target, "_subcommands") else [path]


def options(help_text: str) -> Iterator[str]:
    """Each argument of a command as its help has it: the name, what it takes, the default; without what it means."""
    rows: list[str] = []
    for line in help_text.splitlines():
        if line.startswith("│ "):
            inside = line[2:].rstrip("│ ")
            if inside.startswith(" ") and rows:
                rows[-1] += "  " + inside.strip()
            else:
                rows.append(inside)
    for row in rows:
        name, _, meaning = row.partition("  ")
        end = re.search(r"\((default: .*|required|repeatable)\)$", meaning)
        if name != "-h, --help":
            yield f"    {name}  {end[0] if end else ''}".rstrip()


def command_line() -> str:
    """Every command with its arguments."""
    from moe.cli.main import app, main

    lines = ["moe --version"]
    for words in commands(app):
        shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # boxes are drawn by the encoding
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
            main([*words, "--help"])
        shown.flush()
        lines += [f"moe {' '.join(words)}", *options(shown.buffer.getvalue().decode())]
    return "\n".join([*lines, ""])


FROZEN = {"api.txt": api, "commands.txt": command_line}


@pytest.mark.parametrize("file", FROZEN)
def test_the_public_interface_is_what_the_file_says(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", WIDE)
    frozen = (HERE / file).read_text(encoding="utf-8").splitlines()
    assert FROZEN[file]().splitlines() == frozen, "if that is meant: python -m tests.test_api --write, and CHANGELOG.md"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python -m tests.test_api --write")
    os.environ["COLUMNS"] = WIDE
    for file, text in FROZEN.items():
        (HERE / file).write_text(text(), encoding="utf-8")
