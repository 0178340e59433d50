"""The scripts of examples/ run as a stranger runs them, on a CPU, in seconds, and say something useful."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WORDS
from tests.test_imports import ROOT

EXAMPLES = ROOT / "examples"


def run(script: str, place: Path, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("GPT4_MOE_CPU_BF16", None)  # as on a reader's machine
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_has_a_test_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(scripts) == 5
    assert all(f'run("{script}"' in here for script in scripts)


def test_train_on_your_text(tmp_path: Path) -> None:
    draw = random.Random(0)
    paragraphs = [" ".join(draw.choices(WORDS, k=40)) + "." for _ in range(100)]
    (tmp_path / "novel.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    arguments = ["novel.txt", "--document-size", 200, "--vocab-size", 290, "--context", 32, "--steps", 4]
    out = run("train_on_your_text.py", tmp_path, *arguments)
    assert "novel: 50 documents for train" in out
    assert "held-out bits per byte" in out
    assert (tmp_path / "runs" / "mine" / "run" / "final" / "model.safetensors").is_file()
    again = run("train_on_your_text.py", tmp_path, *arguments)
    assert "is complete" in again


def test_routes_of_a_hf_moe(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = run("routes_of_a_hf_moe.py", tmp_path, "--seq-len", 64, "--trace", "trace")
    assert "Qwen3MoeForCausalLM" in out
    assert len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) == 3  # a line a layer
    assert (tmp_path / "trace").is_dir()


def test_fused_op_in_your_layer(tmp_path: Path) -> None:
    out = run("fused_op_in_your_layer.py", tmp_path, "--tokens", 256, "--d-model", 32, "--d-ff", 48, "--steps", 10)
    errors = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("gradient of ")]
    assert len(errors) == 3
    assert max(errors) < 1e-4
    first, last = (float(line.split()[-1]) for line in out.splitlines() if "loss" in line)
    assert last < first


def test_plan_a_purchase(tmp_path: Path) -> None:
    out = run("plan_a_purchase.py", tmp_path)
    assert "46.7B parameters" in out
    card = "NVIDIA H100 SXM5 80 GB"
    (row,) = (line.removeprefix(card).split() for line in out.splitlines() if line.startswith(card))
    gpus, users = int(row[0]), int(row[5])  # between them the layout: tp, pp, dp, ep
    assert gpus * 80e9 > 46.7e9 * 2
    assert users >= 100


def test_train_over_processes(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(
        'name = "small"\nd_model = 32\nn_layers = 2\nvocab_size = 300\nmax_seq_len = 16\n'
        "[attention]\nn_heads = 4\nhead_dim = 8\n[experts]\nn_experts = 4\nd_ff = 24\n"
    )
    arguments = [data_dir, "--config", "small.toml", "--mesh", "pp=2", "--batch-size", 4, "--lr", 1e-2]
    out = run("train_over_processes.py", tmp_path, *arguments, "--steps", 6)
    losses = [float(line.split()[2]) for line in out.splitlines() if line.startswith("step ")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert (tmp_path / "runs" / "processes" / "final" / "model.safetensors").is_file()
    assert "step 8:" in run("train_over_processes.py", tmp_path, *arguments, "--steps", 8)
