"""Training: FLOPs, days and dollars from a given utilisation, or a step's time predicted from two constants.

The constants, the share of peak that large matrix products reach and the bus bandwidth of tensor-parallel all-reduces,
are fitted on the 22B and 175B runs of Korthikanti et al. 2022 (arXiv:2205.05198, table 5); the same table's 530B and 1T
runs test them.
"""

from dataclasses import dataclass

from moe.plan.bounds import MANY, amount, real, share, whole
from moe.plan.comm import training_traffic
from moe.plan.flops import TRAINING, attention_flops, flops_per_token, routed_flops
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.models import Model, load_shape
from moe.plan.quantities import Quantity, Sheet, assumed, given, quantity


@dataclass(frozen=True)
class Efficiency:
    """What hardware gives in practice. `gemm`: of peak FLOP/s; `bus`: of tensor-parallel all-reduces; `memory`: of
    bandwidth; `expert_imbalance`: the busiest expert group's load over the mean, at least 1."""

    gemm: float = 0.735
    bus: str = "80 GB/s"
    memory: float = 0.76
    expert_imbalance: float = 1.0

    def __post_init__(self) -> None:
        share(gemm=self.gemm, memory=self.memory)
        real(1, 1e6, "is max over mean:", expert_imbalance=self.expert_imbalance)
        given(self.bus, "GB/s", "bus")

    def quantity(self, name: str) -> Quantity:
        """One of them, as an assumption."""
        why = {
            "gemm": "fitted on published 22B and 175B runs (arXiv:2205.05198)",
            "bus": "fitted on published 22B and 175B runs (arXiv:2205.05198)",
            "memory": "FasterTransformer's 13B on an A100: 16.8 ms of reading in 22.0 ms",
            "expert_imbalance": "1 is perfect balance",
        }
        return assumed(quantity(getattr(self, name)), f"efficiency.{name}", note=why[name])


def bubble(layout: Layout, micro_batches: int) -> float:
    """Share of a step in which a stage waits: (p - 1) / (v m + p - 1) for GPipe and 1F1B (Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2). Zero-bubble schedules (Qi et al. 2024, arXiv:2401.10241) fill it with the weights'
    gradients: with the ZB-H1 memory of 1F1B a third remains."""
    p, v = layout.pp, layout.interleave
    waiting = (p - 1) / (3 if layout.schedule == "zero-bubble" else 1)
    return waiting / (v * micro_batches + waiting)


def train_flops(model: Model, tokens: Quantity, context: int = 0) -> Quantity:
    """FLOPs of training on `tokens`: three forward passes a token; `context` 0 is the convention 6 N."""
    sheet = Sheet()
    forward = quantity(flops_per_token(model, context), "FLOP/token", key="flops.forward")
    return sheet.derive("train.flops", "FLOP", f"{TRAINING} * forward * tokens", forward=forward, tokens=tokens)


def train_cost(
    model: Model,
    hardware: Hardware,
    *,
    tokens: Quantity,
    gpus: Quantity | int,
    mfu: Quantity | float,
    dtype: str = "bf16",
    price: Quantity | None = None,
    duty: Quantity | float = 1.0,
    context: int = 0,
) -> Sheet:
    """Days, GPU-hours and dollars of a run at a given utilisation.

    Args:
        mfu: model FLOPs over peak, while it runs.
        duty: share of the time that it runs: failures, restarts and waiting take the rest.
        price: of a GPU-hour; by default the hardware's.

    Raises:
        ConfigError: a utilisation or duty outside (0, 1], or no GPUs.
    """
    share(mfu=mfu, duty=duty)
    real(1, MANY, gpus=gpus)
    amount(tokens=tokens)
    whole(0, context=context)
    sheet = Sheet()
    sheet.put("train.tokens", tokens)
    sheet.put("train.flops", train_flops(model, tokens, context), "FLOP")
    sheet.derive(
        "train.days", "day", "flops / (gpus * peak * mfu * duty)",
        flops=sheet["train.flops"], gpus=gpus, peak=hardware.peak(dtype), mfu=mfu, duty=duty,
    )  # fmt: skip
    sheet.derive("train.gpu_hours", "h", "gpus * days", gpus=gpus, days=sheet["train.days"])
    sheet.derive(
        "train.cost", "USD", "gpu_hours * price", gpu_hours=sheet["train.gpu_hours"], price=price or hardware.price
    )
    return sheet


def mfu(model: Model, hardware: Hardware, *, tokens: Quantity, gpu_time: Quantity, dtype: str = "bf16") -> Quantity:
    """Utilisation that a run reached: 6 N FLOPs for its tokens over what the GPUs could have done in their time."""
    amount(tokens=tokens, gpu_time=gpu_time)
    sheet = Sheet()
    return sheet.derive(
        "train.mfu", "%", "flops / (gpu_time * peak)",
        flops=train_flops(model, tokens), gpu_time=gpu_time, peak=hardware.peak(dtype),
    )  # fmt: skip


