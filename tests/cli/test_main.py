"""The command line: errors in one line, statuses, lazy imports, and generation equal to the model's own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe
from moe.generate import stream
from moe.tokenizer import train_bpe
from tests.conftest import run_cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model with a tokenizer: it writes noise, half characters among it."""
    letters = [random.Random(i).choices("abcdefgété日本 ", k=200) for i in range(20)]
    tokenizer = train_bpe(["".join(part) for part in letters], 280)
    shape = ["d_model=64", "n_layers=1", "vocab_size=290", "max_seq_len=128", "attention.n_heads=2"]
    shape += ["attention.head_dim=16", "experts.n_experts=4", "experts.d_ff=64"]
    place = tmp_path_factory.mktemp("cli") / "model"
    moe.save(moe.Transformer(moe.load_config("replica-tiny").with_overrides(shape), seed=1), place, tokenizer=tokenizer)
    return place


def expected_text(checkpoint, prompt, n, **sampling):
    """What the model writes up to end-of-text, ids beyond the tokenizer left out."""
    model, tokenizer = moe.load(checkpoint), moe.load_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if sampling["temperature"]:
        new = torch.cat(list(stream(model, torch.tensor([ids]), n, **sampling))).tolist()
    else:
        new = model.generate(torch.tensor([ids]), n, temperature=0)[0, len(ids) :].tolist()
    if tokenizer.eot_id in new:
        new = new[: new.index(tokenizer.eot_id)]
    return tokenizer.decode([i for i in new if i < tokenizer.vocab_size])


@pytest.mark.parametrize("temperature", [0.8, 0.0])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("prompt", ["ab cde", ""])
def test_generate_prints_what_the_model_generates(checkpoint, capsys, prompt, seed, temperature):
    settings = ("--max-tokens", 60, "--seed", seed, "--top-k", 50, "--temperature", temperature)
    assert run_cli("generate", checkpoint, "--prompt", prompt, *settings) == 0
    expected = expected_text(checkpoint, prompt, 60, seed=seed, top_k=50, temperature=temperature, top_p=0.95)
    assert capsys.readouterr().out == expected


def test_generate_never_prints_a_stop_string(checkpoint, capsys):
    whole = expected_text(checkpoint, "ab", 60, seed=0, temperature=0.8, top_p=0.95)
    stop = whole[20:24]
    args = ["--prompt", "ab", "--max-tokens", 60, "--seed", 0, "--stop", stop, "--stop", "never there"]
    assert run_cli("generate", checkpoint, *args) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["train", "replica-tini"], 2, "replica-tiny"),
        (["train", "replica-tiny", "--set", "train.lrr=1"], 2, "did you mean 'train.lr'"),
        (["train", "replica-tiny", "--set", "train.lr=-1"], 2, "train.lr = -1"),
        (["train", "replica-tiny", "--data", "nowhere"], 1, "no prepared data in nowhere"),
        (["train", "nowhere.toml"], 2, "no such file"),
        (["data", "prepare", "nowhere", "--out", "x"], 1, "nowhere does not exist"),
        (["data", "prepare", "--out", "x", "--tokenizer", "nowhere"], 1, "no tokenizer at nowhere"),
        (["generate", "nowhere"], 1, "nowhere"),
        (["train", "replica-tiny", "--device", "abacus"], 2, "abacus"),
    ],
)
def test_errors_are_one_line_on_stderr(tmp_path, monkeypatch, capsys, args, status, message):
    monkeypatch.chdir(tmp_path)
    if "abacus" in args:
        monkeypatch.setattr("moe.cli.train.default_data", lambda cfg: tmp_path)
    assert run_cli(*args) == status
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", -1], "temperature = -1"),
        (["--top-p", 0], "--top-p = 0"),
        (["--prompt", "ab " * 500], "max_seq_len = 128"),
        (["--stop", ""], "an empty string would end every text before it begins"),
    ],
)
def test_generate_refuses_what_cannot_be(checkpoint, capsys, args, message):
    assert run_cli("generate", checkpoint, *args) == 2
    assert message in capsys.readouterr().err


def test_a_vocabulary_larger_than_the_model_s_is_named_with_both_numbers(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for i in range(60):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"some text {i} " * 30)
    assert run_cli("data", "prepare", tmp_path / "docs", "--out", tmp_path / "data", "--vocab-size", 270) == 0
    assert run_cli("data", "prepare", tmp_path / "docs", "--out", tmp_path / "data", "--vocab-size", 270) == 0
    assert "already prepared" in capsys.readouterr().out
    args = ["train", "replica-tiny", "--data", tmp_path / "data", "--out", tmp_path / "run"]
    assert run_cli(*args, "--set", "vocab_size=260", "--set", "train.steps=1") == 1
    err = capsys.readouterr().err
    assert "270" in err
    assert "260" in err


def test_wrong_usage_has_status_2(capsys):
    assert run_cli("trian") == 2


@pytest.mark.parametrize(("option", "shown"), [("--help", "generate"), ("--version", f"gpt4-moe {moe.__version__}, ")])
def test_help_and_version_load_no_torch(option, shown):
    code = f"import sys\nimport moe.cli.main\ntry:\n    moe.cli.main.main(['{option}'])\nexcept SystemExit:\n    pass\n"
    code += "sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert "\x1b" not in done.stdout
