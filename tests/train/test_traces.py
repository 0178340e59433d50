"""Traces of training steps: what the step routed, without changing it."""

import torch

import moe
from moe.data import Mixture, TokenData
from moe.profile import Trace, replay
from moe.train import train
from moe.train.metrics import read_metrics
from tests.conftest import run_cli


def test_every_nth_step_is_recorded_and_nothing_else_changes(cfg, data_dir, tmp_path):
    """The loads are those that metrics.jsonl has, the tokens those of the mixture, the losses those without a trace."""
    cfg = cfg.with_overrides(["train.micro_batch=2"])
    train(cfg, data_dir, tmp_path / "plain")
    train(cfg, data_dir, tmp_path / "traced", trace_every=3)
    assert not (tmp_path / "plain" / "traces").exists()
    found = sorted(place.name for place in (tmp_path / "traced" / "traces").iterdir())
    assert found == ["step-000003", "step-000006"]
    records = {r["step"]: r for r in read_metrics(tmp_path / "traced") if r["kind"] == "train"}
    mixture = Mixture(TokenData.open(data_dir), 16, cfg.train.seed)
    for step in (3, 6):
        trace = Trace.open(tmp_path / "traced" / "traces" / f"step-{step:06d}")
        passes = list(trace)
        assert [p.shape for p in passes] == [(2, 16), (2, 16)]
        counts = trace.counts_PLE().sum(0)
        assert (counts / counts.sum(1, keepdims=True)).tolist() == records[step]["load"]
        tokens = torch.cat([p.tokens_T for p in passes])  # type: ignore[arg-type]
        inputs = mixture.batch((step - 1) * 4, 4).inputs
        assert tokens.tolist() == inputs.flatten().tolist()
    plain = [r["loss"] for r in read_metrics(tmp_path / "plain") if r["kind"] == "train"]
    assert [records[step]["loss"] for step in sorted(records)] == plain


def test_a_traced_step_is_replayed(cfg, data_dir, tmp_path):
    """The first step's trace, on a model that would route otherwise, gives the recorded experts and weights' shape."""
    train(cfg.with_overrides(["train.steps=1"]), data_dir, tmp_path / "run", trace_every=1)
    trace = Trace.open(tmp_path / "run" / "traces" / "step-000001")
    (one,) = trace
    other = moe.Transformer(cfg, seed=99)
    assert one.tokens_T is not None
    with replay(other, trace):
        routing = other(one.tokens_T.view(one.shape)).routing
    assert torch.equal(torch.stack([r.ids_TK for r in routing], 1), one.ids_TLK)


def test_a_step_that_is_done_again_after_a_resume_replaces_its_trace(cfg, data_dir, tmp_path, monkeypatch):
    from moe.train import loop

    def interrupted(run):
        if run.step == 6:
            raise KeyboardInterrupt
        return log(run)

    log = loop._log
    monkeypatch.setattr(loop, "_log", interrupted)
    try:
        train(cfg, data_dir, tmp_path / "run", trace_every=2)
        raise AssertionError("not interrupted")
    except KeyboardInterrupt:
        monkeypatch.setattr(loop, "_log", log)
    before = next(iter(Trace.open(tmp_path / "run" / "traces" / "step-000006"))).ids_TLK
    train(cfg, data_dir, tmp_path / "run", trace_every=2)  # goes on from step 4
    names = sorted(place.name for place in (tmp_path / "run" / "traces").iterdir())
    assert names == [f"step-{n:06d}" for n in (2, 4, 6, 8)]
    assert torch.equal(next(iter(Trace.open(tmp_path / "run" / "traces" / "step-000006"))).ids_TLK, before)


def test_from_the_command_line(cfg_file, data_dir, tmp_path, capsys):
    arguments = ["--data", data_dir, "--out", tmp_path / "run"]
    assert run_cli("train", cfg_file, *arguments, "--trace-every", -1) == 2
    assert "--trace-every = -1: must be 0 (none) or more" in capsys.readouterr().err
    assert run_cli("train", cfg_file, *arguments, "--trace-every", 8) == 0
    assert run_cli("profile", "serving", tmp_path / "run" / "traces" / "step-000008") == 0


def test_generation_is_recorded(cfg, data_dir, tmp_path, capsys):
    """The trace holds every token but the last, with the experts of one forward pass over all of them."""
    model = moe.Transformer(cfg, seed=3)
    moe.save(model, tmp_path / "model", tokenizer=TokenData.open(data_dir).tokenizer())
    arguments = ["generate", tmp_path / "model", "--prompt", "the cat", "--max-tokens", 12, "--seed", 2]
    assert run_cli(*arguments) == 0
    text = capsys.readouterr().out
    assert run_cli(*arguments, "--trace", tmp_path / "t") == 0
    assert capsys.readouterr().out == text
    passes = list(Trace.open(tmp_path / "t"))
    prompt = moe.load_tokenizer(tmp_path / "model").encode("the cat")
    assert [p.shape for p in passes] == [(1, len(prompt) + 11)]
    tokens = torch.cat([p.tokens_T for p in passes])  # type: ignore[arg-type]
    assert tokens[: len(prompt)].tolist() == prompt
    want = torch.stack([r.ids_TK for r in model(tokens[None]).routing], 1)
    assert torch.equal(torch.cat([p.ids_TLK for p in passes]), want)
    assert run_cli(*arguments, "--trace", tmp_path / "t") == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
