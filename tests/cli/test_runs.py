"""RUN stands for RUN/final wherever a checkpoint is taken; of an unfinished run no checkpoint is guessed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import moe
from moe.checkpoint import load_config_of
from moe.errors import CheckpointError
from moe.io.runs import locate
from moe.tokenizer import Tokenizer
from moe.train.metrics import load_over_training
from tests.conftest import run_cli

MAKES = ["--set", "train.steps=1", "train.eval_tokens=0", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A directory as a complete run leaves it, with two checkpoints of other weights beside its final/."""
    place = tmp_path_factory.mktemp("run") / "step-000002"  # a name that means something elsewhere
    shape = ["d_model=64", "n_layers=1", "vocab_size=300", "max_seq_len=64", "attention.n_heads=2"]
    shape += ["attention.head_dim=16", "experts.n_experts=4", "experts.d_ff=64", "train.dtype=fp32"]
    cfg = moe.load_config("replica-tiny").with_overrides(shape)
    tokenizer = Tokenizer.load(data_dir)
    for seed, name in enumerate(("final", "checkpoints/step-000999", "checkpoints/step-001000")):
        moe.save(moe.Transformer(cfg, seed), place / name, tokenizer=tokenizer)
    (place / "config.toml").write_text(cfg.to_toml())
    (place / "metrics.jsonl").touch()
    return place


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "CHECKPOINT", "--prompt", "the cat", "--max-tokens", 5],
        ["chat", "CHECKPOINT", "--message", "the cat", "--max-tokens", 5],
        ["eval", "CHECKPOINT", "--text", "TEXT", "--out", "OUT/figures"],
        ["profile", "routing", "CHECKPOINT", "--text", "TEXT", "--tokens", 64],
        ["profile", "routing", "CHECKPOINT", "--data", "DATA", "--tokens", 64],
        ["profile", "compare", "CHECKPOINT", "CHECKPOINT", "--text", "TEXT", "--tokens", 64],
        ["data", "prepare", "TEXTS", "--tokenizer", "CHECKPOINT", "--out", "OUT/data"],
        ["data", "instructions", "TALK", "--tokenizer", "CHECKPOINT", "--out", "OUT/chat"],
        ["train", "OUT/CONFIG.toml", "--data", "DATA", "--from", "CHECKPOINT", "--out", "OUT/next", *MAKES],
    ],
    ids=lambda command: " ".join(map(str, command[:2])),
)
def test_the_run_is_its_final_checkpoint(run: Path, data_dir: Path, tmp_path: Path, capsys, command) -> None:
    text = tmp_path / "text"
    text.write_text("the old cat saw two birds fly over the house\n" * 3)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text("the cat sat on the mat " * 9)
    talk = tmp_path / "talk.jsonl"
    talk.write_text("".join(json.dumps({"prompt": f"hello {i}", "response": "cat"}) + "\n" for i in range(60)))
    names = {"TEXT": text, "DATA": data_dir, "TEXTS": tmp_path / "texts", "TALK": talk}
    said = []
    for checkpoint in (run / "final", run):
        out = tmp_path / f"out-{len(said)}"
        out.mkdir()
        shutil.copy(run / "config.toml", out / "CONFIG.toml")
        words = [str(names.get(str(a), a)).replace("OUT/", f"{out}/") for a in command]
        assert run_cli(*(str(checkpoint) if a == "CHECKPOINT" else a for a in words)) == 0
        said.append(capsys.readouterr().out)
        summary = out / "next" / "summary.json"
        if summary.is_file():
            said[-1] = "trained"
            before = json.loads((out / "next" / "metrics.jsonl").read_text().splitlines()[0])["from"]
            assert locate((out / "next" / before).resolve()) == (run / "final").resolve()
        if "eval" in command:
            said[-1] = json.loads((out / "figures").read_text())["text"]["scores"]["total"]
    if "data" not in command:
        assert said[0] == said[1]


def test_the_library_reads_a_run(run: Path) -> None:
    assert locate(run) == run / "final"
    assert locate(run / "final") == run / "final"
    assert torch.equal(moe.load(run).head.weight, moe.load(run / "final").head.weight)
    assert moe.load_tokenizer(run).fingerprint == Tokenizer.load(run).fingerprint
    assert load_config_of(run) == moe.load(run).cfg


def test_a_run_has_all_its_records_and_a_checkpoint_those_before_it(run: Path, tmp_path: Path) -> None:
    place = tmp_path / run.name
    shutil.copytree(run, place)
    records = [{"kind": "train", "step": step} for step in (1, 900, 1100)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert load_over_training(place) == load_over_training(place / "final") == records
    assert load_over_training(place / "checkpoints" / "step-001000") == records[:2]


def test_a_run_that_is_not_complete_is_never_guessed(run: Path, tmp_path: Path, capsys) -> None:
    place = tmp_path / "run"
    shutil.copytree(run, place)
    shutil.rmtree(place / "final")
    (place / "checkpoints" / ".step-002000.ab.tmp").mkdir()
    newest = place / "checkpoints" / "step-001000"
    for read in (moe.load, moe.load_tokenizer, Tokenizer.load, load_config_of):
        for name in (place, place / "checkpoints"):
            with pytest.raises(CheckpointError, match=rf"{name} is a run .*final/.* newest checkpoint, {newest}$"):
                read(name)
    assert run_cli("generate", place) == 1
    assert f"newest checkpoint, {newest}" in capsys.readouterr().err
    assert moe.load(newest).cfg == moe.load(run).cfg
    shutil.rmtree(place / "checkpoints")
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        moe.load(place)
