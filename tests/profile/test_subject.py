"""Hugging Face directories and text files on the command line, against the models' own router logits."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe import evaluate
from moe.data import prepare
from moe.profile.subject import log_probabilities, open_subject, text_of_files
from moe.tokenizer import Tokenizer, train_bpe
from tests.conftest import rel, run_cli, tiny_config
from tests.hf_models import MODELS, build

PROSE = "and so it was that the old man went on to the sea, " * 2
CODE = "def f(x):\n    return [y for y in x if y]\n" * 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([PROSE + CODE], 275)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("texts")
    (place / "tale.txt").write_text(PROSE)
    (place / "a.py").write_text(CODE)
    return place


def saved(name: str, place: Path, tokenizer: Tokenizer | None, **changes: Any) -> Any:
    """The model, saved with the tokenizer in Hugging Face's layout."""
    model = build(name, **{"vocab_size": 300, "max_position_embeddings": 512, **changes}).eval()
    model.save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save(place)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_figures_are_those_of_the_models_own_router_logits(
    name: str, tmp_path: Path, texts: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(name, tmp_path / "model", tokenizer)
    arguments = ["--text", texts / "tale.txt", f"code={texts / 'a.py'}", "--seq-len", 400, "--tokens", 10**6]
    assert run_cli("profile", "routing", tmp_path / "model", *arguments, "--out", tmp_path / "f.json") == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    # Each text is shorter than a sequence, so that it is one.
    streams = [torch.tensor([tokenizer.encode(text)[:-1]]) for text in (PROSE, CODE)]
    E, K = (getattr(model.config, n) for n in ("num_experts", "num_experts_per_tok"))
    with torch.no_grad():
        logits = [torch.stack(model(s, output_router_logits=True).router_logits) for s in streams]
    together = torch.cat(logits, 1)
    counts = torch.stack([torch.bincount(row.flatten(), minlength=E) for row in together.topk(K).indices])
    assert figures["tokens"] == sum(s.numel() for s in streams)
    assert figures["counts_LE"] == counts.tolist()
    entropy = torch.distributions.Categorical(logits=together.double()).entropy().mean(1)
    assert figures["router_entropy_L"] == pytest.approx(entropy.tolist(), rel=1e-5)
    assert list(figures["sources"]) == ["tale", "code"]
    for source, own in zip(("tale", "code"), logits, strict=True):
        shares = torch.stack([torch.bincount(row.flatten(), minlength=E) for row in own.topk(K).indices]).double()
        found = torch.tensor(figures["sources"][source]["mean_LE"], dtype=torch.float64)
        assert rel(found, shares / shares.sum(1, keepdim=True)) < 1e-6
    printed = capsys.readouterr().out
    assert f"{figures['tokens']:,} tokens in 2 passes" in printed
    assert f"{float(entropy[0]):.2f}" in printed
    assert "the tokens an expert serves most" in printed

    assert run_cli("profile", "report", tmp_path / "model", *arguments, "--out", tmp_path / "r.html") == 0
    report = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(f'<td class="n">{count}</td>' in report for count in counts.flatten().tolist())
    assert "closest experts" in report


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_the_models(name: str, tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    model = saved(name, tmp_path / "model", tokenizer)
    subject = open_subject(tmp_path / "model")
    windows = text_of_files(subject, [str(texts / "a.py")], 10**6, 400).windows
    found = log_probabilities(subject, windows, 4)
    ids = torch.tensor([tokenizer.encode(CODE)])
    with torch.no_grad():
        want = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None]).flatten()
    assert list(found) == ["a"]
    assert rel(found["a"], want) < 1e-6


