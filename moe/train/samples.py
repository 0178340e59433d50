"""What the samples of a run begin with: held-out text of its own data, which the model has not seen."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from moe.data import ChatTemplate, ConversationData, TokenData, TokenStream
from moe.evaluate import PROMPTS, REQUESTS
from moe.tokenizer import Tokenizer

TOKENS = 16  # of a document's beginning
MAX_REQUEST = 200  # tokens of a message; a longer one leaves no room for the answer
LOOKED_AT = 20  # documents of a source, in search of a prompt
# Sources of the data that are prepared without naming any; PROMPTS and REQUESTS are in their style.
DEFAULT_SOURCES, DEFAULT_TALK = {"text", "code"}, {"code", "talk"}


def prompts(data: TokenData | ConversationData, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Beginnings of held-out documents, and that of any document; of conversations, their first messages.

    As many as there are `PROMPTS` or `REQUESTS`, from one source after the other; these themselves where nothing is
    held out, and for the default data.
    """
    if isinstance(data, ConversationData):
        if set(data.sources) <= DEFAULT_TALK:
            return REQUESTS
        return _chosen([_messages(data, s, tokenizer) for s in data.sources], len(REQUESTS)) or REQUESTS
    if set(data.sources) == DEFAULT_SOURCES:
        return PROMPTS
    chosen = _chosen([_beginnings(data, s, tokenizer) for s in data.sources], len(PROMPTS) - 1)
    return (*chosen, "") if chosen else PROMPTS


def _chosen(of_sources: list[Iterator[str]], wanted: int) -> tuple[str, ...]:
    """So many of them, the first of each source before the second of any."""
    rows = [list(islice(texts, wanted)) for texts in of_sources]
    return tuple([row[i] for i in range(wanted) for row in rows if i < len(row)][:wanted])


def _beginnings(data: TokenData, source: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The first tokens of a source's held-out documents, of a short one the first half."""
    stream = data.tokens(source, "val")
    begin, seen = 0, 0
    while begin < len(stream) and seen < LOOKED_AT:
        ids = np.asarray(stream[begin : begin + 2 * TOKENS + 1])
        ends = np.flatnonzero(ids == data.eot_id)
        size = int(ends[0]) if len(ends) else len(ids)
        text = tokenizer.decode(ids[: min(TOKENS, (size + 1) // 2)].tolist()).rstrip("\ufffd")
        if text.strip():
            yield text
        begin, seen = _next_document(stream, begin, data.eot_id), seen + 1


def _next_document(stream: TokenStream, begin: int, eot_id: int) -> int:
    for at in range(begin, len(stream), 65_536):
        ends = np.flatnonzero(np.asarray(stream[at : at + 65_536]) == eot_id)
        if len(ends):
            return at + int(ends[0]) + 1
    return len(stream)


def _messages(data: ConversationData, source: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The first message of a user in each of a source's held-out conversations."""
    template, table = ChatTemplate(tokenizer), data.table(source, "val")
    for begin, size in zip(table.offsets[:LOOKED_AT].tolist(), table.n_tokens[:LOOKED_AT].tolist(), strict=True):
        ids = (np.asarray(data.values(source, "val")[begin : begin + size]) >> 1).tolist()
        text = next((text for role, text in _turns(ids, template, tokenizer) if role == "user"), "")
        if text.strip():
            yield text


def _turns(ids: list[int], template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(role, content) of each message that is not too long: a start marker, the role, a line feed, the content, an end
    marker. With one marker for both, every other one begins a message."""
    end = -1
    while template.start_id in ids[end + 1 :]:
        begin = ids.index(template.start_id, end + 1)
        if template.end_id not in ids[begin + 1 :]:
            return
        end = ids.index(template.end_id, begin + 1)
        if end - begin <= MAX_REQUEST:
            role, _, content = tokenizer.decode(ids[begin + 1 : end]).partition("\n")
            yield role, content
