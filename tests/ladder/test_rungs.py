"""The scaling ladder: the rule that moves hyperparameters, and a whole ladder of tiny replicas, interrupted or not."""

import dataclasses
import json
import math
import signal
import sys

import pytest
import torch

import moe
from moe import evaluate
from moe.config import load_config
from moe.data import TokenData, prepare
from moe.errors import ConfigError, DataError, InUseError, TrainError
from moe.io.files import locked
from moe.ladder import rungs
from moe.ladder.picture import draw
from moe.ladder.rungs import LADDER_FILE, climb, plan_ladder
from moe.train.forecast import forecast
from tests.conftest import run_cli

RUNGS = ("96x1", "96x2", "96x3", "192x1")
HELD_OUT = "192x2"
RATIO = 0.005


@pytest.fixture
def small(cfg, data_dir):
    """Four replicas of a few dozen steps, and a held-out one."""
    return plan_ladder(cfg, data_dir, RUNGS, HELD_OUT, tokens_per_parameter=RATIO)


@pytest.fixture(scope="module")
def climbed_once(tmp_path_factory, data_dir):
    """A ladder of the same replicas that ran through, with what was there when the prediction was announced."""
    shape = ["d_model=64", "n_layers=1", "vocab_size=300", "max_seq_len=32", "attention.n_heads=2"]
    shape += ["attention.head_dim=16", "experts.n_experts=4", "experts.d_ff=64"]
    recipe = ["steps=8", "seq_len=16", "batch_size=4", "warmup=2", "lr=3e-3", "log_every=1", "eval_every=4"]
    recipe += ["eval_tokens=256", "save_every=4", "dtype=fp32"]
    base = load_config("replica-tiny").with_overrides([*shape, *(f"train.{r}" for r in recipe)])
    place = tmp_path_factory.mktemp("ladder") / "out"
    steps = plan_ladder(base, data_dir, RUNGS, HELD_OUT, tokens_per_parameter=RATIO)
    at_prediction = {}

    def announce(climbed):
        at_prediction["record"] = json.loads((place / LADDER_FILE).read_text())
        at_prediction["runs"] = sorted(p.name for p in place.iterdir() if p.is_dir())

    return climb(steps, place, announce=announce), place, at_prediction


# ------------------------------------------------------------------------------------------------------------- rule


def test_a_replica_of_the_base_itself_gets_the_settings_of_the_base(data_dir):
    base = load_config("replica-nano")
    t, active = base.train, moe.plan.params(base).active["output"]
    ratio = t.steps * t.batch_size * t.seq_len / active
    steps = plan_ladder(base, data_dir, ["96x1", "96x2", "96x4", "192x4"], "384x6", tokens_per_parameter=ratio)
    same = steps.rungs[-1].cfg
    assert (same.d_model, same.n_layers, same.attention, same.experts) == (192, 4, base.attention, base.experts)
    for key in ("steps", "batch_size", "lr", "muon_lr", "warmup", "schedule", "embedding_lr", "decay", "min_lr"):
        assert getattr(same.train, key) == getattr(t, key), key
    assert steps.rungs[-1].flop == pytest.approx(steps.base_flop, rel=1e-6)


def test_rates_and_batch_follow_the_published_exponents(data_dir):
    """DeepSeek LLM, equation 1: batches are whole, so their exponent is met within rounding."""
    base = load_config("replica-nano").with_overrides(["train.batch_size=1000", "train.steps=3"])
    steps = plan_ladder(base, data_dir, ["96x2", "192x4", "384x6", "768x12"], "1536x16", tokens_per_parameter=20)
    low, high = steps.rungs[0], steps.held_out
    growth = high.flop / low.flop
    for key, exponent in (("lr", -0.1250), ("muon_lr", -0.1250), ("batch_size", 0.3271)):
        grown = getattr(high.cfg.train, key) / getattr(low.cfg.train, key)
        assert math.log(grown) / math.log(growth) == pytest.approx(exponent, abs=2e-3), key
    for rung in (*steps.rungs, high):
        t = rung.cfg.train
        assert rung.tokens == t.steps * t.batch_size * t.seq_len
        assert rung.tokens / rung.active == pytest.approx(20, rel=0.02)
        # 6 N D, and the attention scores on top.
        assert 1 < rung.flop / (6 * rung.active * rung.tokens) < 1.25
        assert t.warmup / t.steps == pytest.approx(10 / 3, rel=0.01) or t.warmup == t.steps