def test_prepared_data_of_the_same_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fits by its ids and merges, however its file is laid out; another tokenizer of as many ids does not."""
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(PROSE * 3 + str(i))
    files = [str(tmp_path / f"{i}.txt") for i in range(30)]
    prepare(files, tmp_path / "data", vocab_size=270)
    saved("Qwen3Moe", tmp_path / "model", None)
    own = json.loads((tmp_path / "data" / "tokenizer.json").read_text())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(own, indent=3))
    arguments = ["profile", "routing", tmp_path / "model", "--data", tmp_path / "data", "--tokens", 300]
    assert run_cli(*arguments) == 0
    train_bpe([CODE * 5], 270).save(tmp_path / "model")
    capsys.readouterr()
    assert run_cli(*arguments) == 1
    assert "was prepared with another tokenizer than" in capsys.readouterr().err


def test_a_tokenizer_that_marks_spaces(tmp_path: Path) -> None:
    """As SentencePiece's do: the beginning it puts before a text, and spaces in what is shown."""
    import tokenizers

    words = {"<s>": 0, "▁the": 1, "▁sea": 2, "<unk>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    saved("Mixtral", tmp_path / "model", None)
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("the sea the the")
    text = text_of_files(open_subject(tmp_path / "model"), [str(tmp_path / "t.txt")], 100, 100)
    ((source, inputs, targets, *_),) = text.windows
    assert (source, inputs.tolist(), targets.tolist()) == ("t", [0, 1, 2, 1], [1, 2, 1, 1])
    assert [text.show(i) for i in range(3)] == ["<s>", " the", " sea"]


def test_files_of_one_name_are_one_source(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    """With an end-of-text between them where it is ours: its documents."""
    saved("Mixtral", tmp_path / "theirs", tokenizer)
    moe.save(moe.Transformer(tiny_config(vocab_size=400, max_seq_len=512)), tmp_path / "ours", tokenizer=tokenizer)
    code, prose = tokenizer.encode(CODE), tokenizer.encode(PROSE)
    for name, between in (("theirs", []), ("ours", [tokenizer.eot_id])):
        subject = open_subject(tmp_path / name)
        found = text_of_files(subject, [f"all={texts / 'a.py'}", f"all={texts / 'tale.txt'}"], 10**6, 10**6)
        ((source, inputs, _, _, documents, _),) = found.windows
        assert source == "all"
        assert inputs.tolist() == [*code, *between, *prose][:-1]
        if between:
            assert documents is not None
            assert documents.tolist() == [0] * len(code) + [1] * len(prose)


def test_what_bad_models_and_texts_get(
    tmp_path: Path, texts: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **small)).save_pretrained(tmp_path / "dense")
    saved("Olmoe", tmp_path / "bare", None)
    saved("Olmoe", tmp_path / "narrow", tokenizer, vocab_size=97)
    saved("Olmoe", tmp_path / "good", tokenizer)
    saved("Olmoe", tmp_path / "lacking", tokenizer)
    file = tmp_path / "lacking" / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "mlp.gate" not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "moose"}')
    (tmp_path / "latin.txt").write_bytes("Bücher".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    tale = ["--text", texts / "tale.txt"]
    for model, arguments, status, message in (
        ("dense", tale, 1, "LlamaForCausalLM has no router that is known here"),
        ("bare", tale, 1, "no such file, and text needs the checkpoint's own tokenizer"),
        ("narrow", tale, 1, "but the model's vocab_size is 97"),
        ("lacking", tale, 1, "tensors are missing or misshapen, model.layers.0.mlp.gate.weight first"),
        ("odd", tale, 1, "cannot load it"),
        ("none", tale, 1, "no such directory"),
        ("good", ["--text", tmp_path / "latin.txt"], 1, "latin.txt: not UTF-8 text (byte 1)"),
        ("good", ["--text", tmp_path / "empty.txt"], 1, "text 'empty': has 0 tokens, at least 2 are needed"),
        ("good", ["--text", f"x={tmp_path / 'none.txt'}"], 1, "none.txt: cannot be read"),
        ("good", [], 2, "neither of --data and --text"),
        ("good", [*tale, "--data", texts], 2, "both of --data and --text"),
        ("good", [*tale, "--batch", 0], 2, "--batch 0: must be at least 1"),
        ("good", ["--data", texts], 1, "no prepared data"),
    ):
        assert run_cli("profile", "report", tmp_path / model, *arguments, "--out", tmp_path / "r.html") == status
        assert message in " ".join(capsys.readouterr().err.split()), (model, message)
        assert not (tmp_path / "r.html").exists()


def test_without_transformers(tmp_path: Path, texts: Path, tokenizer: Tokenizer, monkeypatch: Any, capsys: Any) -> None:
    """Mixtral is read without it; another family says what to install."""
    saved("Mixtral", tmp_path / "mixtral", tokenizer)
    saved("GptOss", tmp_path / "other", tokenizer)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run_cli("profile", "routing", tmp_path / "mixtral", "--text", texts / "a.py") == 0
    assert run_cli("profile", "routing", tmp_path / "other", "--text", texts / "a.py") == 1
    assert "a model of type 'gpt_oss' needs transformers: pip install" in capsys.readouterr().err


def test_ours_with_text(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=1, vocab_size=300, max_seq_len=512)
    moe.save(moe.Transformer(cfg), tmp_path / "ours", tokenizer=tokenizer)
    arguments = ["--text", texts / "a.py", "--seq-len", 400, "--out", tmp_path / "f.json"]
    assert run_cli("profile", "routing", tmp_path / "ours", *arguments) == 0
    assert json.loads((tmp_path / "f.json").read_text())["tokens"] == len(tokenizer.encode(CODE)) - 1


def test_products_are_taken_as_in_training(tmp_path: Path, texts: Path, tokenizer: Tokenizer) -> None:
    """A model that bfloat16 trained is routed in bfloat16, as `moe eval` scores it."""
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=2, vocab_size=300, max_seq_len=64)
    cfg = cfg.with_overrides(["train.dtype=bf16"])
    moe.save(moe.Transformer(cfg), tmp_path / "ours", tokenizer=tokenizer)
    subject = open_subject(tmp_path / "ours")
    windows = text_of_files(subject, [str(texts / "tale.txt")], 500, 64).windows
    log_p = torch.cat(list(log_probabilities(subject, windows, 16).values()))
    lengths = evaluate.byte_lengths(tokenizer)
    scored = [
        evaluate.total(evaluate.evaluate(subject.model, windows, lengths, batch=16, dtype=dtype)).bits  # type: ignore[arg-type]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    bits = -log_p.double().sum().item() / math.log(2)
    assert abs(bits - scored[0]) < abs(bits - scored[1]) / 4
