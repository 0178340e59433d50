"""A tokenizer as transformers reads it: `tokenizer.json`, its settings with the chat template, and where to stop."""

import json
from pathlib import Path
from typing import Any

from moe.checkpoint import CHAT_TEMPLATE_FILE, TOKENIZER_FILE
from moe.data.chat import ChatTemplate
from moe.errors import HFError
from moe.tokenizer import Tokenizer

CONFIG_FILE, GENERATION_FILE = "tokenizer_config.json", "generation_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, CHAT_TEMPLATE_FILE, CONFIG_FILE, GENERATION_FILE)


def end_id(tokenizer: Tokenizer) -> int:
    """What a model writes when it is done: the end of its turn if it was taught conversations, else of the text."""
    template = ChatTemplate(tokenizer)
    return template.end_id if tokenizer.chat_template == template.jinja else tokenizer.eot_id


def content_of(tokenizer: Tokenizer) -> str:
    """A `tokenizer.json` that encodes text as this tokenizer does.

    Raises:
        HFError: GPT-4's own tokenizer, whose ranks come with a package.
    """
    backend = tokenizer._backend  # what encodes, which may be less than the file it came from
    if not hasattr(backend, "to_str"):
        raise HFError(
            f"tokenizer {tokenizer.name} is stored by name only, which Hugging Face's libraries do not read: "
            "leave tokenizer out and pair the model with a Hugging Face copy of that tokenizer"
        )
    return backend.to_str()


def write_tokenizer(directory: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Writes the files that `AutoTokenizer` and `generate` read. Raises HFError as `content_of` does."""
    (directory / TOKENIZER_FILE).write_text(content_of(tokenizer), encoding="utf-8")
    end = end_id(tokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token_bytes(end).decode(),
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    ends = sorted({end, tokenizer.eot_id})
    generation = {"eos_token_id": ends if len(ends) > 1 else end}
    for name, content in ((CONFIG_FILE, settings), (GENERATION_FILE, generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
