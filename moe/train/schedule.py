"""The learning rate over the steps, as a factor of the peak rate. Imports no torch."""

import math

from moe.config import TrainConfig


def lr_scale(step: int, cfg: TrainConfig) -> float:
    """The factor on `lr` (and `muon_lr`) for step `step`, counted from 0.

    A linear warm-up over `warmup` steps reaches 1 at step `warmup - 1`. Then "cosine" falls to `min_lr` at the last
    step, as 1/2 (1 + cos) (Loshchilov and Hutter 2017, SGDR, eq. 5); "wsd" holds 1 and falls linearly to `min_lr` over
    the last `decay` of all steps (warm-up, stable, decay: Hu et al. 2024, MiniCPM, section 4).
    """
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    last = cfg.steps - 1
    begin = cfg.warmup if cfg.schedule == "cosine" else max(cfg.warmup, round(cfg.steps * (1 - cfg.decay)))
    if step < begin:
        return 1.0
    # The step before `begin` still has the full rate, the last one has min_lr.
    fallen = min(1.0, (step - begin + 1) / max(1, last - begin + 1))
    if cfg.schedule == "wsd":
        return 1.0 - (1.0 - cfg.min_lr) * fallen
    return cfg.min_lr + (1.0 - cfg.min_lr) * 0.5 * (1.0 + math.cos(math.pi * fallen))
