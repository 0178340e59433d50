"""Generation from tensors: a batch of prompts, their next tokens one after the other, by the engine of moe/serve.

`Transformer.generate` is the simple oracle of it: greedily both give the same tokens.

Shape suffixes: B batch, S sequence.
"""

from collections import deque
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from moe.errors import ServeError
from moe.model import Ends, Transformer, check_sampling
from moe.serve.blocks import blocks_for
from moe.serve.engine import Engine
from moe.serve.output import Delta
from moe.serve.request import SamplingParams

_ROWS = 2**64 // 5 * 3 + 1  # an odd number: what one row's random numbers come from is far from the next one's


def stream(
    model: Transformer,
    prompt_BS: Tensor,
    max_new_tokens: int,
    *,
    mask_BS: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 [B], `max_new_tokens` times, or until the context is full or every
    sequence has ended.

    Args:
        prompt_BS: int64 ids, at least one token each.
        mask_BS: False, or 0, at padding, on either side, where prompts are not equally long.
        temperature: 0 for greedy. top_k: 0 for all. top_p: in (0, 1], 1 for all.
        seed: of the draws. The first sequence's are those of a request to the engine with this seed.
        eos_id: the id that ends a sequence, such as `tokenizer.eot_id`, or several of them. A sequence that has ended
            repeats it while others go on. None: none ends.

    Raises:
        ValueError: an empty or over-long prompt, or a sampling setting out of range.
        ServeError: the model's pass failed.
    """
    check_sampling(prompt_BS, temperature, top_k, top_p, mask_BS, max_new_tokens)
    ends = Ends(eos_id, model.cfg.vocab_size).ids
    prompts = _prompts(prompt_BS, mask_BS)
    B, longest, context = len(prompts), max(map(len, prompts), default=0), model.cfg.max_seq_len
    if longest > context:
        raise ValueError(
            f"sequence of {longest} tokens, but max_seq_len = {context} ({model.cfg.name}); "
            "cut the input or use a configuration with a longer context"
        )
    # What is predicted from a full context is the last token: of the longest sequence, and then of all.
    n = min(max_new_tokens, context - longest + 1)
    weight = model.embedding.weight
    device = prompt_BS.device if weight.is_meta else weight.device  # meta: accelerate brings the weights when called
    if not B or not n:
        yield from [prompt_BS.new_empty(B, device=device)] * (max_new_tokens if not B else 0)
        return
    engine = Engine(
        model,
        num_blocks=sum(blocks_for(min(len(p) + n - 1, context)) for p in prompts),
        max_running=B,
        max_batch_tokens=max(2048, B),
        prefix_cache=False,
        device=device,
    )
    rows: list[deque[int]] = [deque() for _ in prompts]
    ended = [False] * B

    def listener(row: int, delta: Delta) -> None:
        rows[row] += delta.token_ids
        ended[row] |= delta.finish_reason is not None
        if delta.output is not None and delta.output.error is not None:
            raise ServeError(str(delta.output.error)) from delta.output.error

    for row, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=(seed + row * _ROWS) % 2**64,
            stop_token_ids=ends,
        )  # fmt: skip
        engine.add(prompt, params, listener=lambda delta, row=row: listener(row, delta))
    last = [0] * B
    for _ in range(n):
        while not all(new or done for new, done in zip(rows, ended, strict=True)):
            engine.step()
        if not any(rows):
            return
        last = [new.popleft() if new else token for new, token in zip(rows, last, strict=True)]
        yield torch.tensor(last, device=device)


def _prompts(prompt_BS: Tensor, mask_BS: Tensor | None) -> list[list[int]]:
    """The ids of each prompt without its padding."""
    if mask_BS is None:
        return prompt_BS.tolist()
    masks = mask_BS.to(prompt_BS.device).bool()
    return [row[mask].tolist() for row, mask in zip(prompt_BS, masks, strict=True)]
