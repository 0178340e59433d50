"""The training loop in one process: what it writes, micro-batches, balancing, bad runs, full disks, other settings."""

import json
import math
import resource

import pytest
import torch

import moe
from moe import evaluate
from moe.config import RouterConfig, TrainConfig
from moe.data import Mixture, TokenData, prepare
from moe.errors import CheckpointError, ConfigError, DataError, TrainError
from moe.evaluate import some_windows
from moe.plan.calibrate import read_steps
from moe.profile import Trace
from moe.profile.subject import log_probabilities, open_subject
from moe.train import loop, state, train
from moe.train.metrics import read_metrics
from moe.train.schedule import Schedule
from moe.train.watch import Watch
from tests.conftest import rel, run_cli


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes longer than these runs; the first test keeps it."""
    if "promises" not in request.node.name and "extras" not in request.node.name:
        monkeypatch.setattr(loop.pictures, "draw", lambda run_dir: [])


def records(run_dir, kind):
    return [r for r in read_metrics(run_dir) if r["kind"] == kind]


def test_a_run_learns_and_leaves_all_it_promises(cfg, data_dir, tmp_path, capsys):
    run = tmp_path / "run"
    cfg = cfg.with_overrides(["train.steps=40", "train.save_every=16", "train.sample_every=20"])
    result = train(cfg, data_dir, run)
    assert (result.status, result.step) == ("complete", 40)
    rows = records(run, "train")
    assert [r["step"] for r in rows] == list(range(1, 41))
    assert rows[-1]["lm"] < rows[0]["lm"] - 0.5
    assert rows[-1]["tokens"] == 40 * 4 * 16
    for r in rows:
        assert r["loss"] == pytest.approx(r["lm"] + 0.01 * r["balance"] + 0.001 * r["z"], rel=1e-5)
        assert [sum(layer) for layer in r["load"]] == pytest.approx([1.0])
        assert r["load_max_over_mean"] == pytest.approx(max(r["load"][0]) * 4)
        assert r["load_entropy"] == pytest.approx(-sum(p * math.log(p, 4) for p in r["load"][0] if p))
    assert [r["step"] for r in records(run, "eval")] == [*range(4, 41, 4)]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000032", "step-000040"]
    assert moe.load(run / "final").cfg == cfg
    assert moe.load_tokenizer(run / "final").vocab_size == 300
    summary = json.loads((run / "summary.json").read_text())
    assert summary == result.summary
    assert summary["bits_per_byte"]["total"] < 4
    assert set(summary["compression"]) == {"gzip", "xz"}
    (step,) = read_steps(run / "plan.csv")  # what `moe plan calibrate` reads
    assert step.seconds == pytest.approx(summary["train_seconds"] / summary["step"])
    assert summary["plan"]["step_seconds"] > summary["plan"]["step_seconds_at_peak"] > 0
    assert (run / "samples.txt").read_text().count("--- step") == 9  # at 20, at 40 and at the end
    out = capsys.readouterr().out
    assert "step 40/40" in out
    assert "predicted and measured" in out
    assert "\x1b" not in out
    pytest.importorskip("matplotlib")
    for name in ("loss", "experts", "speed"):
        assert (run / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_complete_run_is_not_done_again(cfg, data_dir, tmp_path):
    first = train(cfg, data_dir, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(cfg, data_dir, tmp_path / "run")
    assert again.summary == first.summary
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_fresh_moves_the_older_run_aside(cfg, data_dir, tmp_path):
    train(cfg, data_dir, tmp_path / "run")
    cfg = cfg.with_overrides(["train.steps=2"])
    assert train(cfg, data_dir, tmp_path / "run", resume="never").step == 2
    assert (tmp_path / "run-old-1" / "summary.json").is_file()


@pytest.mark.parametrize("change", ["micro_batch=2", "micro_batch=1"])
def test_how_a_batch_is_computed_changes_only_rounding(cfg, data_dir, tmp_path, change):
    train(cfg, data_dir, tmp_path / "one")
    train(cfg.with_overrides([f"train.{change}"]), data_dir, tmp_path / "other")
    for one, other in zip(records(tmp_path / "one", "train"), records(tmp_path / "other", "train"), strict=True):
        for key in ("loss", "lm", "balance", "z", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-4)
        assert one["load"][0] == pytest.approx(other["load"][0], abs=0.02)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_nothing_that_is_logged(cfg, data_dir, tmp_path, mode):
    """Not the loss, and not the loads that move the biases: what a backward computes again is counted once."""
    cfg = cfg.with_overrides(["router.bias_update_rate=0.01", "train.steps=4", "train.micro_batch=2"])
    train(cfg, data_dir, tmp_path / "plain")
    other = cfg.with_overrides([f"train.activation_checkpointing={mode}"])
    train(other, data_dir, tmp_path / "checkpointed")
    for one, two in zip(*(records(tmp_path / run, "train") for run in ("plain", "checkpointed")), strict=True):
        for key in ("loss", "lm", "balance", "z", "grad_norm", "load"):
            assert one[key] == two[key], key
    state.check_same_config(cfg.to_toml(), other, tmp_path)  # so a run may go on with another mode


def test_log_points_are_means_over_their_steps(cfg, data_dir, tmp_path):
    train(cfg, data_dir, tmp_path / "each")
    train(cfg.with_overrides(["train.log_every=4"]), data_dir, tmp_path / "fourth")
    each, fourth = records(tmp_path / "each", "train"), records(tmp_path / "fourth", "train")
    assert [r["step"] for r in fourth] == [4, 8]
    for i, r in enumerate(fourth):
        assert r["lm"] == pytest.approx(sum(e["lm"] for e in each[4 * i : 4 * i + 4]) / 4)


def test_bias_balancing_moves_the_bias_and_is_saved(cfg, data_dir, tmp_path):
    cfg = cfg.with_overrides(["router.bias_update_rate=0.01", "router.balance_loss=0.0"])
    train(cfg, data_dir, tmp_path / "run")
    bias = moe.load(tmp_path / "run" / "final").get_buffer("blocks.0.moe.router.bias_E")
    assert bias.abs().max() >= 0.01


def test_a_loss_that_is_not_finite_stops_with_advice_and_keeps_the_last_good_checkpoint(
    cfg, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(Schedule, "lr_scale", lambda self, done: math.nan if done == 6 * 4 else 0.5)
    cfg = cfg.with_overrides(["train.save_every=2", "train.log_every=5"])
    with pytest.raises(TrainError, match=r"not finite|nan.*train.lr \(now 0.003\).*train.warmup"):
        train(cfg, data_dir, tmp_path / "run")
    good = state.latest(tmp_path / "run")
    assert good is not None
    assert good.name == "step-000006"  # made before the bad update was seen
    (older,) = [p for p in good.parent.iterdir() if p != good]
    assert all(p.isfinite().all() for p in moe.load(older).parameters())


def test_watch_tells_an_explosion_from_noise():
    watch = Watch(TrainConfig(warmup=10), RouterConfig())
    for step in range(1, 200):
        watch.check(step, 3.0 + (1.5 if step % 7 == 0 else 0.0))  # spikes come and go
    watch.check(200, 6.5)
    watch.check(201, 6.5)
    with pytest.raises(TrainError, match=r"exploded: 6.50 nats per token at step 202.*train.lr"):
        watch.check(202, 6.5)


def test_watch_is_patient_during_warm_up():
    watch = Watch(TrainConfig(warmup=10), RouterConfig())
    for step in range(1, 11):
        watch.check(step, 2.0 if step == 1 else 9.0)


def test_watch_tells_a_collapse_of_routing_from_a_bad_moment():
    even, collapsed = [0.125] * 8, [0.45, 0.45, 0.01, 0.01] + [0.02] * 4
    watch = Watch(TrainConfig(warmup=10), RouterConfig(balance_loss=0.02))
    assert not any(watch.check_load(step, [even, collapsed]) for step in range(1, 11)), "during the warm-up"
    assert not any(watch.check_load(step, [even, collapsed if step % 3 else even]) for step in range(11, 50))
    assert watch.check_load(50, [even, even]) == []
    assert watch.check_load(51, [even, collapsed]) == []
    later = Watch(TrainConfig(warmup=10), RouterConfig(balance_loss=0.02))
    later.load_state_dict(watch.state_dict())  # a resumed run goes on counting
    assert later.check_load(52, [even, collapsed]) == []
    (alarm,) = later.check_load(53, [even, collapsed])
    assert alarm.startswith("routing collapse in layer 1 at step 53: 2 of 8 experts")
    assert "router.balance_loss (now 0.02)" in alarm
    assert later.check_load(54, [even, collapsed]) == [], "said once"


@pytest.mark.parametrize(
    ("n_experts", "idle", "collapsed"),
    [(128, 32, True), (128, 31, False), (16, 4, True), (16, 3, False), (5, 2, True), (5, 1, False), (2, 1, True)],
)
def test_a_quarter_of_the_experts_idle_is_a_collapse(n_experts, idle, collapsed):
    """At the edge of what the class's docstring says: a quarter or more, with less than a tenth of the mean load."""

    def alarms(share_of_mean):
        low = share_of_mean / n_experts
        load = [low] * idle + [(1 - low * idle) / (n_experts - idle)] * (n_experts - idle)
        watch = Watch(TrainConfig(warmup=10), RouterConfig())
        return [watch.check_load(step, [load]) for step in range(11, 15)]

    said = alarms(0.0999)
    assert [len(lines) for lines in said] == [0, 0, int(collapsed), 0]
    assert not collapsed or f"step 13: {idle} of {n_experts} experts have less than 0.1 of the mean" in said[2][0]
    assert not any(alarms(0.1001))


