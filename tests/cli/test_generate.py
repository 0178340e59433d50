"""Where `moe generate` stops, and what `moe generate` and `moe chat` say of models that were made for the other."""

from pathlib import Path

import pytest
import tokenizers
import torch

import moe
from moe.chat import Session
from moe.data.chat import ChatTemplate
from moe.tokenizer import IM_END, IM_START, Tokenizer, train_bpe
from tests.conftest import run_cli
from tests.hf.test_mixtral import SMALL


def made(
    place: Path, *, markers: bool = False, template: str | None = None, bias: dict[int, float] | None = None
) -> Path:
    """A checkpoint whose model writes by chance, some ids more often than others."""
    tokenizer = train_bpe(["user assistant hello what is it " * 20], 280)
    if markers:
        backend = tokenizers.Tokenizer.from_str(tokenizer._serialised())
        backend.add_special_tokens([IM_START, IM_END])
        tokenizer = Tokenizer(backend)
    if template is not None:
        tokenizer = tokenizer.with_chat_template(template or ChatTemplate(tokenizer).jinja)
    model = moe.Transformer(SMALL, seed=1)
    with torch.no_grad():
        model.norm.weight.zero_()[0] = 1.0  # type: ignore[index]
        model.embedding.weight[:, 0] = 4.0  # so that the last hidden state is a constant and the head alone decides
        model.head.weight.zero_()
        model.head.weight[tokenizer.vocab_size :, 0] = -9.0
        for token, logit in (bias or {}).items():
            model.head.weight[token, 0] = logit
    moe.save(model, place, tokenizer=tokenizer)
    return place


EOT, END = 279, 281  # of the tokenizer above: its last id, and the marker added after <|im_start|>


def generated(capsys, *args: object) -> tuple[str, str]:
    assert run_cli("generate", *args, "--max-tokens", 60, "--seed", 3) == 0
    return capsys.readouterr()


def test_end_of_text_ends_unless_it_is_ignored(tmp_path: Path, capsys) -> None:
    checkpoint = made(tmp_path / "model", bias={EOT: 1.0})
    short, err = generated(capsys, checkpoint)
    long, _ = generated(capsys, checkpoint, "--ignore-eos")
    assert err == ""
    assert "<|endoftext|>" not in short
    assert long.startswith(short + "<|endoftext|>")
    assert len(long) > len(short) + len("<|endoftext|>")
    stopped, _ = generated(capsys, checkpoint, "--ignore-eos", "--stop", "<|endoftext|>")
    assert stopped == short


def test_a_stop_text_ends_what_end_of_text_does_not(tmp_path: Path, capsys) -> None:
    checkpoint = made(tmp_path / "model")
    whole, _ = generated(capsys, checkpoint)
    stop = whole[10:12]
    assert generated(capsys, checkpoint, "--stop", stop, "--stop", "never there")[0] == whole[: whole.index(stop)]


@pytest.mark.parametrize("markers", [False, True])
def test_generate_says_what_a_chat_model_is_for_and_ends_with_its_turn(markers: bool, tmp_path: Path, capsys) -> None:
    end = END if markers else EOT
    checkpoint = made(tmp_path / "model", markers=markers, template="", bias={end: 1.0})
    text, err = generated(capsys, checkpoint)
    assert err == (
        f"notice: this model was taught to answer: `moe chat {checkpoint}` talks with it; "
        "here it goes on with your text\n"
    )
    name = IM_END if markers else "<|endoftext|>"
    assert name not in text
    assert generated(capsys, checkpoint, "--ignore-eos")[0].startswith(text + name)


@pytest.mark.parametrize(
    ("template", "notice"),
    [
        (None, "notice: this model was not taught to answer (there is no chat template beside it)"),
        ("{{ messages }}", "notice: this model was taught another chat template than ChatML"),
        ("", ""),
    ],
    ids=["base", "another", "ours"],
)
def test_chat_says_when_a_model_was_not_taught_to(template, notice, tmp_path: Path, capsys) -> None:
    checkpoint = made(tmp_path / "model", template=template)
    assert run_cli("chat", checkpoint, "--message", "hello", "--max-tokens", 3) == 0
    out, err = capsys.readouterr()
    assert out
    assert err.startswith(notice)
    assert err.count("\n") == bool(notice)
    if template is None:
        assert "`moe finetune` teaches it" in err


@pytest.mark.parametrize("command", [["generate"], ["chat", "--message", "x"]])
def test_a_model_without_tokenizer_is_one_line(command, tmp_path: Path, capsys) -> None:
    moe.save(moe.Transformer(SMALL), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")  # said before the weights are read
    assert run_cli(command[0], tmp_path / "model", *command[1:]) == 1
    err = capsys.readouterr().err
    assert "has no tokenizer.json: the checkpoint was saved without one; copy there the one that" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [("temperature", -1), ("top-k", -1), ("top-p", 0), ("top-p", 1.5), ("max-tokens", 0), ("max-tokens", -3)],
)
@pytest.mark.parametrize("command", [["generate"], ["chat", "--message", "x"]])
def test_a_setting_out_of_range_is_one_line_in_the_flags_name(command, flag, value, tmp_path: Path, capsys) -> None:
    checkpoint = made(tmp_path / "model", template="")
    assert run_cli(command[0], checkpoint, *command[1:], f"--{flag}", value) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"error: --{flag} = {value}")


def test_the_library_takes_no_unknown_sampling(tmp_path: Path) -> None:
    model, tokenizer = moe.load(made(tmp_path / "model")), moe.load_tokenizer(tmp_path / "model")
    with pytest.raises(TypeError, match="temprature"):
        Session(model, tokenizer, temprature=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="temperature = nan"):
        Session(model, tokenizer, temperature=float("nan"))
    assert Session(model, tokenizer).notice.startswith("this model was not taught")
