"""What a run will take, said before it starts, against what it took."""

import json
import re

import pytest
import torch

import moe
from moe import device as devices
from moe.config import load_config
from moe.data import TokenData
from moe.errors import ConfigError, DataError, TrainError
from moe.train import predicted, train
from moe.train.forecast import check_memory, forecast
from tests.conftest import run_cli, start_cli


def test_steps_and_tokens_are_those_of_the_run(cfg, data_dir, tmp_path):
    cfg = cfg.with_overrides(["train.tokens=6400", "train.batch_ramp=0:64 1280:208", "train.eval_every=0"])
    found = forecast(cfg, data_dir)
    result = train(cfg, data_dir, tmp_path / "run")
    assert (found.steps, found.tokens) == (result.step, 16 * result.summary["windows"])
    assert 0.99 * found.tokens < result.summary["tokens"] <= found.tokens  # windows at the end of a source are not full
    tokens = sum(-(-len(TokenData.open(data_dir).tokens(s, "train")) // 16) * 16 for s in ("prose", "verse"))
    assert found.passes == pytest.approx(6400 / tokens)
    assert 0 < found.seconds < result.summary["train_seconds"]


def test_tried_layers_say_a_time_above_the_least(cfg, data_dir):
    """A smaller model is faster than its products' best rate by no means, and a longer run takes as much longer."""
    found = forecast(cfg.with_overrides(["n_layers=3", "train.micro_batch=2"]), data_dir, trial=True)
    assert found.likely is not None
    assert found.likely > found.seconds
    assert forecast(cfg, data_dir).likely is None


def test_what_is_too_large_is_not_tried(cfg):
    huge = load_config("gpt4-8k")
    assert predicted.trial_step(huge, 1, torch.float32, torch.device("cpu"), 1e12) is None


def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli("train", "replica-tiny", "--dry-run", "--set", "train.batch_size=1", "train.seq_len=8") == 0
    printed = capsys.readouterr().out
    assert "data to be prepared in data/default-" in printed
    assert list(tmp_path.iterdir()) == []
    assert run_cli("train", "replica-tiny", "--dry-run", "--set", "train.tokens=epochs") == 1
    assert "moe data prepare" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_data_are_read_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli("train", "gpt4-8k") == 1
    error = " ".join(capsys.readouterr().err.split())
    match = re.search(
        r"gpt4-8k does not fit: a step needs ([\d,.]+) GiB .*weights ([\d,.]+), gradients .* cpu has ", error
    )
    assert match, error
    needs, weights = (float(figure.replace(",", "")) for figure in match.groups())
    assert weights == pytest.approx(4 * moe.plan.params(load_config("gpt4-8k")).total / 2**30, rel=1e-3)
    assert needs > 4 * weights, "gradients and two moments beside them"
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_share_of_the_batch_is_the_remedy_where_it_is_one(cfg, data_dir, tmp_path, monkeypatch):
    wide = cfg.with_overrides(["train.batch_size=4096", "train.seq_len=32"])
    monkeypatch.setattr(devices, "memory_available", lambda device: 2**28)
    with pytest.raises(TrainError, match=r"lower train.micro_batch \(now 4096\)"):
        train(wide, tmp_path / "no data", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    check_memory(wide.with_overrides(["train.micro_batch=64"]), torch.device("cpu"))


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    for files, available in (("limit", 10**6), ("none", None), ("absent", None)):
        monkeypatch.setattr(devices, "CGROUPS", ((tmp_path / files, tmp_path / "absent"),))
        found = devices.memory_available(torch.device("cpu"))
        assert found == available or (available is None and found > 2**27)


def test_an_earlier_peak_is_not_this_runs(cfg, data_dir, tmp_path):
    """Preparing data, or another run in the same process, may have taken more."""
    large = torch.ones(700 * 2**20, dtype=torch.uint8)
    peak = predicted.memory_peak(torch.device("cpu"))
    del large
    plan = train(cfg.with_overrides(["train.steps=1"]), data_dir, tmp_path / "run").summary["plan"]
    assert plan["memory_bytes"] < peak - 300 * 2**20


@pytest.mark.slow
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


def test_a_dry_run_of_what_cannot_fit_does_not_advise_smaller_batches(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli("train", "gpt4-8k", "--dry-run", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "train a smaller model" in said
    assert "halve train.micro_batch" not in said
    assert not list(tmp_path.iterdir())
