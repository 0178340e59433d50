"""`moe profile`: the commands in their order, their figures against the library's, and what bad calls get."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe
from moe import profile
from moe.plan.calibrate import read_steps
from tests.conftest import run_cli
from tests.profile.conftest import two_sources


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model and prepared data of two sources."""
    root = tmp_path_factory.mktemp("profile")
    two_sources(root)
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=2, vocab_size=300, max_seq_len=64)
    moe.save(moe.Transformer(cfg), root / "model")
    return root


def test_from_routing_to_placement(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", place / "data", "--tokens", 2000, "--seq-len", 32, "--batch", 4]
    arguments += ["--trace", tmp_path / "t", "--out", tmp_path / "p", "--pictures", tmp_path / "pictures"]
    assert run_cli("profile", "routing", place / "model", *arguments) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "p").read_text())
    trace = profile.Trace.open(tmp_path / "t")
    assert trace.tokens == figures["tokens"] > 1000
    assert trace.counts_PLE().sum(0).tolist() == figures["counts_LE"]
    assert set(figures["sources"]) == {"prose", "code"}
    assert f"{figures['tokens']:,} tokens in {figures['passes']:,} passes" in printed
    assert "share of prose / code" in printed or "share of code / prose" in printed
    assert "layer 1: the tokens an expert serves most" in printed

    assert run_cli("profile", "placement", tmp_path / "t", "--gpus", 4, "--redundant", 4, "--out", tmp_path / "g") == 0
    counts = trace.counts_PLE()
    want = profile.place(counts[::2].sum(0).astype(float), 4, 4)
    assert json.loads((tmp_path / "g").read_text())["gpus"] == [[list(held) for held in gpus] for gpus in want.gpus]
    assert f"{want.max_over_mean(counts[1::2]).mean():.3f}" in capsys.readouterr().out

    assert (
        run_cli("profile", "serving", tmp_path / "t", "--config", "gpt4-8k", "--pictures", tmp_path / "pictures") == 0
    )
    touched = profile.decode_steps(trace.ids_TLK(10**6), 16)[-1].distinct
    gigabytes = touched * moe.plan.params(moe.load_config("gpt4-8k")).expert * 2 / 1e9
    assert f"{gigabytes:,.2f}" in capsys.readouterr().out

    drawn = {file.name for file in (tmp_path / "pictures").iterdir() if file.stat().st_size > 10_000}
    assert drawn == {"load.png", "time.png", "together.png", "sources.png", "serving.png"}

    assert run_cli("profile", "compare", tmp_path / "t", tmp_path / "t") == 0
    assert "0.000%" in capsys.readouterr().out


def test_what_bad_calls_get(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.zeros((3, 2, 2), dtype=np.int64) + np.array([0, 1])
    profile.import_routed_experts(tmp_path / "one", [ids], n_layers=2, n_experts=16, top_k=2)
    for arguments, status, message in (
        (["placement", tmp_path / "one", "--gpus", 2], 2, "has 1 passes; 2 are needed"),
        (["placement", tmp_path / "none", "--gpus", 2], 1, "no trace.json there"),
        (["serving", tmp_path / "one", "--config", "gpt5"], 2, "gpt5"),
        (["compare", tmp_path / "one", tmp_path / "none"], 1, "no trace.json there"),
        (["routing", place / "model", "--data", tmp_path], 1, "no prepared data"),
        (["routing", place / "data", "--data", place / "data"], 1, "config.toml"),
    ):
        assert run_cli("profile", *arguments) == status
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["serving", "--bandwidth", "0"], "--bandwidth 0.0: must be at least 0.001"),
        (["serving", "--bandwidth", "-1"], "--bandwidth -1.0: must be at least"),
        (["serving", "--bandwidth", "nan"], "--bandwidth = 'nan': must be"),
        (["serving", "--bandwidth", "inf"], "--bandwidth = 'inf': must be"),
        (["serving", "--bandwidth", "1e308"], "--bandwidth 1e+308: must be at most 1e+09"),
        (["serving", "--bandwidth", "1e-320"], "--bandwidth 1e-320: must be at least"),
        (["serving", "--bits", "0"], "--bits 0: must be at least 1"),
        (["serving", "--bits", "-8"], "--bits -8: must be at least 1"),
        (["serving", "--config", "replica-tiny", "--bits", "16"], "has 16 experts a layer, but"),
        (["placement", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["placement", "--gpus", "-2"], "--gpus -2: must be at least 1"),
        (["placement", "--gpus", str(10**15)], f"--gpus {10**15}: must be at most 1e+06"),
        (["placement", "--gpus", "2", "--redundant", "-1"], "redundant = -1: must be 0 to 8"),
    ],
)
def test_numbers_that_cannot_be(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.zeros((3, 2, 2), dtype=np.int64) + np.array([0, 1])
    profile.import_routed_experts(tmp_path / "t", [ids, ids], n_layers=2, n_experts=8, top_k=2)
    config = [] if "--config" in flags else ["--config", "gpt4-8k"] if flags[0] == "serving" else []
    assert run_cli("profile", flags[0], tmp_path / "t", *config, *flags[1:]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["routing", "report", "compare"])
@pytest.mark.parametrize("flag", ["--tokens", "--seq-len", "--batch"])
def test_sizes_are_checked_before_a_model_is_loaded(
    command: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / "no-model"] * (2 if command == "compare" else 1)
    for value in ("0", "-1", str(10**15)):
        assert run_cli("profile", command, *places, "--data", tmp_path, flag, value) == 2
        assert f"{flag} {value}: must be at {'most' if len(value) > 2 else 'least'} 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["routing", "serving", "step"])
def test_pictures_that_cannot_be_drawn_are_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moe.io.figures.can_draw", lambda: False)
    given = ["--data", tmp_path] if command == "routing" else []
    assert run_cli("profile", command, tmp_path / "nothing", *given, "--pictures", tmp_path / "p") == 1
    assert "pictures need matplotlib: pip install" in capsys.readouterr().err


def test_what_is_there_is_left_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "file").write_text("mine")
    arguments = ["--data", place / "data", "--trace", tmp_path / "t"]
    assert run_cli("profile", "routing", tmp_path / "no-model", *arguments) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["file"]


