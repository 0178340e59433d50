"""One directory, one run: two at once, the wrong one asked for again, a longer one, and what may change on the way."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import moe
from moe import device as devices
from moe.data import prepare
from moe.errors import ConfigError, DataError, InUseError, TrainError
from moe.io.files import atomic_directory, locked
from moe.lora import LoraConfig
from moe.train import identity, loop, state, train
from moe.train.metrics import read_metrics
from tests.conftest import ROOT, rel, run_cli


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(loop.pictures, "draw", lambda run_dir: [])
    monkeypatch.setattr(loop.evaluate, "draw_samples", lambda *args, **more: [])


def records(run_dir, kind):
    return [r for r in read_metrics(run_dir) if r["kind"] == kind]


def stopped_at(step, *arguments, **more):
    """A run that is asked to stop after `step`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.train.console.Lines.step", lambda self, n: n == step and signal.raise_signal(signal.SIGTERM))
        result = train(*arguments, **more)
    assert (result.status, result.step) == ("stopped", step)


@pytest.fixture(scope="session")
def other_data(data_dir, tmp_path_factory):
    """Other text, the same tokenizer."""
    root = tmp_path_factory.mktemp("other")
    (root / "text").mkdir()
    for i in range(60):
        (root / "text" / f"{i}.txt").write_text(f"other text, number {i}, " * 20)
    return prepare([root / "text"], root / "prepared", tokenizer=data_dir / "tokenizer.json").path


# ----------------------------------------------------------------------------------------------------- two at once


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_another_process_trains_is_refused_and_stays(cfg, data_dir, tmp_path, resume):
    run = tmp_path / "run"
    stopped_at(3, cfg, data_dir, run)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    with locked(run), pytest.raises(InUseError, match=f"in use by process {os.getpid()} "):
        train(cfg, data_dir, run, resume=resume)
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "nothing is moved aside"
    assert train(cfg, data_dir, run).status == "complete"


def test_two_commands_at_once_give_one_run_and_one_refusal(cfg, cfg_file, data_dir, tmp_path, capsys):
    done, refused = threading.Event(), []

    def second(self, step):
        if step == 4 and not refused:
            thread = threading.Thread(target=lambda: refused.append(run_cli("train", cfg_file, "--data", data_dir,
                                                                            "--out", tmp_path / "run")))  # fmt: skip
            thread.start()
            thread.join()
            done.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.train.console.Lines.step", second)
        result = train(cfg, data_dir, tmp_path / "run")
    assert done.is_set()
    assert refused == [1]
    assert "is in use by process" in capsys.readouterr().err
    assert result.status == "complete"
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 9))


def test_what_a_killed_save_left_goes_and_what_others_write_stays(cfg, data_dir, tmp_path):
    run = tmp_path / "run"
    stopped_at(3, cfg, data_dir, run)
    left = [run / "checkpoints" / ".step-000004.0123abcd.tmp", run / ".final.0123abcd.tmp"]
    for place in left:
        place.mkdir()
        (place / "part").write_text("half")
    (run / ".summary.json.0123abcd.tmp").write_text("half")
    with atomic_directory(run / "mine") as written:
        assert train(cfg, data_dir, run).status == "complete"
        assert [p.name for p in run.rglob("*.tmp")] == [written.name]


# ------------------------------------------------------------------------------------------- the same run, or not


