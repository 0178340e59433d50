"""A conversation with a fine-tuned model: what was said, what the context has room for, and the next reply."""

from collections.abc import Iterator
from typing import Any

import torch

from moe.data.chat import ChatTemplate
from moe.generate import TextStream, stream
from moe.model import Transformer
from moe.tokenizer import Tokenizer


class Session:
    """One conversation: what was said, and the next reply.

    Args:
        sampling: temperature, top_k, top_p of `moe.generate.stream`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        system: str,
        max_tokens: int,
        seed: int,
        sampling: dict[str, Any],
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens = {max_tokens}: must be 1 or more")
        self.model, self.tokenizer, self.template = model, tokenizer, ChatTemplate(tokenizer)
        self.max_tokens, self.seed, self.sampling = max_tokens, seed, sampling
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
        text, said = TextStream(self.tokenizer), ""
        prompt_1S = torch.tensor([ids], device=self.model.embedding.weight.device)
        special = set(self.tokenizer.special.values())
        seed = self.seed + len(self.turns) // 2
        try:
            for next_1 in stream(self.model, prompt_1S, self.max_tokens, seed=seed, **self.sampling):
                if int(next_1) in special:  # the end of the turn, or a marker that has no place in it
                    break
                piece = text.push(int(next_1))
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
