"""`moe export`: to transformers and back, with equal logits, tokenizer and chat template; what cannot be is refused."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe import hf
from moe.config import DenseConfig, RouterConfig
from moe.data.chat import ChatTemplate
from moe.io import tensorfiles
from moe.io.files import locked
from moe.tokenizer import train_bpe
from tests.conftest import run_cli
from tests.hf.test_mixtral import SMALL, TOLERANCE, from_pretrained, logit_error, mixtral, relative, tokens

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `moe finetune` leaves: a run whose final/ is a chat model."""
    place = tmp_path_factory.mktemp("runs") / "run"
    tokenizer = train_bpe(["to be or not to be, that is the question. user assistant\n"] * 3, 280)
    tokenizer = tokenizer.with_chat_template(ChatTemplate(tokenizer).jinja)
    moe.save(moe.Transformer(SMALL, seed=1), place / "final", tokenizer=tokenizer)
    (place / "metrics.jsonl").touch()
    return place


def test_there_and_back_again(run: Path, tmp_path: Path, capsys) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert run_cli("export", run, there) == 0
    out, err = capsys.readouterr()
    n = sum(p.numel() for p in moe.load(run).parameters())
    assert (
        out
        == f"{there}: {n:,} parameters in float32, a Mixtral for transformers, tokenizer bpe-280, its chat template\n"
    )
    assert err == ""
    assert run_cli("export", there, back, "--format", "moe") == 0
    one, other = moe.load(run), moe.load(back)
    assert logit_error(one, from_pretrained(there), 32) < TOLERANCE
    assert torch.equal(one(tokens(280, 32)).logits_BSV, other(tokens(280, 32)).logits_BSV)
    ours, theirs = moe.load_tokenizer(back), transformers.AutoTokenizer.from_pretrained(there)
    messages = [{"role": "user", "content": "to be?"}]
    assert theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=True) == ChatTemplate(
        ours
    ).prompt(messages)
    assert ours.fingerprint == moe.load_tokenizer(run).fingerprint
    assert ours.chat_template == moe.load_tokenizer(run).chat_template


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("format", ["hf", "moe"])
def test_weights_in_another_dtype(run: Path, tmp_path: Path, format: str, dtype: str) -> None:
    out = tmp_path / "out"
    assert run_cli("export", run, out, "--format", format, "--dtype", dtype) == 0
    found = (hf.load if format == "hf" else moe.load)(out)
    want = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {p.dtype for p in found.parameters()} == {want}
    for a, b in zip(found.parameters(), moe.load(run).parameters(), strict=True):
        assert torch.equal(a, b.to(want))


def test_a_model_of_transformers_becomes_ours(tmp_path: Path, capsys) -> None:
    theirs = mixtral()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    capsys.readouterr()
    assert run_cli("export", tmp_path / "theirs", tmp_path / "ours", "--format", "moe") == 0
    out, err = capsys.readouterr()
    assert "no tokenizer" in out
    assert err.startswith("notice: ")
    assert logit_error(moe.load(tmp_path / "ours"), theirs, 64) < TOLERANCE
    (tmp_path / "theirs" / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    assert run_cli("export", tmp_path / "theirs", tmp_path / "again", "--format", "moe") == 0
    assert "the tokenizer stays behind" in capsys.readouterr().err
    assert not (tmp_path / "again" / "tokenizer.json").exists()


def test_an_adapter_is_merged(run: Path, tmp_path: Path) -> None:
    from moe import lora

    model, cfg = moe.load(run), lora.LoraConfig(rank=2, targets=("attention", "experts"))
    lora.add(model, cfg, seed=0)
    with torch.no_grad():
        for p in lora.adapters(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    lora.save_adapter(model, cfg, tmp_path / "adapter.safetensors")
    assert run_cli("export", run, tmp_path / "out", "--adapter", tmp_path / "adapter.safetensors") == 0
    want = model(tokens(280, 32)).logits_BSV
    assert relative(from_pretrained(tmp_path / "out")(tokens(280, 32)).logits, want) < TOLERANCE
    assert relative(moe.load(run)(tokens(280, 32)).logits_BSV, want) > 1e-2


def refused(capsys, *args: Any) -> str:
    assert run_cli("export", *args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_nothing_is_replaced_and_nothing_half_written(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes").write_text("precious")
    assert "exists and is not empty: choose a new" in refused(capsys, run, taken)
    assert "exists and is not empty" in refused(capsys, run, taken / "notes")
    assert "exists and is not empty" in refused(capsys, run, run / "final")
    (tmp_path / "empty").mkdir()
    real = tensorfiles._write_file

    def fails(path: Path, *args: Any) -> None:
        real(path, *args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorfiles, "_write_file", fails)
    for out in ("new", "empty"):
        for format in ("hf", "moe"):
            assert "No space left" in refused(capsys, run, tmp_path / out, "--format", format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "taken"]
    assert not any((tmp_path / "empty").iterdir())
    assert [p.name for p in taken.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": RouterConfig(bias_update_rate=0.01)}, "router.bias_update_rate = 0.01"),
        ({"experts": dataclasses.replace(SMALL.experts, activation="gelu")}, "experts.activation = 'gelu'"),
        ({"dense": DenseConfig(1, 8)}, "dense.layers = 1"),
    ],
)
def test_what_mixtral_lacks_is_named_before_the_weights_are_read(change, message, tmp_path: Path, capsys) -> None:
    moe.save(moe.Transformer(dataclasses.replace(SMALL, **change)), tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"")
    assert message in refused(capsys, tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_named(tmp_path: Path, capsys) -> None:
    assert "no such directory" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert "model_type = 'qwen3_moe'" in refused(capsys, tmp_path / "qwen", tmp_path / "out", "--format", "moe")
    assert not (tmp_path / "out").exists()


def test_how_text_was_seen_in_training_goes_along(tmp_path: Path) -> None:
    """The mask and the window of training, through transformers, too; else scores would change on the way."""
    cfg = SMALL.with_overrides(["train.document_mask=true", "train.seq_len=32"])
    moe.save(moe.Transformer(cfg), tmp_path / "run")
    assert run_cli("export", tmp_path / "run", tmp_path / "there") == 0
    from_pretrained(tmp_path / "there").save_pretrained(tmp_path / "again")
    for i, place in enumerate(("there", "again")):
        assert run_cli("export", tmp_path / place, tmp_path / f"back{i}", "--format", "moe") == 0
        train = moe.load(tmp_path / f"back{i}").cfg.train
        assert (train.document_mask, train.seq_len) == (True, 32)
    assert "gpt4_moe" not in hf.config_to_hf(SMALL)
    with pytest.raises(hf.HFError, match=r"gpt4_moe\.seq_len = 'all': must be a whole number"):
        hf.config_from_hf({**hf.config_to_hf(SMALL), "gpt4_moe": {"seq_len": "all"}})


def test_of_two_exports_to_one_place_one_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    with locked(tmp_path / "out"):
        assert "in use by process" in refused(capsys, run, tmp_path / "out")
    assert run_cli("export", run, tmp_path / "out") == 0