@pytest.mark.parametrize(("high", "explodes"), [(1.5 * 2.0 + 1.0 + 1e-6, True), (1.5 * 2.0 + 1.0 - 1e-6, False)])
def test_an_explosion_is_three_log_points_above_the_limit_after_the_warm_up(high, explodes):
    """1.5 times the lowest running average, here a steady 2 nats, plus 1 nat; step 10 is the last of the warm-up."""
    watch = Watch(TrainConfig(warmup=10), RouterConfig())
    for step in range(1, 10):
        watch.check(step, 2.0)
    for step in (10, 11, 12):
        watch.check(step, high)
    if explodes:
        with pytest.raises(TrainError, match=r"down to 2\.00"):
            watch.check(13, high)
    else:
        watch.check(13, high)


def test_the_watchs_running_average_forgets_a_fifth_at_each_log_point():
    watch = Watch(TrainConfig(), RouterConfig())
    for step, lm in enumerate((10.0, 5.0, 6.0), start=1):
        watch.check(step, lm)
    assert watch.average == pytest.approx(0.8 * (0.8 * 10 + 0.2 * 5) + 0.2 * 6)
    assert watch.lowest == pytest.approx(watch.average)
    for lm in (20.0, 1.0):
        watch.check(4, lm)
    assert watch.lowest == pytest.approx(8.4)


