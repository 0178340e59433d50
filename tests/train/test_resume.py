"""Killed and resumed, a run gives what it would have given anyway, to the last digit. In processes of their own."""

import json
import signal
import time

import pytest

import moe
from moe.data import prepare_conversations
from moe.evaluate import some_windows
from moe.train import train
from tests.conftest import start_cli


def start(cfg_file, data_dir, run_dir, *settings):
    arguments = ["train", cfg_file, "--data", data_dir, "--out", run_dir]
    return start_cli(*arguments, *(["--set", *settings] if settings else []))


def metrics(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")} for row in rows]


def wait_for_step(process, run_dir, step):
    """Returns once metrics.jsonl has `step`."""
    for _ in range(6000):
        file = run_dir / "metrics.jsonl"
        if file.is_file() and f'"step": {step},' in file.read_text():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached")


def test_killed_anywhere_and_resumed_gives_the_same_to_the_last_digit(cfg_file, data_dir, tmp_path, any_moment):
    # log_every and save_every do not divide each other: sums between log points must survive, too. Under "muon" both
    # Muon and AdamW are at work.
    settings = ["train.steps=42", "train.log_every=3", "train.save_every=10", "train.eval_every=20"]
    settings += ["train.optimizer=muon", "router.bias_update_rate=0.001"]
    whole = start(cfg_file, data_dir, tmp_path / "whole", *settings)
    killed = start(cfg_file, data_dir, tmp_path / "killed", *settings)
    wait_for_step(killed, tmp_path / "killed", 3 * any_moment.randint(4, 13))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert whole.wait(timeout=120) == 0, whole.communicate()[0]
    whole.communicate()
    resumed = start(cfg_file, data_dir, tmp_path / "killed", *settings)
    output = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, output
    assert "resumed from" in output or "is complete" in output
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    one, other = (moe.load(tmp_path / name / "final").state_dict() for name in ("whole", "killed"))
    assert all(one[name].equal(other[name]) for name in one)
    assert not list((tmp_path / "killed").rglob("*.tmp"))


EVERY = ["train.log_every=1", "train.save_every=7", "train.eval_every=20"]
PRETRAIN = ["train.tokens=epochs", "train.epochs.prose=2", "train.epochs.verse=4", "train.document_mask=true"]
PRETRAIN += ["train.batch_ramp=0:128 8k:256 24k:512", "train.optimizer=muon", "router.bias_update_rate=0.001"]
EXTEND = ["max_seq_len=64", "train.seq_len=64", "attention.rope.scaling=yarn", "attention.rope.factor=2.0"]
EXTEND += ["attention.rope.original_max_seq_len=32", "train.steps=60", "train.lr=1e-3", "router.bias_update_rate=0.001"]
FINETUNE = ["train.steps=60", "train.seq_len=64", "train.batch_size=2"]


def recipe(root, cfg_file, data_dir, conversations):
    """(directory, command) of each stage."""
    yield root / "256", ["train", cfg_file, "--data", data_dir, "--out", root / "256", "--set", *EVERY, *PRETRAIN]
    extend = ["train", cfg_file, "--from", root / "256" / "final", "--data", data_dir, "--out", root / "1k"]
    yield root / "1k", [*extend, "--set", *EVERY, *EXTEND]
    chat = ["finetune", root / "1k" / "final", "--data", conversations, "--out", root / "chat"]
    yield root / "chat", [*chat, "--set", *EVERY, *FINETUNE]


@pytest.mark.slow
def test_a_recipe_killed_ten_times_ends_as_if_it_never_was(cfg_file, data_dir, tmp_path, any_moment):
    """Three stages, each killed at random steps and, at its end, at a random moment of saving and evaluating."""
    rng, rows, kills = any_moment, [], {"256": 5, "1k": 4, "chat": 4}
    for i in range(200):
        words = " ".join(rng.choice(("cat", "mat", "rain", "fell")) for _ in range(12))
        rows.append({"prompt": f"say {i}", "response": words})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    conversations = tmp_path / "conversations"
    prepare_conversations([tmp_path / "pairs.jsonl"], conversations, tokenizer=str(data_dir / "tokenizer.json"))
    steps = {}
    for run_dir, command in recipe(tmp_path / "whole", cfg_file, data_dir, conversations):
        process = start_cli(*command)
        assert process.wait(timeout=300) == 0, process.communicate()[0]
        steps[run_dir.name] = metrics(run_dir)[-1]["step"]
    killed = 0
    for run_dir, command in recipe(tmp_path / "killed", cfg_file, data_dir, conversations):
        n, last = kills[run_dir.name], steps[run_dir.name]
        for step in [*sorted(rng.sample(range(2, last), n - 1)), last]:
            process = start_cli(*command)
            wait_for_step(process, run_dir, step)
            time.sleep(rng.random() * (1.0 if step == last else 0.05))
            process.kill()
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
        process = start_cli(*command)
        assert process.wait(timeout=300) == 0, process.communicate()[0]
    assert killed >= 10  # at the end of a stage it may have finished first
    for name in steps:
        whole, other = (tmp_path / side / name for side in ("whole", "killed"))
        assert metrics(whole) == metrics(other)
        one, two = (moe.load(side / "final").state_dict() for side in (whole, other))
        assert all(one[key].equal(two[key]) for key in one)


def test_sigterm_finishes_the_step_saves_and_stops(cfg_file, data_dir, tmp_path):
    endless = ["train.steps=100000", "train.save_every=0", "train.eval_every=0"]
    process = start(cfg_file, data_dir, tmp_path / "run", *endless)
    wait_for_step(process, tmp_path / "run", 5)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "goes on from there" in output
    assert "Traceback" not in output
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert metrics(tmp_path / "run")[-1]["step"] == step
    moe.load(saved)


def test_ctrl_c_stops_after_the_step_and_the_run_goes_on_later(cfg, data_dir, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr("moe.train.console.Lines.step", lambda self, n: n == 3 and signal.raise_signal(signal.SIGINT))
        result = train(cfg, data_dir, tmp_path / "run")
    assert (result.status, result.step, result.signal) == ("stopped", 3, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    assert train(cfg, data_dir, tmp_path / "run").status == "complete"


def test_ctrl_c_during_the_final_evaluation_leaves_it_for_later(cfg, data_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop = lambda self, what, done, total: signal.raise_signal(signal.SIGINT)  # noqa: E731
        patch.setattr("moe.train.console.Lines.progress", stop)
        patch.setattr("moe.train.loop.evaluate.all_windows", lambda data, s: some_windows(data, s, 256))
        assert train(cfg, data_dir, tmp_path / "run").status == "stopped"
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train(cfg, data_dir, tmp_path / "run").status == "complete"
