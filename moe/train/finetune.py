"""The recipe of an instruction fine-tune: a checkpoint's shape with settings for a short run on conversations."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from moe.checkpoint import load_config_of
from moe.config import Config, TrainConfig
from moe.data import ConversationData
from moe.errors import ConfigError
from moe.train.start import open_stream

SEQ_LEN = 512
BATCH_SIZE = 16
# Customary for replicas of this size, not searched for. Adapters begin at zero and want a higher rate.
LR, LORA_LR = 1e-3, 3e-3
EVAL_TOKENS = 16_384
MAX_EPOCHS = 1_000_000


def recipe(
    checkpoint: str | Path, data: ConversationData, *, epochs: float, lora: bool, overrides: Iterable[str] = ()
) -> Config:
    """The configuration for `moe.train.train(cfg, data.path, run_dir, start_from=checkpoint)`.

    AdamW without weight decay, a twentieth of the steps to warm up, then a cosine to a tenth of the rate; attention
    stays inside each conversation.

    Args:
        checkpoint: of the model to be fine-tuned.
        epochs: passes over the conversations; `train.steps` or `train.tokens` among the overrides take their place.
        lora: whether the rate is for adapters, which start at zero, or for all weights.
        overrides: key=value, such as train.lr=1e-4.

    Raises:
        ConfigError: an override that cannot be, or epochs that are not above 0.
        DataError: a window too short for the conversations.
    """
    if not 0 < epochs <= MAX_EPOCHS:
        raise ConfigError(f"epochs = {epochs}: must be greater than 0, and at most {MAX_EPOCHS:,}; 2 or 3 are common")
    base = load_config_of(checkpoint)
    train = TrainConfig(
        seq_len=min(SEQ_LEN, base.max_seq_len),
        batch_size=BATCH_SIZE,
        lr=LORA_LR if lora else LR,
        weight_decay=0.0,
        document_mask=True,
        eval_tokens=EVAL_TOKENS,
        seed=base.train.seed,
    )
    overrides = list(overrides)
    cfg = dataclasses.replace(base, name=f"{base.name}-chat", train=train).with_overrides(overrides)
    set_already = {assignment.partition("=")[0].strip() for assignment in overrides}
    steps = cfg.train.steps
    if not set_already & {"train.steps", "train.tokens"}:
        windows = open_stream(cfg, data).windows_per_epoch
        steps = max(1, math.ceil(epochs * windows / cfg.train.batch_size))
    derived = {
        "steps": steps,
        "warmup": math.ceil(steps / 20),
        "eval_every": max(1, steps // 5),
        "save_every": max(1, steps // 2),
        "sample_every": max(1, steps // 2),
    }
    derived = {name: value for name, value in derived.items() if f"train.{name}" not in set_already}
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **derived))
