"""`moe bench`: tables, JSON, CSV, pictures, rows for the planner, and what is refused."""

import csv
import json
from pathlib import Path

import pytest

import moe
from moe.plan.hardware import load_hardware
from tests.conftest import run_cli, tiny_config

SMALL = ("--input-len", 6, "--output-len", 3, "--dtype", "fp32")
COMMANDS = {
    "latency": ("--batch", 1, 2, "--rounds", 1),
    "throughput": ("--batch", 1, 2, "--requests", 3),
    "serve": ("--rate", 100, 400, "--requests", 3, "--max-running", 2, "--ttft-limit", 1e9),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench") / "model"
    moe.save(moe.Transformer(tiny_config()), place)
    return place


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nothing has to be measured of."""
    monkeypatch.setattr("moe.serve.roofline.machine", lambda *_: load_hardware("cpu"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_in_every_form(command: str, checkpoint: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    files = ("--csv", tmp_path / "rows.csv", "--pictures", tmp_path, "--calibrate", tmp_path / "plan.csv")
    files += ("--passes", tmp_path / "passes.csv")
    assert run_cli("bench", command, checkpoint, *SMALL, *COMMANDS[command], *files) == 0
    out = capsys.readouterr().out
    x = "rate" if command == "serve" else "batch"
    assert "plan_tpot_ms" in out
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row[x]) for row in rows] == list(COMMANDS[command][1:3])
    assert all(float(row["throughput"]) > 0 and float(row["plan_throughput"]) > 0 for row in rows)
    assert ("goodput" in rows[0]) == (command == "serve")
    assert (tmp_path / f"serving-{x}.png").stat().st_size > 10_000
    with (tmp_path / "passes.csv").open() as file:
        passes = list(csv.DictReader(file))
    assert {p["row"] for p in passes} == {"0", "1"}
    assert all(float(p["bytes"]) > float(p["expert_bytes"]) > 0 for p in passes)
    assert run_cli("plan", "calibrate", tmp_path / "plan.csv") == 0


def test_a_configuration_with_random_weights_as_json(capsys) -> None:
    shape = ("--set", "d_model=24", "n_layers=1", "vocab_size=61", "experts.d_ff=16")
    drafts = ("--speculative", "ngram", "--workload", "prefix-repetition", "--prefix-len", 2)
    assert run_cli("bench", "latency", "replica-tiny", *shape, *SMALL, *drafts, "--batch", 2, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["batch"], row["requests"]) == (2, 6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--input-len", 0), "error: --input-len = 0: must be 1 or more"),
        (("--output-len", 1), "error: --output-len = 1: must be 2 or more"),
        (("--input-len", 39, "--output-len", 2), "make up to 41 tokens, and the context of tiny is 40"),
        (("--batch", 0), "error: --batch 0: must be at least 1"),
        (("--rounds", 0), "error: --rounds 0: must be at least 1"),
        (("--set", "n_layers=1"), "is a checkpoint, whose shape is given"),
        ((*SMALL, "--max-batch-tokens", 0), "error: --max-batch-tokens = 0: must be 1 or more"),
    ],
)
def test_what_cannot_be_is_one_line(args: tuple, message: str, checkpoint: Path, capsys) -> None:
    assert run_cli("bench", "latency", checkpoint, "--dtype", "fp32", *args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
