"""Every command and every example of README and docs runs as it stands there, as a test of its own.

Commands run in this process and in one directory, where a command that others need runs once, before them. The sources
that `moe data` takes by default are small here. `make demo`, `make recipe` and `make gpu` are run by slow tests,
shortened; what `make aot` runs is run by kernels/test_ahead.py; benchmarks, which take minutes, show their help.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe.data.sources import Source
from tests.conftest import run_cli

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
TEXTS = {page: path.read_text(encoding="utf-8") for page, path in PAGES.items()}
README_BYTES = 9_000
# All in one worker of pytest -n: the commands share what they make.
pytestmark = pytest.mark.xdist_group("documentation")


class Block(NamedTuple):
    """A fenced block; `title` is the name of a file that it is to be in."""

    page: str
    language: str
    title: str
    text: str


class Command(NamedTuple):
    """A line of a bash block: the words up to a comment."""

    page: str
    words: tuple[str, ...]


def blocks() -> list[Block]:
    fence = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
    return [Block(page, *found) for page, text in TEXTS.items() for found in fence.findall(text)]


BLOCKS = blocks()


def commands(first: str = "") -> list[Command]:
    """Those that begin with this word, or all."""
    lines = [(b.page, line) for b in BLOCKS if b.language == "bash" for line in b.text.splitlines()]
    found = [Command(page, tuple(shlex.split(line, comments=True))) for page, line in lines]
    return [c for c in found if c.words and first in ("", c.words[0])]


def named(command: Command) -> str:
    return f"{command.page}: {shlex.join(command.words)}"


def environment() -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found.pop("GPT4_MOE_CPU_BF16", None)
    return found


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


# ------------------------------------------------------------------------------------------------------ the commands


def pieces(pattern: str, size: int = 1500) -> Iterator[str]:
    """Real text, or code, in pieces of a file's size."""
    for path in sorted(ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        yield from (text[i : i + size] for i in range(0, len(text), size))


def write_pieces(folder: Path, pattern: str, suffix: str) -> None:
    folder.mkdir()
    for i, text in enumerate(islice(pieces(pattern), 60)):
        (folder / f"{i}{suffix}").write_text(text, encoding="utf-8")


def small_conversations() -> tuple[tuple[str, list[dict[str, str]]], ...]:
    turns = (("user", "Say {i} again."), ("assistant", "{i}, and {i} again."))
    return tuple((f"f{i}", [{"role": r, "content": c.format(i=i)} for r, c in turns]) for i in range(80))


class Workshop:
    """The directory in which all commands run, and what they printed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.printed: dict[tuple[str, ...], str] = {}

    def run(self, command: Command) -> str:
        """Runs what makes the command's inputs, then the command; each of them once."""
        if command.words not in self.printed:
            for earlier in needed(command):
                self.run(earlier)
            out = io.StringIO()
            with (
                contextlib.chdir(self.root),
                contextlib.redirect_stdout(out),
                pytest.MonkeyPatch.context() as patch,
            ):
                # As a reader's machine is: bfloat16 forced onto one without it would take many times as long.
                patch.delenv("GPT4_MOE_CPU_BF16", raising=False)
                status = run_cli(*command.words[1:])
            assert status == 0, f"{shlex.join(command.words)}\n{out.getvalue()}"
            self.printed[command.words] = out.getvalue()
        return self.printed[command.words]


def needed(command: Command) -> list[Command]:
    """The commands above it on its page that make what it names."""
    page = [c for c in commands("moe") if c.page == command.page]
    names = [word.rpartition("=")[2] for word in command.words]
    return [
        earlier
        for earlier in page[: page.index(command)]
        if any(name == place or name.startswith(f"{place}/") for place in made_by(earlier) for name in names)
    ]


def made_by(command: Command) -> Iterator[str]:
    """Where it writes; beside a file lie others."""
    for option, value in zip(command.words, command.words[1:], strict=False):
        if option in ("--out", "--trace"):
            yield os.path.dirname(value) if os.path.splitext(value)[1] else value
    if command.words[:2] == ("moe", "export"):
        yield command.words[3]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Texts, code and rows as the pages have them, and small default sources."""
    root = tmp_path_factory.mktemp("documentation")
    write_pieces(root / "my-texts", "docs/*.md", ".txt")
    write_pieces(root / "my-code", "moe/*.py", ".py")
    (root / "my-book.txt").write_text("".join(islice(pieces("docs/*.md"), 20)), encoding="utf-8")
    rows = (json.dumps({"text": text}) for text in islice(pieces("kernels/*.py"), 60))
    (root / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for block in BLOCKS:
        if block.title:
            (root / block.title).parent.mkdir(exist_ok=True)
            (root / block.title).write_text(block.text, encoding="utf-8")
    defaults = [Source("text", root / "my-texts"), Source("code", root / "my-code")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.data.corpus.default_sources", lambda: (defaults, []))
        patch.setattr("moe.data.instructions.standard_library", small_conversations)
        patch.setattr("moe.data.instructions.small_talk", lambda: small_conversations())
        yield Workshop(root)


@pytest.mark.parametrize("command", dict.fromkeys(commands("moe")), ids=named)
def test_command_runs(command: Command, workshop: Workshop) -> None:
    assert workshop.run(command).strip()


EXAMPLES = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{b.page}: {b.text.split()[-1][:40]}" for b in EXAMPLES])
def test_example_runs(example: Block, workshop: Workshop) -> None:
    if "__main__" in example.text:  # it starts processes, which import it
        script = workshop.root / "example.py"
        script.write_text(example.text, encoding="utf-8")
        run([sys.executable, str(script)], workshop.root)
        return
    with contextlib.chdir(workshop.root):
        exec(compile(example.text, example.page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", dict.fromkeys(commands("python")), ids=named)
def test_script_starts(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It shows its help, which needs its imports to work."""
    if command.words[1] == "-m":
        run([sys.executable, *command.words[1:3], "--help"], ROOT)
        return
    script = ROOT / command.words[1]
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    before = set(sys.modules)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]
    assert exit_.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("command", dict.fromkeys(commands("make")), ids=named)
