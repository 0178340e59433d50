"""The length of a run, its batch sizes and its learning rate, all counted in windows of the data. Imports no torch."""

import math

from moe.config import TrainConfig, parse_tokens
from moe.errors import ConfigError

MAX_TOKENS = 2**62  # far beyond all text; sums and quotients of integers stay exact


def ramp(cfg: TrainConfig, seq_len: int) -> list[tuple[int, int]]:
    """(first window, windows a step from there on); of a constant batch one entry."""
    sizes = cfg.ramp() or [(0, cfg.batch_size * seq_len)]
    return [(math.ceil(begin / seq_len), max(1, round(size / seq_len))) for begin, size in sizes]


def micro_batch(cfg: TrainConfig, seq_len: int) -> int:
    """Windows that pass through the model at a time: as set, or a whole batch, the largest of a ramp's."""
    return cfg.micro_batch or max(size for _, size in ramp(cfg, seq_len))


class Schedule:
    """What each step of a run does: a pure function of how many windows are done before it.

    Args:
        cfg: the recipe.
        seq_len: tokens of a window.
        windows_per_pass: windows in one pass of the data, each source its number of epochs.

    Raises:
        ConfigError: a run of less than one window.

    Attributes:
        windows: of the whole run. steps: of the whole run. ramp: (first window, windows a step from there on).
    """

    def __init__(self, cfg: TrainConfig, seq_len: int, windows_per_pass: int) -> None:
        self.cfg, self.seq_len = cfg, seq_len
        self.ramp = ramp(cfg, seq_len)
        if cfg.tokens == "epochs":
            self.windows = windows_per_pass
        elif cfg.tokens:
            self.windows = round(parse_tokens("train.tokens", cfg.tokens) / seq_len)
        else:
            self.windows = self._after_steps(cfg.steps)
        if self.windows * seq_len >= MAX_TOKENS:
            raise ConfigError(
                f"train.steps = {cfg.steps}, train.tokens = {cfg.tokens!r}: make {self.windows * seq_len:.3g} tokens, "
                f"and must be less than {MAX_TOKENS:.3g}"
            )
        if self.windows < 1:
            raise ConfigError(f"train.tokens = {cfg.tokens!r}: is less than one window of {seq_len} tokens")
        self.steps = self._steps()

    @property
    def micro_batch(self) -> int:
        """Windows that pass through the model at a time."""
        return micro_batch(self.cfg, self.seq_len)

    def batch(self, done: int) -> int:
        """Windows of the step that begins after `done`; the last step takes what is left."""
        size = next(size for begin, size in reversed(self.ramp) if begin <= done)
        return min(size, self.windows - done)

    def lr_scale(self, done: int) -> float:
        """The factor on all learning rates for the step after which `done` windows are done.

        A linear warm-up reaches 1 at the end of `warmup` steps of the first batch size. Then "cosine" falls to `min_lr`
        at the last step, as 1/2 (1 + cos) (Loshchilov and Hutter 2017, SGDR, eq. 5); "wsd" holds 1 and falls linearly
        to `min_lr` over the last `decay` of the run (warm-up, stable, decay: Hu et al. 2024, MiniCPM, section 4).
        """
        cfg = self.cfg
        warm = cfg.warmup * self.ramp[0][1]
        if done < warm:
            return done / warm
        begin = warm if cfg.schedule == "cosine" else max(warm, round(self.windows * (1 - cfg.decay)))
        if done <= begin:
            return 1.0
        fallen = min(1.0, (done - begin) / (self.windows - begin))
        if cfg.schedule == "wsd":
            return 1.0 - (1.0 - cfg.min_lr) * fallen
        return cfg.min_lr + (1.0 - cfg.min_lr) * 0.5 * (1.0 + math.cos(math.pi * fallen))

    def _steps(self) -> int:
        """Steps to the end: batch size after batch size, without going through them one by one."""
        done = steps = 0
        ends = [*(begin for begin, _ in self.ramp[1:]), self.windows]
        for (_, size), end in zip(self.ramp, ends, strict=True):
            n = max(0, math.ceil((min(end, self.windows) - done) / size))
            done, steps = done + n * size, steps + n
        return steps

    def _after_steps(self, steps: int) -> int:
        """Windows that `steps` whole steps take."""
        done = 0
        ends = [*(begin for begin, _ in self.ramp[1:]), None]
        for (_, size), end in zip(self.ramp, ends, strict=True):
            n = steps if end is None else min(steps, max(0, math.ceil((end - done) / size)))
            done, steps = done + n * size, steps - n
        return done
