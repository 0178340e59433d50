"""`moe chat`: a conversation with a fine-tuned model, on a terminal or through a pipe.

As in main.py, commands import what they need when they run.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from moe.cli.flags import Speculative, guesser
from moe.cli.show import printable, write

if TYPE_CHECKING:
    from moe.chat import Session

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
    speculative: Speculative = "none",
    device: str | None = None,
) -> int:
    """Talk with a model that moe finetune made; without a terminal, each line of the input is a message.

    Args:
        checkpoint: A run of moe finetune (RUN is its RUN/final).
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
    from moe import lora
    from moe.chat import Session
    from moe.device import pick_device
    from moe.errors import ConfigError

    tokenizer = checkpoints.load_tokenizer(checkpoint)
    where = pick_device(device)
    model, guesses = checkpoints.load(checkpoint, device=where), guesser(speculative, where)
    if adapter is not None:
        lora.load_adapter(model, adapter)
        model = lora.merged(model)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    try:
        session = Session(model, tokenizer, system=system, max_tokens=max_tokens, speculative=guesses, **sampling)
        if session.notice and adapter is None:  # an adapter was taught conversations
            print(f"notice: {session.notice}", file=sys.stderr)
        if message is not None:
            _say(session, message)
        else:
            _talk(session)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return 0


def _talk(session: "Session") -> None:
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


def _say(session: "Session", message: str) -> None:
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
