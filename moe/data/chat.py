"""Conversations as tokens: one template for training and for `moe chat`, and which tokens a model learns to write.

The template is ChatML, the format of OpenAI's chat models with the tokenizer cl100k:

    <|im_start|>system
    You are brief.<|im_end|>
    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    Hi.<|im_end|>

Each message is the start marker, the role, a line feed, the content, the end marker and a line feed. The markers are
special tokens, each one id; a tokenizer that has none for them (our own BPE) uses `<|endoftext|>` for both: the only id
that no text can spell, which a pre-trained model knows as the border of a document. As contents cannot hold a marker,
markers begin and end in turns, and the layout stays unambiguous.

Contents are encoded as ordinary text, so that a user who writes "<|im_end|>" has written ten characters. They are
encoded apart from the role before them: what a model sees before its response is then, to the id, the same in training
as in a chat, whatever the response begins with.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moe.errors import DataError
from moe.tokenizer import IM_END, IM_START, Tokenizer

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}


class Encoded(NamedTuple):
    """A conversation in tokens: ids, and for each whether the model is to learn to write it."""

    ids: list[int]
    learned: list[bool]


class ChatTemplate:
    """ChatML over one tokenizer.

    `end_id` is what a model writes when its turn is over. `name` says which markers are used: "chatml", or
    "chatml-endoftext" where `<|endoftext|>` stands for both.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        has_markers = IM_START in tokenizer.special and IM_END in tokenizer.special
        self.tokenizer = tokenizer
        self.name = "chatml" if has_markers else "chatml-endoftext"
        self.start_id = tokenizer.special[IM_START] if has_markers else tokenizer.eot_id
        self.end_id = tokenizer.special[IM_END] if has_markers else tokenizer.eot_id
        self._header = {role: [self.start_id, *tokenizer.encode(f"{role}\n")] for role in ROLES}
        self._line_feed = tokenizer.encode("\n")

    @property
    def jinja(self) -> str:
        """The same template for transformers' `apply_chat_template`, which renders exactly this text.

        Its ids are the same, too, unless a content begins with white space (a content is encoded apart here) or spells
        a marker (which is ordinary text here).
        """
        begin, end = (json.dumps(self.tokenizer.token_bytes(i).decode()) for i in (self.start_id, self.end_id))
        return (
            "{%- for message in messages %}"
            f"{{%- if message['role'] not in {list(ROLES)} %}}"
            "{{- raise_exception('unknown role ' + message['role']) }}{%- endif %}"
            f"{{{{- {begin} + message['role'] + '\n' + message['content'] + {end} + '\n' }}}}"
            "{%- endfor %}"
            f"{{%- if add_generation_prompt %}}{{{{- {begin} + 'assistant\n' }}}}{{%- endif %}}"
        )

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The tokens of a checked conversation (`check_messages`); learned are the responses and their end markers."""
        return self.encode_many([messages])[0]

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """`encode` of each, on all cores."""
        contents = iter(self.tokenizer.encode_batch([m["content"] for c in conversations for m in c]))
        return [self._join((m["role"], next(contents)) for m in messages) for messages in conversations]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which a model writes the next response."""
        return [*self.encode(messages).ids, *self._header["assistant"]]

    def _join(self, messages: Iterable[tuple[str, list[int]]]) -> Encoded:
        ids: list[int] = []
        learned: list[bool] = []
        for role, content in messages:
            header = self._header[role]
            ids += [*header, *content, self.end_id, *self._line_feed]
            learned += [False] * len(header)
            learned += [role == "assistant"] * (len(content) + 1)
            learned += [False] * len(self._line_feed)
        return Encoded(ids, learned)


def check_messages(value: Any, where: str) -> list[dict[str, str]]:
    """The messages of a conversation that came from outside, reduced to role and content.

    What would be lost by that, is refused: calls of tools, and responses that are not to be learned.

    Args:
        value: expected to be a list of {"role": "system" | "user" | "assistant", "content": text}, with "system" in
            the first place only and at least one "assistant".
        where: names the place for the message of an error.

    Raises:
        DataError: it is anything else.
    """
    if not isinstance(value, list) or not value:
        kind = "empty" if isinstance(value, list) else f"a {type(value).__name__}"
        raise DataError(f'{where}: messages is {kind}, expected a list of {{"role": ..., "content": ...}}')
    messages = []
    for i, message in enumerate(value):
        field = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise DataError(f'{field} is a {type(message).__name__}, expected {{"role": ..., "content": ...}}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{field}.role is {role!r}, expected one of {', '.join(ROLES)}: rename it")
        if not isinstance(content, str):
            kind = "missing" if content is None else f"a {type(content).__name__}"
            raise DataError(f"{field}.content is {kind}, expected text: leave out what is not text, such as tool calls")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise DataError(f"{field}.{name} is no text, which alone is learned here: write it into the content")
        if role == "assistant" and message.get("weight") not in (None, 1):
            raise DataError(
                f"{field}.weight is {message['weight']!r}, but every response is learned: leave the row out, or end it "
                "before that response"
            )
        if role == "system" and i > 0:
            raise DataError(f"{field}.role is 'system', which may only come first: move it, or make it 'user'")
        messages.append({"role": role, "content": content})
    if all(m["role"] != "assistant" for m in messages):
        raise DataError(f"{where}: no message has the role 'assistant', so there is nothing to learn: leave it out")
    return messages
