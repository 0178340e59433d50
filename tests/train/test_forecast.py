"""What a run will take, said before it starts, against what it took."""

import json
import re

import pytest

from moe.data import TokenData
from moe.errors import ConfigError, DataError
from moe.train import train
from moe.train.forecast import forecast
from tests.conftest import run_cli, start_cli


def test_steps_and_tokens_are_those_of_the_run(cfg, data_dir, tmp_path):
    cfg = cfg.with_overrides(["train.tokens=6400", "train.batch_ramp=0:64 1280:208", "train.eval_every=0"])
    found = forecast(cfg, data_dir)
    result = train(cfg, data_dir, tmp_path / "run")
    assert (found.steps, found.tokens) == (result.step, result.summary["tokens"])
    tokens = sum(-(-len(TokenData.open(data_dir).tokens(s, "train")) // 16) * 16 for s in ("prose", "verse"))
    assert found.passes == pytest.approx(6400 / tokens)
    assert 0 < found.seconds < result.summary["train_seconds"]


def test_memory_is_that_of_the_run_in_processes_of_their_own(cfg_file, data_dir, tmp_path):
    """Of so small a run nearly all is Python and torch, which load half of themselves when training begins."""
    arguments = ["train", cfg_file, "--data", data_dir, "--out", tmp_path / "run"]
    printed = printed_by(*arguments, "--dry-run")
    printed_by(*arguments)
    match = re.search(r"memory at the peak: (\d+\.\d\d) GiB", printed)
    assert match
    taken = json.loads((tmp_path / "run" / "summary.json").read_text())["plan"]["memory_bytes"]
    assert float(match[1]) * 2**30 == pytest.approx(taken, rel=0.15)


def printed_by(*arguments):
    """The output of the command, in a process of its own."""
    process = start_cli(*arguments)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def test_a_dry_run_starts_nothing(cfg_file, data_dir, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_cli("train", cfg_file, "--data", data_dir, "--out", out, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "8 steps, 512 tokens" in printed
    assert re.search(r"memory at the peak: \d+\.\d\d GiB of", printed)
    assert not out.exists()


def test_what_training_would_refuse(cfg, data_dir):
    with pytest.raises(DataError, match="vocab_size"):
        forecast(cfg.with_overrides(["vocab_size=200"]), data_dir)
    with pytest.raises(ConfigError, match="less than one window"):
        forecast(cfg.with_overrides(["train.tokens=7"]), data_dir)
