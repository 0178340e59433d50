"""The planner: what a model costs, from its configuration alone. Pure Python: nothing here imports torch."""

from moe.plan.params import Params, dense_flops_per_token, flops_per_token, params
from moe.plan.work import Work, step_work

__all__ = ["Params", "Work", "dense_flops_per_token", "flops_per_token", "params", "step_work"]
