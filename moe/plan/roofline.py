"""A training run of a small model on one node, from the floor of each component of its step.

The constants of moe/plan/train.py are of models so wide that matrix products are nearly all of a step. At width 768
they are not: norms, the router, softmax and the optimizer move bytes. So here every component takes the longer of
its FLOP and its bytes (moe/plan/work.py) at the shares of peak and bandwidth that large kernels reach, one after the
other; then the optimizer, on its share of the parameters with ZeRO-1; then the gradients' reduction, not hidden. That
is a floor, which nobody reaches; `SLOWER` times as long is what one measured step took.
"""

from moe.config import Config, parse_tokens
from moe.errors import ConfigError
from moe.plan.bounds import amount
from moe.plan.comm import training_traffic
from moe.plan.flops import TRAINING, flops_per_token
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.quantities import Quantity, Sheet, assumed, quantity
from moe.plan.sizes import NARROW, WIDE
from moe.plan.train import Efficiency
from moe.plan.work import Work, step_work

# A step of replica-nano, `moe profile step` on two cores: 1.44 s, its floor at the machine's measured rates 0.63 s
# (benchmarks/results/demo/step). Kernels are smaller than those that rates are measured on, and wait for each other.
SLOWER = 1.44 / 0.63


def predict_small_run(
    cfg: Config,
    layout: Layout,
    hardware: Hardware,
    *,
    tokens: Quantity | None = None,
    efficiency: Efficiency | None = None,
) -> Sheet:
    """Hours, dollars and MFU of a run with data parallelism alone: at the floor, and `SLOWER` times slower.

    The run's batches are those of the configuration, its ramp included; the layout says how many GPUs share them and
    how many windows pass at a time. Evaluation and checkpoints are not counted.

    Args:
        tokens: of the run; by default those of the configuration.

    Returns:
        floor.COMPONENT: of one micro-batch on one GPU, forward and backward; floor.micro_batch, .optimizer, .reduction
        and .step: at the last batch size; run.floor and run.slow: .hours, .cost and .mfu.

    Raises:
        ConfigError: a layout with other parallelism, a batch that does not divide over it, or no tokens.
    """
    efficiency = efficiency or Efficiency()
    for name in ("tp", "pp", "cp", "ep"):
        if getattr(layout, name) != 1:
            raise ConfigError(f"{name} = {getattr(layout, name)}: the floor is of data parallelism alone: set {name}=1")
    if layout.recompute == "selective":
        raise ConfigError('recompute = \'selective\': the floor knows "none" and "full"')
    seq_len = cfg.train.seq_len or cfg.max_seq_len
    total = tokens or quantity(run_tokens(cfg), "token")
    amount(tokens=total)
    sheet = Sheet()
    sheet.put("run.tokens", total, "token")
    memory = assumed(quantity(efficiency.memory), "efficiency.memory", note=efficiency.quantity("memory").note)
    rates = {"gemm": efficiency.quantity("gemm"), "memory": memory, "bandwidth": hardware.bandwidth}
    least = layout.replace(seq_len=seq_len, batch_tokens=seq_len * layout.micro_batch * layout.dp)
    traffic = training_traffic(cfg, least, hardware)
    update = step_work(cfg, 1, 1, "train", activation_bytes=NARROW, weight_bytes=WIDE)["optimizer", "update"]
    sheet.derive(
        "floor.optimizer", "ms", "max(flop / (peak * gemm), bytes / (bandwidth * memory)) / shared",
        "parameter, gradient and moments (AdamW two, Muon one) come in, all but the gradient go out, in float32",
        flop=quantity(update.flop, "FLOP"), peak=hardware.peak("fp32"), bytes=quantity(update.bytes, "B"),
        shared=layout.dp if layout.zero else 1, **rates,
    )  # fmt: skip
    sheet.put("floor.reduction", traffic["comm.data.time"], "ms", "gradients and weights over the node's links at peak")
    steps = []  # the time of all steps at each batch of the ramp
    for i, (n, batch) in enumerate(_ramp(cfg, seq_len, total.to("token"))):
        micro_batch, m = _divide(batch, layout)
        _micro_batch(sheet, cfg, layout, hardware, micro_batch, seq_len, rates)
        sheet.derive(
            "floor.step", "ms", "m * micro_batch + optimizer + reduction", f"of {batch * seq_len:,} tokens",
            m=m, micro_batch=sheet["floor.micro_batch"], optimizer=sheet["floor.optimizer"],
            reduction=sheet["floor.reduction"],
        )  # fmt: skip
        steps.append(sheet.derive(f"run.ramp{i}", "h", "steps * step", f"{batch * seq_len:,} tokens a step",
                                  steps=n, step=sheet["floor.step"]))  # fmt: skip
    _results(sheet, cfg, layout, hardware, steps)
    return sheet