def test_target_exists(command: Command) -> None:
    run(["make", "--dry-run", *command.words[1:]], ROOT)


def test_the_demo_installs_what_it_needs_and_the_tests_the_rest(tmp_path: Path) -> None:
    def installs(target: str) -> list[str]:
        done = run(["make", "--dry-run", target, f"VENV={tmp_path}", f"BIN={tmp_path}/bin"], ROOT)
        return re.findall(r"-e '\.\[(\w+)\]'", done.stdout)

    assert installs("demo") == installs("aot") == ["demo"]
    assert installs("test") == ["dev"]
    for stamp in (".installed-torch", ".installed-demo"):
        (tmp_path / stamp).touch()
    assert installs("demo") == []
    assert installs("test") == ["dev"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras["demo"] == ["gpt4-moe[train,plot,texts]"]


def test_every_kind_of_block_is_known() -> None:
    """A new kind of command, or of block, needs a test here."""
    assert {c.words[0] for c in commands()} <= {"make", "moe", "python"}
    assert {b.language for b in BLOCKS} <= {"bash", "python", "sh", "text", "json", "yaml"}
    assert all(b.title for b in BLOCKS if b.language in ("json", "yaml"))


def test_installation_is_that_of_the_project() -> None:
    """Shell blocks install: nothing here runs them, but versions, extras and packages are those of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    core = {re.split(r"[>=;]", d)[0] for d in project["dependencies"]} - {"torch", "triton"}
    lines = [line for b in BLOCKS if b.language == "sh" for line in b.text.splitlines()]
    assert all(line.startswith("pip install ") for line in lines)
    assert torch
    assert any(torch[1] in line for line in lines)
    assert {w for line in lines for w in line.split()[2:]} >= core
    extras = [e for line in lines for found in re.findall(r"\[(.*?)\]", line) for e in found.split(",")]
    assert extras
    assert set(extras) <= set(project["optional-dependencies"])


# --------------------------------------------------------------------------------------------------------- the pages


def test_readme_is_short() -> None:
    assert len(TEXTS["README.md"].encode()) <= README_BYTES


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def links() -> list[tuple[str, str]]:
    found = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [(page, link) for page, link in dict.fromkeys(found) if not link.startswith("https://")]


@pytest.mark.parametrize(("page", "link"), links())
def test_link_leads_somewhere(page: str, link: str) -> None:
    place, _, anchor = link.partition("#")
    target = (PAGES[page].parent / place).resolve() if place else PAGES[page]
    assert target.exists()
    assert target.is_relative_to(ROOT)
    if anchor:
        assert anchor in anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_page_is_in_the_site_and_its_generated_parts_are_current(page: str) -> None:
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    assert spec
    assert spec.loader
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    assert generated.filled(TEXTS[page]) == TEXTS[page], "run: python docs/generated.py"
    if page != "README.md":
        assert f"  - {PAGES[page].name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "names"), re.findall(r"^::: (\S+)\n.*\n.*\[(.*)\]", TEXTS["docs/api.md"], re.MULTILINE)
)
def test_the_api_page_names_what_there_is(module: str, names: str) -> None:
    found = importlib.import_module(module if module.startswith("moe.") else f"moe.{module}")
    for name in names.split(", "):
        value = getattr(found, name)
        assert value.__module__ == found.__name__, f"{name} is made elsewhere, so the page would leave it out"
        assert value.__doc__


def test_the_changelog_has_no_gaps_in_its_lists() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^(?:- |  ).*\n\n+- ", text, re.MULTILINE) is None


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")], ROOT)
    assert "WARNING" not in done.stderr
    html = (tmp_path / "site" / "train.html").read_text(encoding="utf-8")
    (picture,) = re.findall(r'src="(files/[^"]*demo/loss\.png)"', html)
    assert (tmp_path / "site" / picture).read_bytes() == (ROOT / "benchmarks/results/demo/loss.png").read_bytes()


# --------------------------------------------------------------------------------------------------- targets, slowly


def make(target: str, tmp_path: Path, script: str, *variables: str) -> None:
    """A target of the Makefile in this interpreter's environment, its `moe` being `script`, a line of shell."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    moe = tmp_path / "bin" / "moe"
    moe.write_text(f"#!/bin/sh\n{script.format(moe=f'{shlex.quote(sys.executable)} -m moe')}\n")
    moe.chmod(0o755)
    arguments = [f"VENV={tmp_path}", f"BIN={tmp_path}/bin"]
    for stamp in (".installed-torch", ".installed-demo", ".installed"):
        (tmp_path / stamp).touch()
        arguments += ["--old-file", f"{tmp_path}/{stamp}"]
    run(["make", target, *arguments, *variables], ROOT)


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    """Four steps of it."""
    run_dir = tmp_path / "demo"
    make("demo", tmp_path, 'exec {moe} "$@" --set train.steps=4', f"RUN={run_dir}")
    assert (run_dir / "pictures" / "loss.png").stat().st_size > 10_000
    assert (run_dir / "final" / "model.safetensors").is_file()
    assert (run_dir / "samples.txt").read_text(encoding="utf-8").strip()
    forecast = json.loads((run_dir / "summary.json").read_text())["plan"]
    assert forecast["memory_bytes_predicted"] == pytest.approx(forecast["memory_bytes"], rel=0.15)


@pytest.mark.slow
def test_make_recipe(tmp_path: Path) -> None:
    """All of its stages, a few thousand tokens of each; a second time, nothing is done again."""
    short = 'case $1 in train|finetune) set -- "$@" --set train.tokens=8k;; esac; exec {moe} "$@"'
    make("recipe", tmp_path, short, f"RECIPE={tmp_path}/recipe")
    stages = [tmp_path / "recipe" / name for name in ("256", "1k", "chat")]
    assert (stages[-1] / "pictures" / "stages.png").stat().st_size > 10_000
    written = {path: path.stat().st_mtime_ns for stage in stages for path in stage.rglob("*") if path.is_file()}
    make("recipe", tmp_path, short, f"RECIPE={tmp_path}/recipe")
    assert written == {path: path.stat().st_mtime_ns for stage in stages for path in stage.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_make_gpu_goes_through_without_a_gpu(tmp_path: Path) -> None:
    """Two commands, one after another; benchmarks/test_gpu_run.py has all of them."""
    for group in ("tests", "products"):
        run(["make", "gpu", f"PYTHON={sys.executable}", f"PART={group}", f"FLAGS=--dry-run --out {tmp_path}"], ROOT)
    record = json.loads((tmp_path / "record.json").read_text())
    assert {part["status"] for part in record["parts"].values()} == {"ok"}
    assert {"tests", "kernels", "products"} <= set(record["parts"])
    assert "| gpt4-moe" in (tmp_path / "README.md").read_text()
