"""`moe chat`: a conversation with a fine-tuned model, on a terminal or through a pipe.

As in cli.py, commands import what they need when they run.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from moe.cli_output import printable, write

if TYPE_CHECKING:
    from moe.model import Transformer
    from moe.tokenizer import Tokenizer

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops a reply"


def chat(
    checkpoint: Positional[Path],
    /,
    message: str | None = None,
    system: str = "",
    adapter: Path | None = None,
    max_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    device: str | None = None,
) -> int:
    """Talk with a model that moe finetune made; without a terminal, each line of the input is a message.

    Args:
        checkpoint: What moe finetune leaves in RUN/final.
        message: Answer this one message and end.
        system: What the model is told before the conversation.
        adapter: RUN/adapter.safetensors of a LoRA fine-tune, put on top of the checkpoint that it was given.
        max_tokens: The most tokens of a reply.
        temperature: 0 always takes the likeliest token.
        top_k: Draw from the likeliest K tokens; 0 from all.
        top_p: Draw from the likeliest tokens that together reach this probability; 1 from all.
        seed: Of the draws.
        device: cuda or cpu. Default: cuda where there is one.
    """
    from moe import checkpoint as checkpoints
    from moe.config import ConfigError
    from moe.train import lora
    from moe.train.device import pick_device

    tokenizer = checkpoints.load_tokenizer(checkpoint)
    model = checkpoints.load(checkpoint, device=pick_device(device))
    if adapter is not None:
        lora.load_adapter(model, adapter)
        model = lora.merged(model)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    try:
        session = Session(model, tokenizer, system, max_tokens, seed, sampling)
        if message is not None:
            _say(session, message)
        else:
            _talk(session)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return 0


class Session:
    """One conversation: what was said, and the next reply.

    Args:
        sampling: temperature, top_k, top_p of `moe.model.stream`.
    """

    def __init__(
        self,
        model: "Transformer",
        tokenizer: "Tokenizer",
        system: str,
        max_tokens: int,
        seed: int,
        sampling: dict[str, Any],
    ) -> None:
        from moe.data.chat import ChatTemplate

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
        import torch

        from moe.model import stream
        from moe.streaming import TextStream

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
                    f"{room:,} beside the reply: shorten it, or lower --max-tokens"
                )
            del self.turns[:2]
            self.forgotten += 2


def _talk(session: Session) -> None:
    """Messages from stdin until it ends."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print(HELP)
    while True:
        if terminal:
            write("\n> ")
        line = sys.stdin.readline()
        if not line:
            return
        message = line.strip()
        if message == "/exit":
            return
        if message == "/reset":
            session.reset()
        elif message.startswith("/"):
            print(f"no such command as {message.split()[0]}: {HELP}", file=sys.stderr)
        elif message:
            try:
                _say(session, message)
            except ValueError as error:
                if not terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)


def _say(session: Session, message: str) -> None:
    forgotten = session.forgotten
    reply = session.reply(message)
    try:
        for piece in reply:
            if session.forgotten > forgotten:
                print(f"the context is full: {session.forgotten} messages are forgotten", file=sys.stderr)
                forgotten = session.forgotten
            write(printable(piece))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        reply.close()  # type: ignore[attr-defined]
    write("\n")
