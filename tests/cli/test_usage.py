"""Words on the command line: help pages, mistakes in one line, widths and pipes, errors in the flags' names."""

import ast
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe.cli import main, usage
from moe.cli.show import draw_table
from tests.conftest import run_cli, start_cli

ROOT = Path(__file__).parents[2]
COMMANDS = list(usage.commands(main.app))
GROUPS = [(), ("data",), ("profile",), ("plan",)]


@contextlib.contextmanager
def printed():
    """What is printed on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def page(*words: str) -> str:
    with printed() as (out, err):
        assert run_cli(*words, "--help") == 0
    assert err.getvalue() == ""
    return out.getvalue()


@pytest.mark.parametrize("path", [*GROUPS, *COMMANDS], ids=" ".join)
def test_a_help_page_is_readable(path, monkeypatch) -> None:
    """It fits, says something of every flag, of its default too, and names what a flag takes in words."""
    monkeypatch.setenv("COLUMNS", "100")
    text = page(*path)
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"\{None\}|\bNone\b|\b(STR|INT|FLOAT)\b|\[\w+ \[", text)
    assert "\x1b" not in text
    _, _, options = text.partition("─ options ")
    flags = [" ".join(re.sub(r"[│╰╯─]", " ", flag).split()) for flag in re.split(r"\n│ (?=--)", options)[1:]]
    assert bool(flags) == (path in COMMANDS)
    for flag in flags:
        assert re.search(r"\((default: .+|required|repeatable)\)$", flag), flag
    if path not in COMMANDS:
        for line in text.partition("(required)")[2].splitlines():
            assert not re.fullmatch(r"│\s+•\s+\w+\s+│", line), "a command without a description"


@pytest.mark.parametrize("path", [p for p in GROUPS if p], ids=" ".join)
def test_groups_are_described(path) -> None:
    assert re.search(rf"• {path[0]} +[A-Z][a-z]+ ", page())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean 'train'?"),
        (["plan", "memry"], "did you mean 'memory'?"),
        (["data", "perpare"], "did you mean 'prepare'?"),
        (["train", "replica-tiny", "--devise", "cpu"], "did you mean '--device'?"),
        (["plan", "decode", "--contxt=1"], "did you mean '--context'?"),
        (["train", "replica-tiny", "other"], "does not take 'other'"),
        (["train", "replica-tiny", "--trace-every", "x"], "--trace-every = 'x': must be a whole number"),
        (["train", "replica-tiny", "--trace-every", "9" * 5000], "--trace-every = '999"),
        (["finetune", "m", "--data", "d", "--out", "o", "--epochs", "1e999"], "--epochs = '1e999': must be a number"),
        (["finetune", "m"], "--data and --out must be given"),
        (["generate", "m", "--temperature", "nan"], "--temperature = 'nan'"),
        (["profile", "step", "replica-tiny", "--what", "trian"], "did you mean 'train'?"),
        (["plan", "params", "--context"], "--context: a value must follow it"),
        (["plan", "sweep", "--batch"], "--batch: a value must follow it"),
        (["train", "--hlep"], "moe train does not take '--hlep'; did you mean '--help'?"),
        (["generate", "--promt", "x"], "did you mean '--prompt'?"),
        (["version"], "did you mean '--version'?"),
        (["train", "replica-tiny", "--set", "trian.steps=1"], "did you mean 'train.steps'?"),
        (["plan", "redesign", "--gpus", "7"], "--gpus 7: no layout of gpt4-8k"),
        ([], "moe: a command is missing"),
        (["plan"], "moe plan: a command is missing"),
    ],
)
def test_mistaken_words_end_in_one_line_and_status_2(words, said) -> None:
    with printed() as (out, err):
        assert run_cli(*words) == 2
    assert out.getvalue() == ""
    assert err.getvalue().startswith("error: ")
    assert err.getvalue().count("\n") == 1
    assert said in err.getvalue()
    assert len(err.getvalue()) < 400


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_that_lacks_its_arguments_says_which(path, monkeypatch) -> None:
    """Of what needs nothing, a flag that does not exist."""
    required = "(required)" in page(*path)
    with printed() as (out, err):
        assert run_cli(*path, *([] if required else ["--nonsense"])) == 2
    assert (out.getvalue(), err.getvalue().count("\n")) == ("", 1)
    assert ("must be given" if required else "'--nonsense'") in err.getvalue()
    assert f"moe {' '.join(path)} --help" in err.getvalue()


FIGURE = r"(?<![\w.-])\d[\d,.]*(?!\w)"
FLAGS = ["--top-p", "--out", "--fresh", "--tokens-per-parameter", "--from", "--set"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("top_p = 2: must be at most 1", "--top-p = 2: must be at most 1"),
        ("max_seq_len = 2: is no flag", "max_seq_len = 2: is no flag"),
        ("train.top_p = 2: is a key", "train.top_p = 2: is a key"),
        ("choose another `run_dir`", "choose another --out"),
        ("start anew (`resume='never'`)", "start anew (--fresh)"),
        ("give `start_from=x/final`", "give --from x/final"),
        ("raise `tokens_per_parameter`", "raise --tokens-per-parameter"),
        ("`grouped` is of the library, `moe train` a command", "`grouped` is of the library, `moe train` a command"),
    ],
)
def test_errors_speak_of_flags(message, said) -> None:
    assert usage.in_flags(message, FLAGS) == said


def messages() -> list[tuple[str, str]]:
    """Every text of the library that is said to somebody: all strings but docstrings, values put in as X."""
    found = []
    for path in sorted((ROOT / "moe").rglob("*.py")):
        if path.parent.name in ("cli", "configs") or "kernels" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in documentation | inner:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((f"{path.name}:{node.lineno}", node.value))
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                found.append((f"{path.name}:{node.lineno}", "".join(map(str, parts))))
    return found


def test_the_library_names_arguments_and_the_command_line_its_flags_for_them() -> None:
    """No message of the library names a flag outside of a whole command; each argument in one is a flag somewhere."""
    flags = {flag for path in COMMANDS for flag in usage.flags_of(main._parse, path)}
    spoken = 0
    for place, text in messages():
        alone = re.sub(r"\b(moe|hf|lm_eval) [a-z]+\b.*", "", text, flags=re.DOTALL)
        assert not re.search(r"(?<![\w-])--[a-z]", alone), (place, text)
        for name in re.findall(r"`([a-z]\w*(?:=[^`]*)?)`", text):
            if name.partition("=")[0] in arguments():
                said = usage.in_flags(f"give `{name}`", sorted(flags))
                assert re.fullmatch(r"give --[a-z-]+( .*)?", said), (place, name)
                spoken += 1
    assert spoken >= 15


def arguments() -> set[str]:
    """Those of the functions behind the commands."""
    import inspect

    from moe import plan
    from moe.data import prepare
    from moe.ladder.rungs import climb, plan_ladder
    from moe.train import train

    behind = (train, climb, plan_ladder, prepare, plan.predict_small_run)
    return {name for function in behind for name in inspect.signature(function).parameters} | {
        "text",
        "data",
        "seq_len",
    }


def moe(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-m", "moe", *words], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_tables_heed_the_width_and_lose_nothing(columns) -> None:
    wide = moe("plan", "sweep", "--batch", "1", "64")
    narrow = moe("plan", "sweep", "--batch", "1", "64", COLUMNS=str(columns), NO_COLOR="1")
    assert "\x1b" not in wide.stdout + narrow.stdout
    assert "…" not in narrow.stdout
    assert max(map(len, narrow.stdout.splitlines()[1:])) <= columns
    figures = re.findall(FIGURE, wide.stdout.partition("━")[2])
    assert sorted(re.findall(FIGURE, narrow.stdout.partition("\n")[2])) == sorted(figures)


def test_columns_of_words_are_folded_and_those_of_figures_are_not(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    draw_table("a table", ["figure", "words"], [["1,234,567", "so many words that they take several lines"]], {"words"})
    out = capsys.readouterr().out
    assert "1,234,567" in out
    assert max(map(len, out.splitlines())) <= 40
    assert out.count("│ ") > 2


def test_a_closed_pipe_is_silent() -> None:
    """With more output than a pipe holds, and with less."""
    for words in ("plan sweep --json --batch " + " ".join(map(str, range(1, 200))), "plan params"):
        command = f"set -o pipefail; {sys.executable} -m moe {words} | head -c 1"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=120)
        assert done.stderr == ""
        assert len(done.stdout) == 1


def test_an_interrupt_is_one_line(monkeypatch, capsys) -> None:
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.plan.counts._counts", interrupted)
    assert run_cli("plan", "params") == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands_and_flags(shell, tmp_path) -> None:
    script = tmp_path / "completion"
    assert run_cli("--tyro-write-completion", shell, script) == 0
    text = script.read_text(encoding="utf-8")
    assert all(word in text for word in ("train", "finetune", "sweep", "trace-every"))
    if shell == "bash":
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_process_is_moe_too() -> None:
    process = start_cli("--version")
    assert process.communicate()[0].startswith("gpt4-moe ")
    assert process.returncode == 0
