"""Exported tokenizers and chat templates, as transformers' own AutoTokenizer reads and renders them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import moe
from moe import hf
from moe.data.chat import ChatTemplate
from moe.errors import CheckpointError
from moe.tokenizer import IM_END, IM_START, Tokenizer, train_bpe
from tests.hf.test_mixtral import SMALL

transformers = pytest.importorskip("transformers")

SYSTEM = {"role": "system", "content": "You are brief."}
USER = {"role": "user", "content": "Is 12345 naïve?"}
ASSISTANT = {"role": "assistant", "content": "It is.\n\n  Or not; \t 日本 "}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, {"role": "user", "content": "It's {{ 'x' }} {% if %} \\n \"q\""}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
]


@pytest.fixture(scope="module", params=["endoftext", "markers"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Our own, where one marker serves for both ends of a turn, and one that has both of ChatML's."""
    plain = train_bpe(["to be or not to be, that is the question. user assistant system\n"] * 3, 280)
    if request.param == "markers":
        backend = tokenizers.Tokenizer.from_str(plain._serialised())
        backend.add_special_tokens([IM_START, IM_END])
        plain = Tokenizer(backend)
    return plain.with_chat_template(ChatTemplate(plain).jinja)


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export") / "hf"
    hf.save(moe.Transformer(SMALL), place, tokenizer=tokenizer)
    return place


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_what_the_model_was_taught(tokenizer, exported, messages, prompt) -> None:
    theirs, template = transformers.AutoTokenizer.from_pretrained(exported), ChatTemplate(tokenizer)
    ids = template.prompt(messages) if prompt else template.encode(messages).ids
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == tokenizer.decode(ids)
    found = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert found == ids


def test_an_unknown_role_is_refused(exported) -> None:
    theirs: Any = transformers.AutoTokenizer.from_pretrained(exported)
    with pytest.raises(Exception, match="unknown role tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_tokenizer_encodes_the_same_and_generation_stops_at_a_turn(tokenizer, exported) -> None:
    theirs: Any = transformers.AutoTokenizer.from_pretrained(exported)
    for text in ("to be, naïve 12345\n", " leading", "\r\n\r\n \t", "日本🙂", "It's"):
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    template = ChatTemplate(tokenizer)
    assert theirs.eos_token_id == template.end_id
    assert transformers.AutoConfig.from_pretrained(exported).eos_token_id == template.end_id
    ends = transformers.GenerationConfig.from_pretrained(exported).eos_token_id
    assert {*(ends if isinstance(ends, list) else [ends])} == {template.end_id, tokenizer.eot_id}
    assert json.loads((exported / "tokenizer_config.json").read_text())["chat_template"] == template.jinja


def test_a_chat_template_goes_round(tokenizer, exported, tmp_path: Path) -> None:
    read = moe.load_tokenizer(exported)
    assert read.chat_template == tokenizer.chat_template
    assert read.fingerprint == tokenizer.fingerprint
    moe.save(moe.Transformer(SMALL), tmp_path / "ours", tokenizer=read)
    assert (tmp_path / "ours" / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert moe.load_tokenizer(tmp_path / "ours").chat_template == tokenizer.chat_template
    moe.save(moe.Transformer(SMALL), tmp_path / "ours", tokenizer=read.with_chat_template(None))
    assert moe.load_tokenizer(tmp_path / "ours").chat_template is None
    again = pickle.loads(pickle.dumps(read))
    assert (again.chat_template, again.encode("to be")) == (read.chat_template, read.encode("to be"))
    # as transformers saves them: a file of its own
    transformers.AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "theirs")
    assert moe.load_tokenizer(tmp_path / "theirs").chat_template == tokenizer.chat_template


def test_a_base_model_has_no_chat_template(tmp_path: Path) -> None:
    tokenizer = train_bpe(["to be or not to be"] * 3, 260)
    hf.save(moe.Transformer(SMALL), tmp_path / "hf", tokenizer=tokenizer)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template is None
    assert theirs.eos_token_id == tokenizer.eot_id
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.eot_id


def test_of_several_templates_the_default_is_taken_and_a_broken_one_named(tokenizer, exported, tmp_path) -> None:
    hf.save(moe.Transformer(SMALL), tmp_path / "hf", tokenizer=tokenizer)
    file = tmp_path / "hf" / "tokenizer_config.json"
    file.write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]})
    )
    assert moe.load_tokenizer(tmp_path / "hf").chat_template == "b"
    for text in ("[1]", "{"):
        file.write_text(text)
        with pytest.raises(CheckpointError, match="chat template cannot be read"):
            moe.load_tokenizer(tmp_path / "hf")