def predict_step(
    model: Model,
    layout: Layout,
    hardware: Hardware,
    efficiency: Efficiency | None = None,
    dtype: str = "bf16",
    causal: bool = True,
) -> Sheet:
    """The time of one optimizer step: (m + (p - 1) / v) x a micro-batch's time on a stage + data parallel time.

    The products run at the fitted share of peak, recomputation included; tensor-parallel all-reduces at the fitted bus
    bandwidth; expert, pipeline and data traffic at their links' peak, none of it hidden. `causal` False is for
    attention that computes the masked half of the scores too, as it was before flash attention.

    Raises:
        ConfigError: a layout that cannot be, or without a batch.
    """
    shape, efficiency = load_shape(model), efficiency or Efficiency()
    sheet = training_traffic(shape, layout, hardware)
    m = layout.micro_batches()
    gemm, bus = efficiency.quantity("gemm"), efficiency.quantity("bus")
    forward = flops_per_token(shape, layout.seq_len, causal)
    uneven = max(len(r) for r in layout.layers_of(shape)) * layout.pp / shape.n_layers
    # Full recomputation adds one forward, selective one that of attention's scores and values.
    again = {"full": forward, "selective": attention_flops(shape, layout.seq_len, causal), "none": 0}[layout.recompute]
    sheet.derive(
        "step.stage.flops", "TFLOP",
        f"FLOP * ({TRAINING} * forward + again + passes * (imbalance - 1) * routed) * tokens / (p * t) * uneven",
        "of one micro-batch on one GPU", forward=forward, again=again, routed=routed_flops(shape),
        passes=TRAINING + (layout.recompute == "full"), imbalance=efficiency.quantity("expert_imbalance")
        if efficiency.expert_imbalance != 1 else 1, tokens=layout.micro_batch * layout.seq_len / layout.cp,
        p=layout.pp, t=layout.tp, uneven=uneven,
    )  # fmt: skip
    sheet.derive(
        "step.stage.compute", "ms", "flops / (peak * gemm)",
        flops=sheet["step.stage.flops"], peak=hardware.peak(dtype), gemm=gemm,
    )  # fmt: skip
    sheet.derive("step.stage.tensor", "ms", "bytes / m / bus", bytes=sheet["comm.tensor"], m=m, bus=bus)
    sheet.derive("step.stage.experts", "ms", "time / m", time=sheet["comm.experts.time"], m=m)
    sheet.derive(
        "step.stage", "ms", "compute + tensor + experts",
        **{name: sheet[f"step.stage.{name}"] for name in ("compute", "tensor", "experts")},
    )  # fmt: skip
    waiting = "(p - 1) / v" + (" / 3" if layout.schedule == "zero-bubble" else "")
    sheet.derive(
        "step.time", "s", f"(m + {waiting}) * stage + data",
        m=m, p=layout.pp, v=layout.interleave, stage=sheet["step.stage"], data=sheet["comm.data.time"],
    )  # fmt: skip
    _step_results(sheet, model, layout, hardware, dtype, m)
    return sheet


def _step_results(sheet: Sheet, model: Model, layout: Layout, hardware: Hardware, dtype: str, m: int) -> None:
    sheet.put("step.bubble", 100 * bubble(layout, m), "%", "of a stage's time, waiting")
    sheet.put("step.micro_batches", m, "x", "of each data parallel replica")
    sheet.derive(
        "step.tokens", "token", "token * m * micro_batch * seq_len * dp",
        m=m, micro_batch=layout.micro_batch, seq_len=layout.seq_len, dp=layout.dp,
    )  # fmt: skip
    forward = quantity(flops_per_token(model), "FLOP/token", key="flops.forward")
    sheet.derive(
        "step.mfu", "%", f"{TRAINING} * forward * tokens / (time * gpus * peak)", "6 N: attention scores left out",
        forward=forward, tokens=sheet["step.tokens"], time=sheet["step.time"], gpus=layout.gpus,
        peak=hardware.peak(dtype),
    )  # fmt: skip
    shape = load_shape(model)
    if shape.n_experts:
        sheet.derive(
            "step.tokens_per_expert", "token", "tokens * k / experts", "of each layer, at even load",
            tokens=sheet["step.tokens"], k=shape.top_k, experts=shape.n_experts,
        )  # fmt: skip


def predict_run(
    model: Model,
    layout: Layout,
    hardware: Hardware,
    tokens: Quantity,
    efficiency: Efficiency | None = None,
    duty: Quantity | float = 1.0,
    dtype: str = "bf16",
) -> Sheet:
    """A whole run from predicted steps: steps, days, dollars; keys as in `train_cost` and `predict_step`.

    Raises:
        ConfigError: as `predict_step`; a duty outside (0, 1].
    """
    share(duty=duty)
    amount(tokens=tokens)
    sheet = predict_step(model, layout, hardware, efficiency, dtype)
    sheet.put("train.tokens", tokens)
    sheet.derive("train.steps", "x", "tokens / step_tokens", tokens=tokens, step_tokens=sheet["step.tokens"])
    sheet.derive(
        "train.days", "day", "steps * step_time / duty",
        steps=sheet["train.steps"], step_time=sheet["step.time"], duty=duty,
    )  # fmt: skip
    sheet.derive("train.gpu_hours", "h", "gpus * days", gpus=layout.gpus, days=sheet["train.days"])
    sheet.derive("train.cost", "USD", "gpu_hours * price", gpu_hours=sheet["train.gpu_hours"], price=hardware.price)
    sheet.put("train.flops", train_flops(model, tokens), "FLOP")
    return sheet
