"""Numbers that cannot be: one line that says so, before anything is written, and never a stack trace."""

import math

import pytest
import torch

from moe.data import TokenData
from moe.data.mixture import Mixture
from moe.errors import ConfigError, DataError, TrainError
from moe.ladder.rungs import plan_ladder
from moe.lora import LoraConfig
from moe.model import sample
from moe.train import train
from moe.train.finetune import recipe
from moe.train.schedule import Schedule
from tests.conftest import run_cli


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, 1e308])
def test_lengths_that_cannot_be_are_refused_by_name(cfg, data_dir, tmp_path, value):
    with pytest.raises(ConfigError, match=r"tokens_per_parameter = .*20 is customary"):
        plan_ladder(cfg, data_dir, ["96x1", "96x2", "96x3", "192x1"], "192x2", tokens_per_parameter=value)
    with pytest.raises(ConfigError, match=r"epochs = .*must be greater than 0"):
        recipe(tmp_path, None, epochs=value, lora=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"lora.alpha = "):
        LoraConfig(alpha=value)


def test_counts_beyond_all_memory_are_refused_by_name(cfg, data_dir):
    with pytest.raises(ConfigError, match=r"lora.rank = 1000000000: .*at most 65,536"):
        LoraConfig(rank=10**9)
    with pytest.raises(DataError, match=r"epochs\['prose'\] is 10000000"):
        Mixture(TokenData.open(data_dir), 16, 0, {"prose": 10**7})
    with pytest.raises(ConfigError, match=r"train.tokens = 5000000000000000000: .*must be less than 4.61e"):
        Schedule(cfg.with_overrides(["train.tokens=5000000000000000000"]).train, 16, 100)


@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 1e-320])
def test_a_vanishing_temperature_takes_the_likeliest(temperature):
    logits_BV = torch.tensor([[1.0, 1.25, -3.0], [-1e4, -2e4, -1.5e4], [5e4, 1e-7, 0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        assert sample(logits_BV.to(dtype), temperature, 0, 1.0, None).tolist() == [1, 0, 0]


def test_of_equal_logits_a_vanishing_temperature_draws_any():
    drawn = sample(torch.tensor([[2.0, 2.0, 1.0]]).expand(200, 3), 1e-320, 0, 1.0, None)
    assert set(drawn.tolist()) == {0, 1}


def test_a_vanishing_top_p_keeps_the_likeliest():
    assert sample(torch.tensor([[1.0, 1.25, -3.0]]), 1.0, 0, 1e-320, None).tolist() == [1]


@pytest.mark.parametrize("setting", ["train.lr=9e29", "train.weight_decay=9e29"])
def test_an_update_that_ruins_the_weights_is_said_and_gives_no_model(cfg, data_dir, tmp_path, setting):
    cfg = cfg.with_overrides(["train.steps=1", "train.warmup=0", setting])
    with pytest.raises(TrainError, match=r"not finite|is nan|is inf"):
        train(cfg, data_dir, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_command_says_it_in_one_line(cfg_file, data_dir, tmp_path, capsys):
    out = ["--data", data_dir, "--out", tmp_path / "run", "--set", "train.warmup=0", "train.steps=1", "train.lr=9e29"]
    assert run_cli("train", cfg_file, *out) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "train.lr (now 9e+29)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "setting", ["train.muon_lr", "train.lr", "train.weight_decay", "train.embedding_lr", "router.bias_update_rate"]
)
def test_rates_beyond_float32_are_refused_by_name(cfg, setting):
    """An optimizer raised on one, and a router's bias became infinite without a word."""
    with pytest.raises(ConfigError, match=rf"{setting} = 1e\+308: must be below 1e\+30"):
        cfg.with_overrides([f"{setting}=1e308"])