@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (3, 3)])
def test_a_model_with_nothing_to_choose(
    n_experts: int, top_k: int, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer, in which every token goes to every expert; and so little text that a source has one window."""
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=1, vocab_size=300, max_seq_len=64)
    cfg = cfg.with_overrides([f"experts.n_experts={n_experts}", f"experts.top_k={top_k}"])
    moe.save(moe.Transformer(cfg), tmp_path / "model")
    arguments = ["--data", place / "data", "--tokens", 32, "--seq-len", 32]
    files = ["--out", tmp_path / "p.json", "--pictures", tmp_path / "pictures"]
    assert run_cli("profile", "routing", tmp_path / "model", *arguments, *files) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert "±" in printed
    content = (tmp_path / "p.json").read_text()
    assert "NaN" not in content
    assert json.loads(content)["load_entropy_L"] == pytest.approx([1.0])
    flags = ["--time-rounds", 0, "--out", tmp_path / "r.html"]
    assert run_cli("profile", "report", tmp_path / "model", *arguments, *flags) == 0


def test_a_step_part_by_part(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch", 2, "--seq-len", 16, "--rounds", 1, "--dtype", "fp32", "--device", "cpu"]
    files = ["--out", tmp_path / "s.json", "--pictures", tmp_path / "pictures", "--chrome", tmp_path / "trace.json"]
    assert run_cli("profile", "step", place / "model", *flags, *files) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "s.json").read_text())
    assert {"optimizer", "up", "down", "permute", "combine", "router", "attention", "head"} <= {
        row["component"] for row in figures["rows"]
    }
    assert all(row["component"] in printed for row in figures["rows"])
    assert sum(row["seconds"] for row in figures["rows"]) == pytest.approx(figures["seconds"])
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"step.png", "memory.png"}
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for what in ("forward", "backward", "decode"):
        arguments = ["--what", what, "--set", "n_layers=1", "--out", tmp_path / f"{what}.json"]
        assert run_cli("profile", "step", "replica-tiny", *arguments, *flags) == 0
        printed = capsys.readouterr().out
        assert f"replica-tiny, {what}, 2 x {1 if what == 'decode' else 16} tokens" in printed
        assert "predicted and measured: a step " in printed
    _, forward, backward, decode = read_steps(tmp_path / "plan.csv")
    assert [forward.kind, backward.kind, decode.kind] == ["forward", "backward", "decode"]
    one = moe.load_config("replica-tiny").with_overrides(["n_layers=1"])
    # All S x S scores or their causal half: between the two conventions.
    low, high = (32 * moe.plan.flops_per_token(one, context=16, causal=causal) for causal in (True, False))
    assert 0.99 * low <= forward.flop <= 1.01 * high
    assert forward.seconds == json.loads((tmp_path / "forward.json").read_text())["plain_seconds"]
    assert run_cli("plan", "calibrate", tmp_path / "plan.csv", "--json") == 0
    assert json.loads(capsys.readouterr().out)["calibrate.steps"]["value"] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replica-tiny", "--seq-len", 257], "--seq-len = 257: must be from 1 to 256"),
        (["replica-tiny", "--batch", 0], "--batch = 0: must be from 1"),
        (["replica-tiny", "--what", "decode", "--context", 256], "context = 256: must be at least 0 and less than"),
        (["replica-tiny", "--what", "decode", "--context", -1], "context = -1: must be at least 0 and less than"),
        (["replica-tiny", "--seq-len", 0], "--seq-len = 0: must be from 1 to 256"),
        (["replica-tiny", "--rounds", 0], "--rounds 0: must be at least 1"),
        (["replica-tiny", "--set", "n_layer=1"], "n_layers"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_steps_that_cannot_be_measured(arguments: list[Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("profile", "step", *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_keeps_its_shape(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("profile", "step", place / "model", "--set", "n_layers=1") == 2
    assert "is a checkpoint, whose shape is given" in capsys.readouterr().err


def test_the_windows_are_those_of_training_unless_asked_otherwise(tmp_path: Path, place: Path) -> None:
    """A model that was trained on short windows is not judged beyond them; a comparison takes what both know."""
    cfg = moe.load(place / "model").cfg.with_overrides(["train.seq_len=16"])
    moe.save(moe.Transformer(cfg), tmp_path / "short")
    for more, longest in (([], 16), (["--seq-len", 32], 32)):
        trace = tmp_path / f"trace{longest}"
        arguments = ["--data", place / "data", "--tokens", 600, "--batch", 1, "--trace", trace, *more]
        assert run_cli("profile", "routing", tmp_path / "short", *arguments) == 0
        counts_PLE = profile.Trace.open(trace).counts_PLE()
        assert counts_PLE[:, 0].sum(-1).max() == longest * cfg.experts.top_k
    arguments = [tmp_path / "short", place / "model", "--data", place / "data", "--tokens", 600]
    assert run_cli("profile", "compare", *arguments) == 0
