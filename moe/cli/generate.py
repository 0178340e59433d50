"""`moe generate`. As in main.py, the command imports what it needs when it runs."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from moe.cli.flags import Flag
from moe.cli.show import printable, write


def generate(
    checkpoint: Positional[Path],
    /,
    prompt: str = "",
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = (),
    ignore_eos: Flag = False,
    trace: Path | None = None,
    device: str | None = None,
) -> int:
    """Continue a prompt, token by token.

    Args:
        checkpoint: A run of moe train (RUN is its RUN/final), or any checkpoint of this program.
        prompt: The text to continue; empty begins a document.
        max_tokens: The most tokens to generate; the model may end the text, or the context be full, before.
        temperature: 0 always takes the likeliest token.
        top_k: Draw from the likeliest K tokens; 0 from all.
        top_p: Draw from the likeliest tokens that together reach this probability; 1 from all.
        seed: Of the draws.
        stop: A string that ends the text and is not printed; may be given again.
        ignore_eos: Go on after end-of-text, with the next document that the model makes up.
        trace: Record the routing of the prompt and of every generated token here, for moe profile.
        device: cuda or cpu. Default: cuda where there is one.
    """
    import torch

    from moe import checkpoint as checkpoints
    from moe.data.chat import ChatTemplate
    from moe.device import pick_device
    from moe.errors import ConfigError
    from moe.generate import TextStream, stream
    from moe.profile import record

    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens}: must be 1 or more")
    where = pick_device(device)
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    model = checkpoints.load(checkpoint, device=where)
    ends = [] if ignore_eos else [tokenizer.eot_id]
    if tokenizer.chat_template is not None:
        ends += [] if ignore_eos else [ChatTemplate(tokenizer).end_id]
        said = f"this model was taught to answer: `moe chat {checkpoint}` talks with it; here it goes on with your text"
        print(f"notice: {said}", file=sys.stderr)
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if sys.stdout.isatty():
        write(f"\033[2m{printable(prompt)}\033[0m")
    try:
        text = TextStream(tokenizer, stop, ends)
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        with contextlib.nullcontext() if trace is None else record(model, trace):
            for next_1 in stream(model, torch.tensor([ids], device=where), max_tokens, eos_id=ends, **sampling):
                write(printable(text.push(int(next_1))))
                if text.done:
                    break
    except ValueError as error:
        raise ConfigError(str(error)) from error
    write(printable(text.finish()) + ("\n" if sys.stdout.isatty() else ""))
    return 0
