"""`moe verify`: processes that are started here, what it prints, and its status."""

import json
from typing import Any

import pytest

from moe.cli import verify as command
from moe.parallel.verify import Row
from tests.conftest import run_cli

SMALL = ["replica-tiny", "--set", "d_model=32", "n_layers=1", "vocab_size=64", "experts.d_ff=16", "--seq-len", 8]


def test_a_mesh_that_holds(capsys: Any) -> None:
    assert run_cli("verify", *SMALL, "--mesh", "tp=2", "--batch-size", 2, "--json") == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert {"what", "error", "tolerance", "holds"} == set(rows[0])
    assert all(row["holds"] and row["error"] <= row["tolerance"] for row in rows)
    assert {"loss", "gradient norm", "gradient head.weight"} <= {row["what"] for row in rows}
    assert f"over 2 processes: tp=2, fp64: all {len(rows)} hold" in err


def test_what_is_off_comes_first_and_ends_with_status_1(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("loss", 1e-16, 1e-12), Row("gradient b", 0.3, 1e-12), Row("gradient a", float("inf"), 1e-12)]
    monkeypatch.setattr(command, "_rows", lambda *_: rows)
    assert run_cli("verify", *SMALL, "--mesh", "tp=2") == 1
    out, err = capsys.readouterr()
    assert out.index("gradient a") < out.index("gradient b") < out.index("loss")
    assert "missing or no number" in out
    assert "2 of 3 are off, first gradient a" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mesh", "tp=3"], "tp = 3: does not divide"),
        (["--mesh", "tq=2"], "'tq' is no degree"),
        (["--mesh", "pp=2", "--schedule", "2f2b"], "schedule = '2f2b'"),
        (["--mesh", "dp=2", "--batch-size", 3], "--batch-size = 3"),
        (["--seq-len", 1], "--seq-len 1"),
    ],
)
def test_what_cannot_be_is_one_line(args: list[Any], message: str, capsys: Any) -> None:
    assert run_cli("verify", *SMALL, *args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
