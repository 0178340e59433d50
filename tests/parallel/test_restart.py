"""Ranks that are killed at any time: the run goes on by itself, and ends with the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moe
from tests.conftest import ROOT

CONFIG = """
name = "killed"
d_model = 32
n_layers = 2
vocab_size = 300
max_seq_len = 16
[attention]
n_heads = 4
head_dim = 8
[experts]
n_experts = 4
d_ff = 24
"""


def started(data: Path, place: Path, steps: int, restarts: int, mesh: str = "dp=2,ep=2") -> "subprocess.Popen[str]":
    place.mkdir(exist_ok=True)
    (place / "config.toml").write_text(CONFIG)
    command = [sys.executable, str(ROOT / "examples" / "train_over_processes.py"), str(data), "--mesh", mesh]
    command += ["--config", str(place / "config.toml"), "--out", str(place / "run"), "--steps", str(steps)]
    command += ["--batch-size", "4", "--save-every", "2", "--restarts", str(restarts)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=place)


def ranks_of(pid: int) -> list[int]:
    """The processes that a launcher has started, by Linux's account."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            if "spawn_main" in command:
                found.append(int(child))
    return found


def weights(place: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in moe.load(place / "run" / "final").named_parameters()}


def with_kills(data: Path, place: Path, steps: int, kills: int, seed: int) -> str:
    rng, said = random.Random(seed), []
    process = started(data, place, steps, restarts=kills)
    assert process.stdout is not None
    wanted = sorted(rng.sample(range(1, steps), kills))
    for line in process.stdout:
        said.append(line)
        if wanted and line.startswith("step ") and int(line.split()[1].rstrip(":")) >= wanted[0]:
            wanted.pop(0)
            time.sleep(rng.random() * 0.05)  # also in the middle of a step, or while a checkpoint is written
            if victims := ranks_of(process.pid):
                os.kill(rng.choice(victims), signal.SIGKILL)
    assert process.wait(60) == 0, "".join(said)
    assert not wanted
    return "".join(said)


def check(data: Path, tmp_path: Path, steps: int, kills: int) -> None:
    alone = started(data, tmp_path / "alone", steps, 0)
    out, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, out
    said = with_kills(data, tmp_path / "killed", steps, kills, seed=1)
    want, got = weights(tmp_path / "alone"), weights(tmp_path / "killed")
    assert all(torch.equal(got[name], p) for name, p in want.items())
    # What it said of its last step, to the last digit; of some steps twice.
    last = f"step {steps}: "
    assert next(x for x in out.splitlines() if last in x) in said.splitlines()
    assert sum(line.startswith("step ") for line in said.splitlines()) > steps


def test_a_run_that_is_killed_ends_as_one_that_is_not(data_dir: Path, tmp_path: Path) -> None:
    check(data_dir, tmp_path, 10, 3)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_is_not(data_dir: Path, tmp_path: Path) -> None:
    check(data_dir, tmp_path, 60, 20)


@pytest.mark.slow
def test_another_mesh_goes_on(data_dir: Path, tmp_path: Path) -> None:
    """Half of a run on two ranks of experts, half on a pipeline: within float32's rounding of the same."""
    for mesh, steps in (("dp=2,ep=2", 4), ("pp=2", 8)):
        half = started(data_dir, tmp_path / "moved", steps, 0, mesh)
        out, _ = half.communicate(timeout=300)
        assert half.returncode == 0, out
    whole = started(data_dir, tmp_path / "stayed", 8, 0)
    out, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, out
    want, got = weights(tmp_path / "stayed"), weights(tmp_path / "moved")
    for name, p in want.items():
        # AdamW's steps are nearly signs, so an element of a vanishing gradient may go the other way.
        assert (got[name] - p).norm() < 1e-4 * p.norm(), name


def test_what_a_rank_says_is_heard(data_dir: Path, tmp_path: Path) -> None:
    """One that fails every time ends the run, with its reason, and leaves no process behind."""
    failing = started(data_dir, tmp_path / "failing", 4, 0, "tp=2")
    assert failing.stdout is not None
    victims: list[int] = []
    for line in failing.stdout:
        if line.startswith("step 1:"):
            victims = ranks_of(failing.pid)
            os.kill(victims[0], signal.SIGKILL)
            break
    out = failing.stdout.read()
    assert failing.wait(60) != 0
    assert "Signal 9 (SIGKILL)" in out
    assert len(victims) == 2
    assert not [pid for pid in victims if Path(f"/proc/{pid}").exists()]
