"""How many blocks of keys and values an engine has memory for."""

from collections.abc import Sequence

import torch

from moe.device import free_memory
from moe.errors import ConfigError
from moe.model import Transformer
from moe.serve.blocks import blocks_for
from moe.serve.pages import Pages

# Of the memory that is free: on a GPU all but what passes and the allocator's gaps take; on a CPU others need some.
_SHARE = {"cuda": 0.85}
_SHARE_ELSEWHERE = 0.5


def blocks_that_fit(
    models: Sequence[Transformer], block_size: int, max_running: int, device: torch.device, kv_cache_dtype: str
) -> int:
    """Blocks for `max_running` full contexts, or as many as the device has memory for.

    Args:
        models: that is served, and the one that drafts: a block has its keys and values in both.

    Raises:
        ConfigError: one full context does not fit, or a block without tokens.
    """
    if block_size < 1:
        raise ConfigError(f"block_size = {block_size}: must be 1 or more")
    free = free_memory(device)
    if device.type == "cpu":  # where the runner packs the weights, beside those of the model
        free -= sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    room = int(free * _SHARE.get(device.type, _SHARE_ELSEWHERE))
    each = sum(Pages.block_bytes(m.cfg, block_size, m.embedding.weight.dtype, kv_cache_dtype) for m in models)
    context = models[0].cfg.max_seq_len
    needed = blocks_for(context, block_size)
    if room < needed * each:
        raise ConfigError(
            f"num_blocks = None: keys and values of {context} tokens, the context of {models[0].cfg.name}, take "
            f"{needed * each / 1e9:.3g} GB, and {max(0, room) / 1e9:.3g} GB of {device} are free for them; set "
            'num_blocks, for shorter requests, or kv_cache_dtype = "int8"'
        )
    return min(max_running * needed, room // each)