def run_tokens(cfg: Config) -> int:
    """Tokens of the run that a configuration describes. Raises ConfigError where only the data says how many."""
    t = cfg.train
    if t.tokens == "epochs":
        raise ConfigError("train.tokens = 'epochs': only the data says how many tokens that is: give `tokens`")
    if t.tokens:
        return parse_tokens("train.tokens", t.tokens)
    if t.ramp():
        raise ConfigError(
            "train.tokens is not set: with a batch_ramp it says how long the run is; set it or give `tokens`"
        )
    return t.steps * t.batch_size * (t.seq_len or cfg.max_seq_len)


def _ramp(cfg: Config, seq_len: int, tokens: float) -> list[tuple[float, int]]:
    """(steps, windows a step) for each batch of the ramp."""
    ramp = cfg.train.ramp() or [(0, cfg.train.batch_size * seq_len)]
    ends = [*(begin for begin, _ in ramp[1:]), tokens]
    found = []
    for (begin, size), end in zip(ramp, ends, strict=True):
        windows = max(1, round(size / seq_len))
        if min(end, tokens) > begin:
            found.append(((min(end, tokens) - begin) / (windows * seq_len), windows))
    return found


def _divide(batch: int, layout: Layout) -> tuple[int, int]:
    """Windows of a micro-batch, and how many of them each GPU has in a step."""
    each = batch // layout.dp
    micro_batch = min(layout.micro_batch, each)
    if not each or batch % layout.dp or each % micro_batch:
        raise ConfigError(
            f"a step of {batch} windows does not divide over dp = {layout.dp} GPUs with micro_batch = "
            f"{layout.micro_batch}: change train.batch_size or train.batch_ramp, or the layout's dp or micro_batch"
        )
    return micro_batch, each // micro_batch


def _micro_batch(
    sheet: Sheet,
    cfg: Config,
    layout: Layout,
    hardware: Hardware,
    windows: int,
    seq_len: int,
    rates: dict[str, Quantity],
) -> None:
    """floor.COMPONENT of so many windows, and their sum floor.micro_batch."""
    # The kernels gather rows themselves; parameters and their gradients are float32.
    work = step_work(cfg, windows, seq_len, "backward", activation_bytes=NARROW, weight_bytes=WIDE, gathered=False)
    parts: dict[str, list[Work]] = {}
    for (component, phase), each in work.items():
        again = layout.recompute == "full" and phase == "forward" and component not in ("embedding", "head")
        parts.setdefault(component, []).extend([each, each] if again else [each])
    for component, all_work in parts.items():
        terms = [
            sheet.derive(
                f"floor.{component}.{i}", "ms", "max(flop / (peak * gemm), bytes / (bandwidth * memory))",
                flop=quantity(each.flop, "FLOP"), bytes=quantity(each.bytes, "B"),
                peak=hardware.peak("fp32" if each.wide else "bf16"), **rates,
            )
            for i, each in enumerate(all_work)
        ]  # fmt: skip
        named = {f"x{i}": term for i, term in enumerate(terms)}
        sheet.derive(f"floor.{component}", "ms", " + ".join(named), f"of {windows * seq_len:,} tokens", **named)
        for i in range(len(terms)):
            del sheet[f"floor.{component}.{i}"]
    sheet.derive("floor.micro_batch", "ms", " + ".join(parts), **{name: sheet[f"floor.{name}"] for name in parts})


def _results(sheet: Sheet, cfg: Config, layout: Layout, hardware: Hardware, steps: list[Quantity]) -> None:
    forward = quantity(flops_per_token(cfg), "FLOP/token", key="flops.forward")
    slower = assumed(quantity(SLOWER), "roofline.slower", note="a measured step over its floor: replica-nano on a CPU")
    named = {f"ramp{i}": q for i, q in enumerate(steps)}
    for name, factor in (("floor", quantity(1.0)), ("slow", slower)):
        sheet.derive(f"run.{name}.hours", "h", f"factor * ({' + '.join(named)})", factor=factor, **named)
        hours = sheet[f"run.{name}.hours"]
        sheet.derive(f"run.{name}.cost", "USD", "gpus * hours * price", gpus=layout.gpus, hours=hours,
                     price=hardware.price)  # fmt: skip
        sheet.derive(
            f"run.{name}.mfu", "%",
            f"{TRAINING} * forward * tokens / (hours * gpus * peak)", "6 N: attention scores left out",
            forward=forward, tokens=sheet["run.tokens"], hours=hours, gpus=layout.gpus, peak=hardware.peak("bf16"),
        )  # fmt: skip
