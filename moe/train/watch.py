"""Notices a run that has gone wrong, and says what to do about it."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from moe.config import RouterConfig, TrainConfig
from moe.errors import TrainError


class Watch:
    """Follows the language-modelling loss (nats per token) from log point to log point.

    A run has diverged when a loss or a gradient is not finite, or when, after the warm-up, the mean loss of three log
    points in a row is above 1.5 times the lowest running average so far plus 1 nat: noise and a change of text move the
    loss by less, and a model that lost what it learned by more.

    A layer's routing has collapsed when, after the warm-up and three log points in a row, a quarter of its experts or
    more have less than a tenth of the mean load. The run goes on, with an alarm.
    """

    FACTOR, MARGIN, PATIENCE, KEEP = 1.5, 1.0, 3, 0.8
    IDLE, IDLE_SHARE = 0.1, 0.25

    def __init__(self, cfg: TrainConfig, router: RouterConfig) -> None:
        self.cfg = cfg
        self.router = router
        self.average = self.lowest = math.inf
        self.high_in_a_row = 0
        self.idle_in_a_row: dict[int, int] = {}  # layer -> log points

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """Raises TrainError where a loss or a gradient norm, summed since the last log point, is not finite."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise TrainError(f"the {name} is {value} at step {step:,}. {self._advice()}")

    def check_weights(self, step: int, weights: Iterable[Tensor]) -> None:
        """Raises TrainError where a weight is not finite: the last step's update may have made it so."""
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise TrainError(f"weights are not finite after step {step:,}. {self._advice()}")

    def check(self, step: int, lm: float) -> None:
        """Takes the mean loss of the steps since the last log point. Raises TrainError when the run has diverged."""
        limit = self.FACTOR * self.lowest + self.MARGIN
        self.high_in_a_row = self.high_in_a_row + 1 if step > self.cfg.warmup and lm > limit else 0
        if self.high_in_a_row == self.PATIENCE:
            raise TrainError(
                f"the loss has exploded: {lm:.2f} nats per token at step {step:,}, it had been down to "
                f"{self.lowest:.2f}. {self._advice()}"
            )
        first = math.isinf(self.average)
        self.average = lm if first else self.KEEP * self.average + (1 - self.KEEP) * lm
        self.lowest = min(self.lowest, self.average)

    def check_load(self, step: int, load: list[list[float]]) -> list[str]:
        """Takes each layer's shares of the routed tokens, [L][E]; returns an alarm for each that has just collapsed."""
        alarms = []
        for layer, shares in enumerate(load):
            idle = sum(share * len(shares) < self.IDLE for share in shares)
            collapsed = step > self.cfg.warmup and idle >= max(1, self.IDLE_SHARE * len(shares))
            self.idle_in_a_row[layer] = self.idle_in_a_row.get(layer, 0) + 1 if collapsed else 0
            if self.idle_in_a_row[layer] == self.PATIENCE:
                alarms.append(
                    f"routing collapse in layer {layer} at step {step:,}: {idle} of {len(shares)} experts have less "
                    f"than {self.IDLE:g} of the mean load. {self._router_advice()}"
                )
        return alarms

    def _advice(self) -> str:
        muon = f" and train.muon_lr (now {self.cfg.muon_lr:g})" if self.cfg.optimizer == "muon" else ""
        return (
            f"Try a lower train.lr (now {self.cfg.lr:g}){muon}, a longer train.warmup (now {self.cfg.warmup}) or a "
            f"smaller train.grad_clip (now {self.cfg.grad_clip:g}), and start again with `resume='never'` or another "
            "`run_dir`"
        )

    def _router_advice(self) -> str:
        return (
            f"Raise router.balance_loss (now {self.router.balance_loss:g}), or set router.bias_update_rate (now "
            f"{self.router.bias_update_rate:g}), to 0.001 for instance"
        )

    def state_dict(self) -> dict[str, Any]:
        """The running averages and counts."""
        names = ("average", "lowest", "high_in_a_row", "idle_in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.average, self.lowest = state["average"], state["lowest"]
        self.high_in_a_row, self.idle_in_a_row = state["high_in_a_row"], dict(state["idle_in_a_row"])
