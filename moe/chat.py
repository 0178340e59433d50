"""A conversation with a fine-tuned model: what was said, what the context has room for, and the next reply."""

from collections.abc import Iterator
from dataclasses import replace

from moe.data.chat import ChatTemplate
from moe.model import Transformer
from moe.serve.blocks import blocks_for
from moe.serve.detokenize import TextStream
from moe.serve.engine import Engine
from moe.serve.request import SamplingParams
from moe.tokenizer import Tokenizer


class Session:
    """One conversation: what was said, and the next reply.

    `notice` says why the model may not be one to talk with; empty where it was taught this template. `engine` answers,
    with room for one context: of a conversation that goes on, only what is new is computed. It is made of the model's
    weights as they are.

    Args:
        system: what the model is told before the conversation.
        max_tokens: the most tokens of a reply.
        temperature, top_k, top_p: of `moe.serve.SamplingParams`. seed: of the draws.
        speculative: who guesses tokens, as `moe.serve.Engine` takes it.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        system: str = "",
        max_tokens: int = 512,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
        speculative: Transformer | str | None = None,
    ) -> None:
        self.params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_token_ids=tokenizer.special.values(),  # the end of the turn, or a marker that has no place in it
        )
        self.model, self.tokenizer, self.template = model, tokenizer, ChatTemplate(tokenizer)
        self.max_tokens, self.seed = max_tokens, seed
        blocks = blocks_for(model.cfg.max_seq_len)
        self.engine = Engine(model, num_blocks=blocks, max_running=1, speculative=speculative)
        self.notice = _notice(tokenizer, self.template)
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        self.forgotten = 0  # messages that the context had no room for any more

    def reset(self) -> None:
        """Forgets what was said, except the system message."""
        self.turns, self.forgotten = [], 0

    def reply(self, message: str) -> Iterator[str]:
        """Takes a message; yields the reply in pieces. A reply that is cut short counts as far as it came.

        Raises:
            ValueError: the message leaves no room for a reply, or a sampling setting is out of range.
        """
        self.turns.append({"role": "user", "content": message})
        try:
            ids = self._fit()
        except ValueError:
            self.turns.pop()
            raise
        text, said = TextStream(self.tokenizer, ends=self.params.stop_token_ids), ""
        params = replace(self.params, seed=self.seed + len(self.turns) // 2)
        try:
            for delta in self.engine.stream(ids, params):
                piece = "".join(map(text.push, delta.token_ids))
                said += piece
                yield piece
            rest = text.finish()
            said += rest
            yield rest
        finally:
            self.turns.append({"role": "assistant", "content": said})

    def _fit(self) -> list[int]:
        """The ids of the prompt; the oldest turns are dropped until a quarter of the context is left for the reply."""
        limit = self.model.cfg.max_seq_len
        room = limit - min(self.max_tokens, limit // 4)
        while True:
            ids = self.template.prompt([*self.system, *self.turns])
            if len(ids) <= room:
                return ids
            if len(self.turns) == 1:
                raise ValueError(
                    f"the message makes a prompt of {len(ids):,} tokens, and the model's context of {limit:,} leaves "
                    f"{room:,} beside the reply: shorten it, or lower `max_tokens`"
                )
            del self.turns[:2]
            self.forgotten += 2


def _notice(tokenizer: Tokenizer, template: ChatTemplate) -> str:
    if tokenizer.chat_template is None:
        return (
            "this model was not taught to answer (there is no chat template beside it), so it goes on with the text as "
            "with any document; `moe finetune` teaches it on conversations"
        )
    if tokenizer.chat_template != template.jinja:
        return "this model was taught another chat template than ChatML, which is used here; its replies may be poor"
    return ""
