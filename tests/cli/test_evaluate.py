"""`moe eval`: its figures are those of `evaluate` and of the compressors' own commands, and bad input is named."""

import gzip
import json
import lzma
import math
import os
import random
from pathlib import Path

import pytest

import moe
from moe import evaluate
from moe.data import TokenData, held_out_text, is_held_out, prepare
from tests.conftest import run_cli

WORDS = ("the", "cat", "sat", "on", "a", "mat", "é", "rain")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """data/ of two sources; model/, untrained, with the data's tokenizer; uniform/, which knows nothing."""
    root = tmp_path_factory.mktemp("eval")
    rng = random.Random(0)
    for source in ("verse", "prose"):
        (root / source).mkdir()
        for i in range(60):
            text = " ".join(rng.choices(WORDS, k=50)) + f" {source}\n"
            (root / source / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare([root / "verse", root / "prose"], root / "data", vocab_size=280)
    shape = ["d_model=64", "n_layers=1", "vocab_size=300", "max_seq_len=64", "attention.n_heads=2"]
    shape += ["attention.head_dim=16", "experts.n_experts=4", "experts.d_ff=64", "train.seq_len=32", "train.dtype=fp32"]
    model = moe.Transformer(moe.load_config("replica-tiny").with_overrides(shape))
    tokenizer = TokenData.open(root / "data").tokenizer()
    moe.save(model, root / "model", tokenizer=tokenizer)
    model.head.weight.data.zero_()
    moe.save(model, root / "uniform", tokenizer=tokenizer)
    return root


def test_held_out_text_is_that_of_the_files(place):
    found = held_out_text(TokenData.open(place / "data"))
    assert list(found) == ["prose", "verse"]
    for source, text in found.items():
        names = sorted(f"{i}.txt" for i in range(60) if is_held_out(f"{i}.txt"))
        assert text == b"".join((place / source / name).read_bytes() for name in names)


def test_data_scores_are_those_of_evaluate_beside_the_compressors(place, tmp_path, capsys):
    out = tmp_path / "eval.json"
    assert run_cli("eval", place / "model", "--data", place / "data", "--out", out) == 0
    found = json.loads(out.read_text())["data"]
    data = TokenData.open(place / "data")
    lengths = evaluate.byte_lengths(data.tokenizer())
    expected = evaluate.evaluate(moe.load(place / "model"), evaluate.all_windows(data, 32), lengths, batch=5)
    assert found["seq_len"] == 32
    text = held_out_text(data)
    assert list(found["scores"]) == ["prose", "verse", "total"]
    for source, score in expected.items():
        row, raw = found["scores"][source], text[source]
        assert row["bits_per_byte"] == pytest.approx(score.bits / len(raw), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(score.bits * math.log(2) / score.tokens), rel=1e-5)
        assert row["gzip"] == 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)
        assert row["xz"] == 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
    total, raw = found["scores"]["total"], b"".join(text.values())
    assert total["bytes"] == len(raw)
    assert total["xz"] == 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
    shown = capsys.readouterr().out
    assert f"{total['bits_per_byte']:.3f}" in shown
    assert "tokens/s" in shown
    assert "\x1b" not in shown


def test_a_longer_context_is_used_where_asked_for(place, tmp_path):
    figures = []
    for seq_len in (16, 64):
        out = tmp_path / "eval.json"
        assert run_cli("eval", place / "model", "--data", place / "data", "--seq-len", seq_len, "--out", out) == 0
        figures.append(json.loads(out.read_text())["data"])
    assert [f["seq_len"] for f in figures] == [16, 64]
    data = TokenData.open(place / "data")
    model, lengths = moe.load(place / "model"), evaluate.byte_lengths(data.tokenizer())
    for seq_len, found in zip((16, 64), figures, strict=True):
        score = evaluate.total(evaluate.evaluate(model, evaluate.all_windows(data, seq_len), lengths, batch=4))
        assert found["scores"]["total"]["bits"] == pytest.approx(score.bits, rel=1e-5)


def test_raw_text_costs_a_uniform_model_log2_v_bits_per_token(place, tmp_path):
    texts = {"one.txt": "the cat " * 40, "two.py": "def f():\r\n\treturn 'é'\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    out = tmp_path / "eval.json"
    files = [tmp_path / name for name in texts]
    assert run_cli("eval", place / "uniform", "--out", out, "--text", *files) == 0
    scores = json.loads(out.read_text())["text"]["scores"]
    tokenizer = moe.load_tokenizer(place / "uniform")
    for file, text in zip(files, texts.values(), strict=True):
        n_tokens = len(tokenizer.encode(text)) + 1  # end-of-text
        row = scores[str(file)]
        assert (row["tokens"], row["bytes"]) == (n_tokens, len(text.encode()))
        assert row["bits_per_byte"] == pytest.approx(math.log2(300) * n_tokens / len(text.encode()), rel=1e-6)
        assert row["perplexity"] == pytest.approx(300, rel=1e-5)
        assert row["gzip"] == 8 * len(gzip.compress(text.encode(), 9, mtime=0)) / len(text.encode())


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "nothing to score"),
        (["--data", "nowhere"], 1, "no prepared data in nowhere"),
        (["--data", "data", "--seq-len", "65"], 2, "--seq-len = 65: must be from 1 to 64"),
        (["--data", "data", "--batch", "0"], 2, "--batch = 0"),
        (["--data", "data", "--out", "no/such/place.json"], 2, "no/such does not exist"),
        (["--text", "nowhere.txt"], 1, "cannot read nowhere.txt"),
        (["--text", "empty.txt"], 1, "empty.txt is empty"),
        (["--text", "binary.bin"], 1, "binary.bin is not UTF-8 text (byte 2)"),
    ],
)
def test_bad_input_is_named(place, monkeypatch, capsys, args, status, message):
    monkeypatch.chdir(place)
    (place / "empty.txt").touch()
    (place / "binary.bin").write_bytes(b"ab\xff")
    assert run_cli("eval", "model", *args) == status
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in out + err


def test_a_checkpoint_without_a_tokenizer_scores_data_but_no_text(place, tmp_path, capsys):
    moe.save(moe.load(place / "model"), tmp_path / "bare")
    assert run_cli("eval", tmp_path / "bare", "--data", place / "data") == 0
    assert run_cli("eval", tmp_path / "bare", "--text", os.devnull) == 1
    assert "tokenizer.json" in capsys.readouterr().err


def test_tasks_without_lm_eval_say_what_to_install(place, monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.api.model", "moe.lm_eval"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.delitem(__import__("sys").modules, "moe.lm_eval")
    # before anything is scored
    assert run_cli("eval", place / "model", "--data", place / "data", "--tasks", "arc_easy") == 1
    out, err = capsys.readouterr()
    assert 'pip install "gpt4-moe[eval]"' in err
    assert out == ""


def test_data_of_another_tokenizer_is_refused(place, tmp_path, capsys):
    """Its ids are within the vocabulary, and mean other text."""
    prepare([place / "verse"], tmp_path / "other", vocab_size=270)
    assert run_cli("eval", place / "model", "--data", tmp_path / "other") == 2
    said = capsys.readouterr().err
    assert "trained with another tokenizer than" in said
    assert f"`moe data prepare --tokenizer {place / 'model' / 'tokenizer.json'}`" in said
