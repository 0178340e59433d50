"""Every command and every example of README.md runs as it stands there.

`make test` is what runs this, so it is left out; `make demo`, `make recipe` and `make gpu` are run by slow tests of
their own, shortened; what `make aot` runs is run by kernels/test_ahead.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("example", blocks("python"))
def test_examples_run(example: str, tmp_path: Path) -> None:
    run([sys.executable, "-c", example], tmp_path)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_is_known() -> None:
    """A new kind of command in README needs a test here."""
    assert {words[0] for words in commands()} <= {"make", "moe", "python"}
    assert {words[1] for words in commands() if words[0] == "make"} <= {"demo", "recipe", "test", "aot", "gpu"}


def test_moe_commands_run_in_order(tmp_path: Path) -> None:
    shown = [words for words in commands() if words[0] == "moe"]
    assert shown
    for words in shown:
        done = run([sys.executable, "-m", "moe", *words[1:]], tmp_path)
        assert done.stdout.strip()


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "python"], ids=shlex.join)
def test_scripts_start(words: list[str]) -> None:
    """The benchmarks take minutes; here each shows its help, which needs its imports to work."""
    run([sys.executable, *words[1:2], "--help"], ROOT)


@pytest.mark.parametrize("picture", re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README))
def test_pictures_exist(picture: str) -> None:
    assert (ROOT / picture).is_file()


def make(target: str, tmp_path: Path, script: str, *variables: str) -> None:
    """A target of the Makefile in this interpreter's environment, its `moe` being `script`, a line of shell."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    moe = tmp_path / "bin" / "moe"
    moe.write_text(f"#!/bin/sh\n{script.format(moe=f'{shlex.quote(sys.executable)} -m moe')}\n")
    moe.chmod(0o755)
    (tmp_path / ".installed").touch()
    arguments = [f"VENV={tmp_path}", f"BIN={tmp_path}/bin", "--old-file", f"{tmp_path}/.installed"]
    run(["make", target, *arguments, *variables], ROOT)


def test_the_recipe_is_what_the_planner_predicts() -> None:
    """The table of the run that nobody has done: hours, dollars and MFU as the shown commands give them now."""
    from moe import plan
    from moe.config import load_config

    rows = re.findall(r"^\| (\d) x (\S+) \| ([\d.]+)-([\d.]+) \| (\d+)-(\d+) \| (\d+)-(\d+)% \|$", README, re.MULTILINE)
    assert {(dp, name) for dp, name, *_ in rows} == {("8", "h100-sxm"), ("8", "a100-80"), ("1", "h100-sxm")}
    for dp, name, *shown in rows:
        layout = plan.load_layout("node-8").replace(dp=int(dp))
        run = plan.predict_small_run(load_config("replica-1b-web"), layout, plan.load_hardware(name))
        figures = (("hours", "h", 0.005), ("cost", "USD", 0.5), ("mfu", "%", 0.5))
        found = [(run[f"run.{end}.{key}"].to(unit), last) for key, unit, last in figures for end in ("floor", "slow")]
        for text, (value, half) in zip(shown, found, strict=True):
            assert abs(float(text) - value) <= half, (dp, name, text, value)


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
    flags = f"FLAGS=--dry-run --out {tmp_path}"
    run(["make", "gpu", f"PYTHON={sys.executable}", flags], ROOT)
    record = json.loads((tmp_path / "record.json").read_text())
    assert {part["status"] for part in record["parts"].values()} == {"ok"}
    assert {"tests", "expert_mlp", "hf_layer", "step", "linear_cross_entropy", "replica_1b"} == set(record["parts"])
    assert "| gpt4-moe |" in (tmp_path / "README.md").read_text()