def test_the_rule_agrees_with_what_was_tuned_by_hand(data_dir):
    """From replica-nano to 300 steps of replica-small, both tuned before there was a rule: within a quarter."""
    nano, small = load_config("replica-nano"), load_config("replica-small")
    t = small.train
    ratio = 300 * t.batch_size * t.seq_len / moe.plan.params(small).active["output"]
    steps = plan_ladder(nano, data_dir, ["96x2", "96x4", "192x2", "192x4"], "384x6", tokens_per_parameter=ratio)
    for key in ("lr", "muon_lr", "batch_size"):
        assert getattr(steps.held_out.cfg.train, key) == pytest.approx(getattr(t, key), rel=0.25), key


@pytest.mark.parametrize(("micro_batch", "wanted"), [(16, 23.2), (16, 16.0), (4, 13.0), (8, 3.4), (16, 97.0), (1, 0.2)])
def test_passes_are_equal_and_within_the_micro_batch(micro_batch, wanted):
    batch, each = rungs._batch(wanted, micro_batch)
    assert batch % each == 0
    assert each <= micro_batch
    assert abs(batch - wanted) <= max(1, wanted / each / 2 + 1)
    assert rungs._batch(wanted, 0) == (max(1, round(wanted)), 0)


def test_evaluations_and_saves_are_few(small):
    for rung in (*small.rungs, small.held_out):
        t = rung.cfg.train
        assert t.steps / t.eval_every <= 4
        assert t.steps / t.save_every <= 4


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"rungs": ["96x1", "96x2", "96x3"]}, ConfigError, "rungs = 96x1 96x2 96x3: .* 4 or more"),
        ({"rungs": ["96x1", "96x2", "96x3", "96"]}, ConfigError, "'96': must be WIDTHxLAYERS, such as 192x4"),
        ({"rungs": ["96x1", "96x2", "96x3", "96x0"]}, ConfigError, "'96x0': must be WIDTHxLAYERS"),
        ({"rungs": ["96x1", "96x2", "96x3", "100x1"]}, ConfigError, "d_model = 100: .*nearest is 96"),
        ({"rungs": ["96x1", "96x2", "96x3", "96x01"]}, ConfigError, "96x1 is given twice"),
        ({"held_out": "96x3"}, ConfigError, "96x3 is given twice"),
        (
            {"rungs": ["96x1", "96x2", "192x1", "192x2"], "held_out": "96x3"},
            ConfigError,
            "held_out = 96x3: .* and 192x2 .*larger than every rung",
        ),
        ({"tokens_per_parameter": 0.0}, ConfigError, "tokens_per_parameter = 0.0: must be greater than 0"),
        ({"tokens_per_parameter": math.nan}, ConfigError, "tokens_per_parameter = nan"),
        (
            {"set": ["train.batch_ramp=0:64 1k:128"]},
            ConfigError,
            "batch_ramp = '0:64 1k:128': .*unset it",
        ),
        ({"set": ["vocab_size=200"]}, DataError, "vocab"),
        ({"data_dir": "nowhere"}, DataError, "nowhere"),
    ],
)
def test_what_cannot_be_planned_is_an_error(cfg, data_dir, change, error, complaint):
    change = dict(change)
    base = cfg.with_overrides(change.pop("set", []))
    given = {"rungs": RUNGS, "held_out": HELD_OUT, "tokens_per_parameter": RATIO, "data_dir": data_dir, **change}
    with pytest.raises(error, match=complaint):
        plan_ladder(base, given["data_dir"], given["rungs"], given["held_out"],
                    tokens_per_parameter=given["tokens_per_parameter"])  # fmt: skip


