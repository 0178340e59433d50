"""The planner: what a model costs to train and to serve, from its configuration alone. Pure Python, no torch.

Everything takes a model as a `Config`, a shipped name, or the path of a .toml or of a Hugging Face config.json, and
returns plain counts (`params`) or a `Sheet` of quantities with units and formulas. The article's claims are in
moe.plan.claims, measured steps in moe.plan.calibrate.
"""

from moe.plan.comm import training_traffic
from moe.plan.counts import Params, params, params_sheet
from moe.plan.device import device_memory, device_step_time, device_step_work
from moe.plan.experts import experts_sheet
from moe.plan.flops import TRAINING, attention_flops, dense_flops_per_token, flops_per_token
from moe.plan.hardware import Hardware, load_hardware
from moe.plan.layout import Layout, load_layout
from moe.plan.memory import serving_memory, training_memory
from moe.plan.models import load_shape
from moe.plan.partition import frontier
from moe.plan.quantities import Quantity, Sheet, quantity
from moe.plan.roofline import predict_small_run
from moe.plan.search import fit, redesign
from moe.plan.serving import decode, prefill, serving_price
from moe.plan.shape import Shape
from moe.plan.speculation import speculate
from moe.plan.sweeps import sweep
from moe.plan.train import Efficiency, predict_run, predict_step, train_cost
from moe.plan.work import Work, step_work

__all__ = [
    "TRAINING",
    "Efficiency",
    "Hardware",
    "Layout",
    "Params",
    "Quantity",
    "Shape",
    "Sheet",
    "Work",
    "attention_flops",
    "decode",
    "dense_flops_per_token",
    "device_memory",
    "device_step_time",
    "device_step_work",
    "experts_sheet",
    "fit",
    "flops_per_token",
    "frontier",
    "load_hardware",
    "load_layout",
    "load_shape",
    "params",
    "params_sheet",
    "predict_run",
    "predict_small_run",
    "predict_step",
    "prefill",
    "quantity",
    "redesign",
    "serving_memory",
    "serving_price",
    "speculate",
    "step_work",
    "sweep",
    "train_cost",
    "training_memory",
    "training_traffic",
]
