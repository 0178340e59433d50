"""`moe generate`. As in main.py, the command imports what it needs when it runs."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from moe.cli.flags import Flag, Speculative, guesser
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
    speculative: Speculative = "none",
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
    from moe import checkpoint as checkpoints
    from moe.data.chat import ChatTemplate
    from moe.device import pick_device
    from moe.errors import ConfigError, TraceError
    from moe.serve.blocks import blocks_for
    from moe.serve.engine import Engine
    from moe.serve.request import SamplingParams
    from moe.serve.trace import record

    tokenizer = checkpoints.load_tokenizer(checkpoint)
    chats = tokenizer.chat_template is not None
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
        ignore_eos=ignore_eos, stop_token_ids=[ChatTemplate(tokenizer).end_id] if chats and not ignore_eos else [],
    )  # fmt: skip
    where = pick_device(device)
    model, guesses = checkpoints.load(checkpoint, device=where), guesser(speculative, where)
    if chats:
        said = f"this model was taught to answer: `moe chat {checkpoint}` talks with it; here it goes on with your text"
        print(f"notice: {said}", file=sys.stderr)
    ids, context = tokenizer.encode(prompt) or [tokenizer.eot_id], model.cfg.max_seq_len
    if len(ids) > context:
        raise ConfigError(f"prompt of {len(ids)} tokens, but max_seq_len = {context} ({model.cfg.name}): cut it")
    blocks = blocks_for(min(len(ids) + max_tokens, context))
    engine = Engine(model, tokenizer, num_blocks=blocks, max_running=1, speculative=guesses)
    if sys.stdout.isatty():
        write(f"\033[2m{printable(prompt)}\033[0m")
    try:
        with contextlib.nullcontext() if trace is None else record(engine, trace):
            for delta in engine.stream(ids, params):
                write(printable(delta.text))
    except TraceError as error:
        raise ConfigError(str(error)) from error
    write("\n" if sys.stdout.isatty() else "")
    return 0