def test_a_length_in_tokens_or_epochs_is_the_same_base(cfg, data_dir):
    """8 steps of 4 x 16 tokens are 512 tokens; an epoch is what the data have."""
    in_steps, in_tokens, in_epochs = (
        plan_ladder(
            cfg.with_overrides([f"train.tokens={tokens}"]), data_dir, RUNGS, HELD_OUT, tokens_per_parameter=RATIO
        )
        for tokens in ('""', "512", "epochs")
    )
    assert in_steps == dataclasses.replace(in_tokens, base=in_steps.base)
    data = TokenData.open(data_dir)
    n_tokens = sum(data.n_tokens(source, "train") for source in data.sources)
    assert in_epochs.base_flop / in_steps.base_flop == pytest.approx(n_tokens / 512, rel=0.01)


def test_many_passes_of_the_data_are_noticed(cfg, data_dir):
    long = plan_ladder(cfg, data_dir, RUNGS, HELD_OUT, tokens_per_parameter=1.0)
    assert any("passes of the data (" in notice and HELD_OUT in notice for notice in long.notices)
    assert plan_ladder(cfg, data_dir, RUNGS, HELD_OUT, tokens_per_parameter=RATIO).notices == []


# ------------------------------------------------------------------------------------------------------------ climb


def test_the_prediction_is_on_disk_before_the_held_out_replica_is_begun(climbed_once):
    climbed, place, at_prediction = climbed_once
    before = at_prediction["record"]["held_out"]
    assert at_prediction["runs"] == sorted(RUNGS)
    assert (before["loss"], before["relative_error"]) == (None, None)
    after = json.loads((place / LADDER_FILE).read_text())
    assert after["held_out"]["predicted_loss"] == before["predicted_loss"] == climbed.prediction.loss
    assert after["rungs"] == at_prediction["record"]["rungs"]
    assert before["predicted_low"] <= before["predicted_loss"] <= before["predicted_high"]
    loss = after["held_out"]["loss"]
    assert after["held_out"]["relative_error"] == pytest.approx((before["predicted_loss"] - loss) / loss)
    # Bits per byte are nats per token times what is the same for all replicas.
    assert before["predicted_bits_per_byte"] / after["held_out"]["bits_per_byte"] - 1 == pytest.approx(climbed.error)


