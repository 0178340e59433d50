"""The planner: what a model costs, from its configuration alone. Pure Python: nothing here imports torch."""

from moe.plan.params import Params, attention_flops, dense_flops_per_token, flops_per_token, params, params_sheet
from moe.plan.shape import Shape, load_shape

__all__ = [
    "Params",
    "Shape",
    "attention_flops",
    "dense_flops_per_token",
    "flops_per_token",
    "load_shape",
    "params",
    "params_sheet",
]