def test_a_collapse_raises_an_alarm_and_the_run_goes_on(cfg, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Watch, "IDLE", 1.2)  # in a layer of four, one is always below 1.2 times the mean
    assert train(cfg, data_dir, tmp_path / "run").status == "complete"
    (alarm,) = records(tmp_path / "run", "alarm")
    assert alarm["step"] == cfg.train.warmup + 3
    assert alarm["text"].startswith("routing collapse in layer 0")
    assert alarm["text"] in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_while_saving_leaves_the_older_checkpoint_and_nothing_half_written(
    cfg, data_dir, tmp_path, monkeypatch
):
    save = state.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(run_dir, step, *rest):
        if step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        return save(run_dir, step, *rest)

    monkeypatch.setattr(state, "save", save_on_a_full_disk)
    try:
        with pytest.raises(CheckpointError, match=r"step-000008.*space"):
            train(cfg, data_dir, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    moe.load(tmp_path / "run" / "checkpoints" / "step-000004")
    monkeypatch.setattr(state, "save", save)
    assert train(cfg, data_dir, tmp_path / "run").status == "complete"  # there is space again


def stopped_run(cfg, data_dir, run_dir, monkeypatch):
    """A run that ends after its first checkpoint, as if it had been killed."""

    class Killed(Exception):
        pass

    def saved(self, step, place):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("moe.train.console.Lines.saved", saved)
        with pytest.raises(Killed):
            train(cfg, data_dir, run_dir)


def test_another_configuration_or_other_data_cannot_resume(cfg, data_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_run(cfg, data_dir, run, monkeypatch)
    with pytest.raises(ConfigError, match=r"configuration: train.lr \(was 0.003, now 0.1\)\. "):
        train(cfg.with_overrides(["train.lr=0.1", "train.steps=9"]), data_dir, run)
    (tmp_path / "more").mkdir()
    for i in range(80):
        (tmp_path / "more" / f"{i}.txt").write_text(f"other text, number {i}, " * 20)
    other = prepare([tmp_path / "more"], tmp_path / "other", tokenizer=data_dir / "tokenizer.json").path
    with pytest.raises(DataError, match="another stream"):
        train(cfg, other, run)
    harmless = cfg.with_overrides(["train.eval_every=3", "train.log_every=2"])
    assert train(harmless, data_dir, run).status == "complete"


def test_a_damaged_checkpoint_says_how_to_go_on(cfg, data_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_run(cfg, data_dir, run, monkeypatch)
    file = run / "checkpoints" / "step-000004" / "training.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"delete .*step-000004"):
        train(cfg, data_dir, run)


@pytest.mark.parametrize(("version", "age"), [(None, "an older"), (1, "an older"), (99, "a newer")])
def test_a_checkpoint_of_another_version_says_how_to_go_on(cfg, data_dir, tmp_path, monkeypatch, version, age):
    run = tmp_path / "run"
    stopped_run(cfg, data_dir, run, monkeypatch)
    file = run / "checkpoints" / "step-000004" / "training.pt"
    training = torch.load(file, weights_only=True)
    training.pop("version") if version is None else training.update(version=version)
    torch.save(training, file)
    with pytest.raises(CheckpointError, match=f"of {age} gpt4-moe, .* \\(`start_from=.*step-000004`\\)"):
        train(cfg, data_dir, run)


def test_a_directory_with_other_things_is_left_alone(cfg, data_dir, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(TrainError, match="not a run"):
        train(cfg, data_dir, tmp_path, resume="never")
    assert (tmp_path / "thesis.txt").is_file()


def test_without_the_extras_training_goes_on_with_a_hint(cfg, data_dir, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "torch.utils.tensorboard"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert train(cfg, data_dir, tmp_path / "run").status == "complete"
    out = capsys.readouterr().out
    assert 'pip install "gpt4-moe[train]"' in out
    assert 'pip install "gpt4-moe[plot]"' in out


def test_bfloat16_products_keep_float32_weights(cfg, data_dir, tmp_path):
    train(cfg.with_overrides(["train.dtype=bf16", "train.steps=2"]), data_dir, tmp_path / "run")
    assert {p.dtype for p in moe.load(tmp_path / "run" / "final").parameters()} == {torch.float32}


def test_once_through_the_epochs_ends_with_what_is_left(cfg, data_dir, tmp_path):
    recipe = ["train.tokens=epochs", "train.epochs.prose=0", "train.batch_ramp=0:64 1280:208", "train.log_every=1"]
    cfg = cfg.with_overrides([*recipe, "train.eval_every=0"])
    result = train(cfg, data_dir, tmp_path / "run")
    tokens = len(TokenData.open(data_dir).tokens("verse", "train"))
    windows = -(-tokens // 16)
    lines = records(tmp_path / "run", "train")
    sizes = [-(-r["batch_tokens"] // 16) for r in lines]  # the last window of a source is not full
    assert sizes[:20] == [4] * 20
    assert set(sizes[20:-1]) == {13}
    assert 0 < sizes[-1] <= 13
    assert sum(sizes) == windows == result.summary["windows"]
    assert result.summary["tokens"] == tokens
    assert result.step == len(lines)
    # 4 experts, 2 of them for each token.
    assert [r["tokens_per_expert"] for r in lines] == [r["batch_tokens"] / 2 for r in lines]


def test_micro_batches_of_unequal_windows_give_the_gradient_of_the_whole_batch(cfg, data_dir, tmp_path):
    """The last window of a source has fewer targets, and the last micro-batch fewer windows."""
    cfg = cfg.with_overrides(["train.batch_size=5", "train.tokens=epochs", "train.seq_len=31", "train.log_every=1"])
    cfg = cfg.with_overrides(["train.document_mask=true", "train.eval_every=0"])
    runs = {}
    for name, settings in (("whole", []), ("parts", ["train.micro_batch=1"])):
        train(cfg.with_overrides(settings), data_dir, tmp_path / name)
        runs[name] = records(tmp_path / name, "train")
    for key in ("loss", "lm", "balance", "z", "grad_norm"):
        assert [r[key] for r in runs["parts"]] == pytest.approx([r[key] for r in runs["whole"]], rel=1e-4)
    assert len({r["grad_norm"] for r in runs["whole"]}) > 10


def test_what_attention_was_kept_inside_holds_outside_of_training_too(cfg, data_dir, tmp_path, capsys):
    """`moe eval`, `moe profile` and `moe profile compare` of a run with a document mask do what the run did."""
    cfg = cfg.with_overrides(["train.document_mask=true", "train.steps=10", "train.lr=0.02", "train.dtype=fp32"])
    train(cfg, data_dir, tmp_path / "run")
    final, out = tmp_path / "run" / "final", tmp_path / "eval.json"
    assert run_cli("eval", final, "--data", data_dir, "--out", out) == 0
    found = json.loads(out.read_text())["data"]["scores"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for source, bits in summary["bits_per_byte"].items():
        assert found[source]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)

    model, data = moe.load(final), TokenData.open(data_dir)
    windows = list(some_windows(data, 16, 400))
    crossed, counts = 0, torch.zeros(1, dtype=torch.int64)
    for window in windows:
        documents = torch.from_numpy((window.inputs == data.eot_id).cumsum())[None]
        tokens = torch.from_numpy(window.inputs)[None]
        crossed += not torch.equal(model(tokens).logits_BSV, model(tokens, documents_BS=documents).logits_BSV)
        counts = counts + torch.stack([r.counts_E for r in model(tokens, documents_BS=documents).routing])
    assert crossed > 3
    arguments = ["--data", data_dir, "--tokens", 400, "--seq-len", 16]
    assert (
        run_cli("profile", "routing", final, *arguments, "--out", tmp_path / "p.json", "--trace", tmp_path / "t") == 0
    )
    assert Trace.open(tmp_path / "t").counts_PLE().sum(0).tolist() == counts.tolist()
    subject = open_subject(final)
    log_p = log_probabilities(subject, windows, 3)
    scores = evaluate.evaluate(model, windows, evaluate.byte_lengths(data.tokenizer()), batch=4)
    for source, score in scores.items():
        assert -log_p[source].sum().item() / math.log(2) == pytest.approx(score.bits, rel=1e-5)


def test_the_padding_behind_the_last_window_of_a_source_counts_nowhere(cfg, data_dir):
    stream = Mixture(TokenData.open(data_dir), 16, 0)
    batch = stream.batch(0, stream.windows_per_epoch)
    n = sum(len(stream.data.tokens(source, "train")) for source in stream.data.sources)
    assert batch.text is not None
    assert batch.text.sum() == n
    assert (batch.targets[~batch.text] == -100).all()
    assert (batch.targets[batch.text] != -100).all()


def test_a_stage_begins_with_the_weights_of_another(cfg, data_dir, tmp_path):
    train(cfg.with_overrides(["train.steps=40", "train.lr=0.01"]), data_dir, tmp_path / "first")
    first = tmp_path / "first" / "final"
    rope = ["scaling=yarn", "factor=2.0", "original_max_seq_len=32"]
    longer = ["max_seq_len=64", "train.seq_len=64", "train.batch_size=1", *(f"attention.rope.{r}" for r in rope)]
    stage = cfg.with_overrides([*longer, "train.lr=1e-9", "train.steps=1"])
    train(stage, data_dir, tmp_path / "second", start_from=first)
    before, after = moe.load(first).state_dict(), moe.load(tmp_path / "second" / "final").state_dict()
    assert all(rel(after[name], before[name]) < 1e-7 for name in before)
    assert records(tmp_path / "second", "train")[0]["lm"] < 0.7 * records(tmp_path / "first", "train")[0]["lm"]

    with pytest.raises(ConfigError, match=r"another shape: d_model \(was 64, now 128\)"):
        train(cfg.with_overrides(["d_model=128"]), data_dir, tmp_path / "third", start_from=first)
    assert not (tmp_path / "third").exists()
    other = tmp_path / "text"
    other.mkdir()
    for i in range(60):
        (other / f"{i}.txt").write_text(f"0123456789 {i} " * 30)
    prepare([other], tmp_path / "other-data", vocab_size=280)
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(cfg, tmp_path / "other-data", tmp_path / "third", start_from=first)