def test_the_loss_is_that_of_the_model_on_all_held_out_tokens(climbed_once, data_dir):
    _, place, _ = climbed_once
    row = json.loads((place / LADDER_FILE).read_text())["rungs"][0]
    model, data = moe.load(place / row["name"] / "final"), TokenData.open(data_dir)
    nats, count = 0.0, 0
    with torch.no_grad():
        for _, inputs, targets, scored, *_ in evaluate.all_windows(data, 16):
            logits = model(torch.from_numpy(inputs)[None]).logits_BSV[0].double()
            chosen = torch.from_numpy(targets)[scored]
            nats -= logits.log_softmax(-1)[scored].gather(1, chosen[:, None]).sum().item()
            count += len(chosen)
    n_bytes = sum(data.n_bytes(source, "val") for source in data.sources)
    assert count == sum(data.n_tokens(source, "val") for source in data.sources)
    assert row["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_a_second_time_trains_nothing_and_changes_nothing(climbed_once, monkeypatch):
    climbed, place, _ = climbed_once
    before = (place / LADDER_FILE).read_bytes()
    monkeypatch.setattr(rungs, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = climb(climbed.ladder, place)
    assert again == climbed
    assert (place / LADDER_FILE).read_bytes() == before


def test_interrupted_again_and_again_it_is_the_same_ladder(climbed_once, tmp_path):
    """In the middle of the second rung, when the third is done, and in the held-out replica."""
    whole, place, _ = climbed_once
    steps, out = whole.ladder, tmp_path / "out"

    def stop_in(name, at_end):
        class Interrupting(rungs.console.Lines):
            def note(self, text):
                self.running = getattr(self, "running", False) or f"-{name}: " in text  # a run introduces itself

            def step(self, step):
                if self.running and not at_end and step == 2:
                    signal.raise_signal(signal.SIGTERM)

            def finish(self, summary, run_dir):
                if self.running and at_end:
                    signal.raise_signal(signal.SIGTERM)

        return Interrupting

    for name, at_end, measured in (("96x2", False, 1), ("96x3", True, 3), ("192x2", False, 4)):
        stopped = climb(steps, out, reporter=stop_in(name, at_end))
        assert stopped.signal == signal.SIGTERM
        assert len(stopped.measured) == measured
        assert (stopped.prediction is not None) == (out / LADDER_FILE).exists() == (name == HELD_OUT)
    assert climb(steps, out).signal == 0
    assert (out / LADDER_FILE).read_bytes() == (place / LADDER_FILE).read_bytes()


def test_another_configuration_is_an_error_before_anything_is_trained(climbed_once, monkeypatch):
    climbed, place, _ = climbed_once
    monkeypatch.setattr(rungs, "train", lambda *args, **kwargs: pytest.fail("trained"))
    base = climbed.ladder.base.with_overrides(["train.lr=1e-3"])
    other = plan_ladder(base, climbed.ladder.data_dir, RUNGS, HELD_OUT, tokens_per_parameter=RATIO)
    with pytest.raises(ConfigError, match=r"96x1 holds a run with another configuration: train.lr .*another `out`"):
        climb(other, place)


def test_other_data_is_an_error(climbed_once, tmp_path):
    climbed, place, _ = climbed_once
    for i in range(80):
        (tmp_path / f"{i}.txt").write_text(f"other words {i} " * 20, encoding="utf-8")
    prepare([tmp_path], tmp_path / "prepared", vocab_size=300)
    other = plan_ladder(climbed.ladder.base, tmp_path / "prepared", RUNGS, HELD_OUT, tokens_per_parameter=RATIO)
    assert [rung.cfg for rung in other.rungs] == [rung.cfg for rung in climbed.ladder.rungs]
    with pytest.raises(DataError, match="96x1 was trained on other data"):
        climb(other, place)


def test_a_prediction_is_not_changed_once_its_loss_is_known(climbed_once, tmp_path):
    climbed, place, _ = climbed_once
    record = json.loads((place / LADDER_FILE).read_text())
    record["held_out"]["predicted_loss"] *= 1.01
    kept = place / LADDER_FILE
    before = kept.read_bytes()
    try:
        kept.write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=r"made before its loss was measured.*`held_out`"):
            climb(climbed.ladder, place)
        record["held_out"]["loss"] = None  # not measured yet: rungs may still be added
        kept.write_text(json.dumps(record))
        assert climb(climbed.ladder, place) == climbed
        record["held_out"]["name"] = "384x4"
        kept.write_text(json.dumps(record))
        with pytest.raises(ConfigError, match="has the prediction for 384x4, and this is one for 192x2: move it away"):
            climb(climbed.ladder, place)
        assert json.loads(kept.read_text()) == record
        kept.write_text("{}")
        with pytest.raises(ConfigError, match="is not of a ladder, or damaged"):
            climb(climbed.ladder, place)
    finally:
        kept.write_bytes(before)


def test_two_at_once_and_runs_that_began_otherwise_are_errors(climbed_once, small, tmp_path, monkeypatch):
    with locked(tmp_path / "out"), pytest.raises(InUseError, match="out is in use by process"):
        climb(small, tmp_path / "out")
    climbed, place, _ = climbed_once
    monkeypatch.setattr(rungs, "train", lambda *args, **kwargs: pytest.fail("trained"))
    kept = place / "96x1" / "summary.json"
    before = kept.read_text()
    try:
        kept.write_text(json.dumps({**json.loads(before), "from": {"path": "elsewhere", "sha256": "0"}}))
        with pytest.raises(ConfigError, match=r"96x1 holds a run begun with the weights of elsewhere"):
            climb(climbed.ladder, place)
    finally:
        kept.write_text(before)


def test_a_replica_that_does_not_fit_is_refused_before_any_is_trained(small, tmp_path, monkeypatch):
    monkeypatch.setattr(rungs, "train", lambda *args, **kwargs: pytest.fail("trained"))
    needs = [forecast(rung.cfg, small.data_dir).memory for rung in (small.rungs[0], small.held_out)]
    assert needs[0] < needs[1]
    monkeypatch.setattr("moe.device.memory_available", lambda device: 2**20)
    with pytest.raises(TrainError, match="does not fit: a step needs"):
        climb(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_places_that_hold_something_else_are_errors(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file: choose another `out`"):
        climb(small, tmp_path / "file")
    (tmp_path / "out" / "96x1").mkdir(parents=True)
    (tmp_path / "out" / "96x1" / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match="is not a run"):
        climb(small, tmp_path / "out")
    assert (tmp_path / "out" / "96x1" / "thesis.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------- picture, command


def test_the_picture_with_and_without_the_outcome(climbed_once, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    climbed, _, _ = climbed_once
    before = draw(dataclasses.replace(climbed, held_out=None), tmp_path / "before")
    after = draw(climbed, tmp_path / "after")
    assert before is not None
    assert after is not None
    assert before.read_bytes() != after.read_bytes()
    assert min(before.stat().st_size, after.stat().st_size) > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw(climbed, tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def arguments(cfg_file, data_dir, out):
    shape = ["--rungs", *RUNGS, "--held-out", HELD_OUT, "--tokens-per-parameter", RATIO]
    return ["ladder", cfg_file, "--data", data_dir, "--out", out, *shape]


def test_a_dry_run_says_what_it_would_take_and_starts_nothing(cfg_file, data_dir, tmp_path, capsys):
    assert run_cli(*arguments(cfg_file, data_dir, tmp_path / "out"), "--dry-run", "--set", "train.optimizer=muon") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*RUNGS, HELD_OUT, "muon lr", "GiB", "in all"))
    assert not (tmp_path / "out").exists()


def test_the_command_says_prediction_and_error(climbed_once, data_dir, tmp_path, capsys, monkeypatch):
    climbed, place, _ = climbed_once
    config = tmp_path / "replica-tiny.toml"
    config.write_text(climbed.ladder.base.to_toml(), encoding="utf-8")
    assert run_cli(*arguments(config, data_dir, place)) == 0
    output = capsys.readouterr().out
    for figure in (climbed.prediction.loss, climbed.held_out.loss, *(m.loss for m in climbed.measured)):
        assert f"{figure:.4f}" in output
    assert f"{climbed.error:+.2%}" in output
    assert output.index("predicted from the rungs alone") < output.index("measured")
    assert (place / "ladder.png").is_file()
    (place / "ladder.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_cli(*arguments(config, data_dir, place)) == 0
    assert 'pip install "gpt4-moe[plot]"' in capsys.readouterr().out


def test_the_command_ends_with_the_signals_status(cfg_file, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moe.train.console.Lines.step", lambda self, n: n == 2 and signal.raise_signal(signal.SIGTERM))
    assert run_cli(*arguments(cfg_file, data_dir, tmp_path / "out")) == 128 + signal.SIGTERM
    assert "stopped with 0 of 5 replicas trained; the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize("rungs", [["96x1", "96x2"], ["96x1", "96x2", "96x3", "nonsense"]])
def test_bad_arguments_end_with_one_line_and_status_2(cfg_file, data_dir, tmp_path, capsys, rungs):
    command = [
        "ladder",
        cfg_file,
        "--data",
        data_dir,
        "--out",
        tmp_path / "o",
        "--rungs",
        *rungs,
        "--held-out",
        "192x2",
    ]
    assert run_cli(*command) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "o").exists()