def test_a_complete_run_is_not_taken_for_another(cfg, data_dir, other_data, tmp_path):
    first = train(cfg, data_dir, tmp_path / "first")
    run = tmp_path / "run"
    train(cfg, data_dir, run, start_from=tmp_path / "first" / "final", device="cpu")
    before = (run / "metrics.jsonl").read_bytes()
    final = tmp_path / "first" / "final"
    asked: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
        "other data, another stream .*`run_dir`.*`resume=": ((cfg, other_data), {"start_from": final}),
        "begun with the weights of .*first/final, and this is one begun without": ((cfg, data_dir), {}),
        "begun with the weights of .*run/final": ((cfg, data_dir), {"start_from": run / "final"}),
        "without LoRA, and this is one with LoRA .*'rank': 2": (
            (cfg, data_dir),
            {"start_from": final, "lora": LoraConfig(2, 4.0)},
        ),
        r"train.seed \(was 0, now 1\)": ((cfg.with_overrides(["train.seed=1"]), data_dir), {"start_from": final}),
        r"is complete.*train.lr \(was 0.003, now 0.001\)": (
            (cfg.with_overrides(["train.lr=1e-3"]), data_dir),
            {"start_from": final},
        ),
        "is complete.*512": ((cfg.with_overrides(["train.steps=4"]), data_dir), {"start_from": final}),
        "is complete.*traces": ((cfg, data_dir), {"start_from": final, "trace_every": 2}),
        "device = 'nonsense'": ((cfg, data_dir), {"start_from": final, "device": "nonsense"}),
    }
    for complaint, ((config, data), more) in asked.items():
        with pytest.raises((ConfigError, DataError), match=complaint):
            train(config, data, run, **more)
    (run / "summary.json").write_text((run / "summary.json").read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(ConfigError, match=r"device \(was cuda, now cpu\)"):
        train(cfg, data_dir, run, start_from=final, device="cpu")
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    again = train(cfg, data_dir, run, start_from=moved)  # the run for its final/, and where it is does not matter
    assert again.summary["device"] == "cuda"
    assert again.step == first.step
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_command_refuses_other_data_in_the_default_directory(
    cfg_file, data_dir, other_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run_cli("train", cfg_file, "--data", data_dir) == 0
    assert run_cli("train", cfg_file, "--data", other_data) == 1
    error = capsys.readouterr().err
    assert "runs/replica-tiny holds a run on other data" in error
    assert "--out" in error
    assert "--fresh" in error


def test_an_interrupted_run_is_not_taken_for_another(cfg, data_dir, other_data, tmp_path):
    train(cfg, data_dir, tmp_path / "first")
    run = tmp_path / "run"
    stopped_at(3, cfg, data_dir, run, start_from=tmp_path / "first")
    with pytest.raises(DataError, match="other data"):
        train(cfg, other_data, run, start_from=tmp_path / "first")
    with pytest.raises(ConfigError, match=r"begun with the weights of .*, and this is one begun without"):
        train(cfg, data_dir, run)
    with pytest.raises(ConfigError, match=r"train.batch_size \(was 4, now 2\)"):
        train(cfg.with_overrides(["train.batch_size=2"]), data_dir, run, start_from=tmp_path / "first")
    with pytest.raises(ConfigError, match=r"has had 192 tokens in 3 steps already, .* asks for 128"):
        train(cfg.with_overrides(["train.steps=2"]), data_dir, run, start_from=tmp_path / "first")
    assert train(cfg, data_dir, run, start_from=tmp_path / "first" / "final").status == "complete"
    with pytest.raises(TrainError, match="would be moved aside"):
        train(cfg, data_dir, run, start_from=run, resume="never")
    assert (run / "summary.json").is_file()


def test_runs_of_versions_that_recorded_less_go_on(cfg, data_dir, tmp_path):
    run = tmp_path / "run"
    stopped_at(3, cfg, data_dir, run)
    found = state.latest(run)
    assert found is not None
    file = found / "training.pt"
    training = torch.load(file, weights_only=True)
    for key in ("data", "from", "device", "dtype", "changed"):
        del training[key]
    training["config"] = training["config"].replace("final_eval_tokens = 0\n", "")
    torch.save(training, file)
    assert train(cfg, data_dir, run).summary["changed"] == []
    assert records(run, "changed") == []


def test_digests_tell_weights_apart(tiny, tmp_path):
    model = moe.Transformer(tiny)
    moe.save(model, tmp_path / "one")
    moe.save(model, tmp_path / "two", max_shard_bytes=10_000)
    assert identity.digest(tmp_path / "one") == identity.digest(tmp_path / "two"), "in one file or in many"
    with torch.no_grad():
        model.norm.weight[0] += 1e-6
    moe.save(model, tmp_path / "two")
    assert identity.digest(tmp_path / "one") != identity.digest(tmp_path / "two")


# --------------------------------------------------------------------------------------------------- what may change


def test_the_advice_after_running_out_of_memory_can_be_followed(cfg, data_dir, tmp_path, monkeypatch):
    train(cfg, data_dir, tmp_path / "whole")
    run, step = tmp_path / "run", loop._train_step

    def out_of_memory(run, traced):
        if run.step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        step(run, traced)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_step", out_of_memory)
        with pytest.raises(
            TrainError, match=r"train.micro_batch = all: halve it, or .*activation_checkpointing .*20.00"
        ):
            train(cfg, data_dir, run)
    saving = cfg.with_overrides(["train.micro_batch=2", "train.activation_checkpointing=full", "train.log_every=2"])
    result = train(saving, data_dir, run)
    one, other = (moe.load(place / "final").state_dict() for place in (tmp_path / "whole", run))
    assert all(rel(other[name], one[name]) < 1e-4 for name in one)
    (change,) = records(run, "changed")
    assert change["step"] == 4
    assert change["changes"] == {
        "train.micro_batch": [0, 2],
        "train.activation_checkpointing": ["none", "full"],
        "train.log_every": [1, 2],
    }
    assert result.summary["changed"] == [{"step": 4, "changes": change["changes"]}]


def test_a_processors_lack_of_memory_is_said_too(cfg, data_dir, tmp_path, monkeypatch):
    def allocate(run, traced):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(loop, "_train_step", allocate)
    with pytest.raises(TrainError, match=r"out of memory with train.micro_batch = all: halve it"):
        train(cfg, data_dir, tmp_path / "run")


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_is_extended_with_a_lower_rate(cfg, data_dir, tmp_path, complete):
    """A constant rate, so that a run of 12 steps says what the first 8 and the next 4 are to be."""
    base = cfg.with_overrides(["train.schedule=wsd", "train.decay=0.0"])
    longer = base.with_overrides(["train.steps=12"])
    train(longer, data_dir, tmp_path / "whole")
    run = tmp_path / "run"
    if complete:
        train(base, data_dir, run)
    else:
        stopped_at(8, longer.with_overrides(["train.steps=10"]), data_dir, run)
    result = train(longer, data_dir, run)
    assert (result.status, result.step) == ("complete", 12)
    one, other = (moe.load(place / "final").state_dict() for place in (tmp_path / "whole", run))
    assert all(one[name].equal(other[name]) for name in one)
    assert [r["step"] for r in records(run, "train")] == list(range(1, 13))
    (change,) = records(run, "changed")
    assert change["changes"] == {"train.steps": [8 if complete else 10, 12]}
    assert (run / "final-step-000008").is_dir() == (run / "summary-step-000008.json").is_file() == complete
    lower = train(longer.with_overrides(["train.tokens=1024", "train.lr=1e-3"]), data_dir, run)
    assert (lower.step, records(run, "train")[-1]["lr"]) == (16, 1e-3)
    assert [c["step"] for c in lower.summary["changed"]] == [8, 12]
    assert json.loads((run / "summary.json").read_text())["changed"] == lower.summary["changed"]
    with pytest.raises(ConfigError, match=r"train.lr \(was 0.001, now 0.003\)"):
        train(longer.with_overrides(["train.tokens=2048"]), data_dir, run)


def test_a_complete_run_without_a_checkpoint_is_not_extended_by_beginning_anew(cfg, data_dir, tmp_path):
    train(cfg, data_dir, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"no checkpoint left to go on from.*`start_from=.*run/final"):
        train(cfg.with_overrides(["train.steps=9"]), data_dir, tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- its end


def test_final_is_there_before_the_scoring_which_may_be_bounded(cfg, data_dir, tmp_path, capsys):
    seen = []

    def progress(self, what, done, total):
        seen.append((moe.load(tmp_path / "run").cfg.name, done, total))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.train.console.Lines.progress", progress)
        bounded = train(cfg.with_overrides(["train.final_eval_tokens=128"]), data_dir, tmp_path / "run")
    scored = sum(score["tokens"] for score in bounded.summary["held_out"].values())
    assert 64 <= scored <= 192
    assert seen[-1] == ("replica-tiny", scored, 128)
    assert "final evaluation: about 128 of" in capsys.readouterr().out
    whole = train(cfg, data_dir, tmp_path / "whole")
    assert sum(score["tokens"] for score in whole.summary["held_out"].values()) > 400


def test_a_closed_terminal_saves_and_stops(cfg, data_dir, tmp_path):
    """The command's own terminal is closed while it trains: SIGHUP comes, and nothing more can be written to it."""
    file = tmp_path / "endless.toml"
    file.write_text(cfg.with_overrides(["train.steps=100000", "train.save_every=0", "train.eval_every=0"]).to_toml())
    leader, terminal = pty.openpty()
    script = "import fcntl, termios, sys; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from moe.cli.main import main; main()"
    command = [sys.executable, "-c", script, "train", file, "--data", data_dir, "--out", tmp_path / "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=env, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    text = b""
    while b"loss" not in text:
        text += os.read(leader, 4096)
    os.close(leader)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert state.latest(tmp_path / "run") is not None


def test_nohup_is_heeded(cfg, data_dir, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moe.train.console.Lines.step", lambda self, n: signal.raise_signal(signal.SIGHUP))
            assert train(cfg, data_dir, tmp_path / "run").status == "complete"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# -------------------------------------------------------------------------------------------------- the caller's state


def denormals_kept(threads_elements=200_000):
    """The share of denormals that survive a product, in all of torch's threads."""
    smallest = torch.ones(threads_elements, dtype=torch.int32).view(torch.float32)
    return (smallest * 1).view(torch.int32).double().mean().item()


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_state_is_there_again(cfg, data_dir, tmp_path, monkeypatch, fails):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(5)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    inside = []

    def note(self, text):
        inside.append((denormals_kept(), torch.is_grad_enabled(), torch.get_default_dtype()))
        if fails:
            raise ZeroDivisionError

    try:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr("moe.train.console.Lines.note", note)
            if fails:
                with pytest.raises(ZeroDivisionError):
                    train(cfg, data_dir, tmp_path / "run")
            else:
                train(cfg, data_dir, tmp_path / "run")
            assert not torch.is_grad_enabled()
        assert inside[0] == (0.0, True, torch.float32)
        assert denormals_kept() == 1.0
        assert torch.get_num_threads() == 2
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "high"
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
        drawn = torch.rand(3)
        torch.manual_seed(5)
        assert drawn.equal(torch.rand(3))
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


def test_a_caller_that_rounds_denormals_to_zero_still_does(cfg, data_dir, tmp_path):
    devices.flush_denormals(True)
    try:
        train(cfg.with_overrides(["train.steps=1"]), data_dir, tmp_path / "run")
        assert denormals_kept() == 0.0
    finally:
        devices.flush_denormals(False)
    assert denormals_kept() == 1.0
