"""`moe plan`: what a model costs to train and to serve, on the command line.

As in main.py, commands import what they need when they run; with --json they load neither torch nor rich.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from moe.cli.flags import Flag, Words
from moe.cli.plan_check import calibrate, check, report
from moe.cli.plan_flags import (
    MODEL,
    SERVE,
    TRAIN,
    Amount,
    Batch,
    Context,
    Dtypes,
    MaybeAmount,
    Model,
    Name,
    Names,
    On,
    Settings,
    Weights,
    read_layout,
)
from moe.cli.show import SHOW, Output, check_pictures, show_rows, show_sheet

if TYPE_CHECKING:
    from moe.plan.quantities import Sheet
    from moe.plan.shape import Shape

ARTICLE_TOKENS = "13 Ttoken"  # of the article's training run

plan_app = tyro.extras.SubcommandApp()
plan_app.command(check)
plan_app.command(calibrate)
plan_app.command(report)


@plan_app.command
def params(
    model: Positional[Model] = MODEL, /, *, hf: Path | None = None, context: int = 0, show: Output = SHOW
) -> int:
    """Parameters, and FLOPs of a token.

    Args:
        hf: A Hugging Face config.json, or the directory that holds one, instead of a model's name.
        context: Tokens of context for the FLOPs; 0 leaves attention's scores out, the convention 2 N.
    """
    from moe import plan
    from moe.plan.hf_shapes import load_hf

    shape = load_hf(hf) if hf is not None else plan.load_shape(model)
    counts = plan.params(shape)
    names = ("total", "active", "attention", "expert", "experts", "shared", "dense", "router", "norms")
    contract = {name: getattr(counts, name) for name in (*names, "embedding", "head")}
    sheet = plan.params_sheet(shape, context)
    return show_sheet(f"{shape.name}: {shape.n_layers} layers, {shape.d_model:,} wide", sheet, show, contract)


@plan_app.command
def train(
    model: Positional[Model] = MODEL,
    /,
    *,
    on: On = TRAIN,
    tokens: MaybeAmount = None,
    mfu: float | None = None,
    floor: Flag = False,
    gemm: float = 0.735,
    bus: Amount = "80 GB/s",
    imbalance: float = 1.0,
    duty: float = 1.0,
    show: Output = SHOW,
) -> int:
    """Steps, days and dollars of a training run: predicted, or at a given utilisation.

    Args:
        tokens: Of the whole run. Default: the article's "13 Ttoken"; with --floor those of the configuration.
        mfu: Take this utilisation instead of predicting one.
        floor: Of one of our configurations under data parallelism, its batch ramp included: the least time of every
            component, and what a step took over it. For models too small for the constants of large ones.
        gemm: Share of peak that matrix products reach.
        bus: Bandwidth of tensor-parallel all-reduces.
        imbalance: Load of the busiest group of experts over the mean.
        duty: Share of the time that the run really runs.
    """
    from moe.errors import ConfigError
    from moe.plan import load_shape
    from moe.plan.quantities import given
    from moe.plan.train import Efficiency, predict_run, train_cost

    shape, (where, hw) = load_shape(model), on.read()
    amount = given(tokens or ARTICLE_TOKENS, "token", "tokens")
    if floor:
        from moe.config import load_config
        from moe.plan.roofline import predict_small_run

        if mfu is not None:
            raise ConfigError("--mfu takes a utilisation, --floor predicts one: give one of them")
        efficiency = Efficiency(gemm=gemm)
        sheet = predict_small_run(
            load_config(model), where, hw, tokens=amount if tokens else None, efficiency=efficiency
        )
    elif mfu is not None:
        sheet = train_cost(shape, hw, tokens=amount, gpus=where.gpus, mfu=mfu, duty=duty)
    else:
        efficiency = Efficiency(gemm=gemm, bus=bus, expert_imbalance=imbalance)
        sheet = predict_run(shape, where, hw, amount, efficiency, duty)
    return show_sheet(f"{shape.name} on {where.gpus:,} x {hw.name}", sheet, show)


@plan_app.command
def memory(
    model: Positional[Model] = MODEL,
    /,
    *,
    on: On = TRAIN,
    serve: Flag = False,
    cards: Flag = False,
    device: Flag = False,
    context: int = 8192,
    optimizer: Name = "adamw",
    show: Output = SHOW,
) -> int:
    """Memory of a GPU, in training by stage, in serving, or of moe train on one device.

    Args:
        serve: Weights and KV cache, and how many sequences fit.
        cards: The same for one, 8 and all key/value heads, at 8k and 32k, on every card.
        device: What moe train takes for this configuration on one device.
        context: Tokens of a sequence, with --serve.
        optimizer: adamw, muon or sgd.
    """
    from moe.plan import load_shape
    from moe.plan.memory import serving_memory, training_memory

    if device:
        from moe.plan.device import device_memory

        return show_sheet(f"{model}: moe train on one device", device_memory(model), show)
    serve = serve or cards
    on = on.serving() if serve else on
    shape, (where, hw) = load_shape(model), on.read()
    if cards:
        from moe.plan.sweeps import kv_room

        title = f"{shape.name}, {where.name} on {where.gpus:,} GPUs: KV cache, and sequences in flight"
        return show_rows(title, kv_room(shape, where, [on.hardware] if on.hardware else None), show)
    title = f"{shape.name}, {where.name} on {where.gpus:,} x {hw.name}"
    if serve:
        return show_sheet(title, serving_memory(shape, where, hw, context), show)
    return show_sheet(title, training_memory(shape, where, hw, optimizer), show)


@plan_app.command
def comm(
    model: Positional[Model] = MODEL,
    /,
    *,
    on: On = TRAIN,
    show: Output = SHOW,
) -> int:
    """What a training step sends over each link."""
    from moe.plan import load_shape
    from moe.plan.comm import training_traffic

    shape, (where, hw) = load_shape(model), on.read()
    return show_sheet(f"{shape.name}: a GPU's traffic in one step", training_traffic(shape, where, hw), show)


@plan_app.command
def decode(
    model: Positional[Model] = MODEL,
    /,
    *,
    on: On = SERVE,
    batch: Batch = 1,
    context: Context = 8192,
    prompt: int = 0,
    utilisation: float | None = None,
    reclaimed: float = 0.0,
    lifetime: MaybeAmount = None,
    floor: Flag = False,
    show: Output = SHOW,
) -> int:
    """One decoding step: latency, throughput, utilisation, price.

    Args:
        prompt: Also the pass over prompts of this many tokens.
        utilisation: Share of the hours that the cluster serves; also prices with that, of prompt and output tokens.
        reclaimed: Share of the idle hours that other work pays for.
        lifetime: Tokens served over the model's life, as "1000 Ttoken"; also against the cost of training.
        floor: Memory and compute alone, nothing of links.
    """
    from moe.errors import ConfigError
    from moe.plan import decode as one_step
    from moe.plan import load_shape, prefill

    if utilisation is None and (lifetime is not None or reclaimed):
        raise ConfigError("--lifetime and --reclaimed need --utilisation: the share of the hours that it serves")
    shape, (where, hw) = load_shape(model), on.read()
    sheet = one_step(shape, where, hw, batch=batch, context=context, collectives=not floor)
    if prompt or utilisation is not None:
        sheet.update(prefill(shape, where, hw, batch=1, prompt=prompt or context))
    if utilisation is not None:
        sheet.update(_prices(shape, sheet, utilisation, reclaimed, lifetime))
    return show_sheet(f"{shape.name}, {where.name} on {where.gpus:,} x {hw.name}", sheet, show)


@plan_app.command
def experts(
    model: Positional[Model] = MODEL, /, *, batch: int = 256, pictures: Path | None = None, show: Output = SHOW
) -> int:
    """How many experts a batch touches, and how many tokens each gets.

    Args:
        batch: Tokens of one pass.
        pictures: Draw it into this directory.
    """
    from moe.plan import load_shape
    from moe.plan.experts import experts_sheet

    check_pictures(pictures)
    shape = load_shape(model)
    sheet = experts_sheet(shape.n_experts, shape.top_k, batch)
    if pictures is not None:
        from moe.plan.pictures import draw_experts

        print(f"picture: {draw_experts(shape.n_experts, shape.top_k, pictures)}", file=sys.stderr)
    return show_sheet(f"{shape.name}: top {shape.top_k} of {shape.n_experts}, {batch:,} tokens a pass", sheet, show)


@plan_app.command
def speculate(
    model: Positional[Model] = MODEL,
    /,
    *,
    on: On = SERVE,
    batch: Batch = 32,
    acceptance: float = 0.8,
    drafts: int = 4,
    draft_cost: float = 0.05,
    context: Context = 0,
    show: Output = SHOW,
) -> int:
    """What speculative decoding gains, with the experts that verification touches.

    Args:
        acceptance: Probability that a draft is accepted.
        drafts: Tokens drafted for each sequence and pass.
        draft_cost: Of one draft token, in passes of the large model.
    """
    from moe.plan import load_shape
    from moe.plan.speculation import speculate

    shape, (where, hw) = load_shape(model), on.read()
    made = speculate(
        shape, where, hw, batch=batch, acceptance=acceptance, drafts=drafts, draft_cost=draft_cost, context=context
    )
    return show_sheet(f"{shape.name}: {drafts} drafts, {batch:,} sequences", made, show)


@plan_app.command
def sweep(
    model: Positional[Model] = MODEL,
    /,
    *,
    layout: Names = ("gpt4-serve",),
    set_: Settings = (),
    hardware: Names = ("a100-40",),
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    context: tuple[int, ...] = (8192,),
    weights: Dtypes = ("bf16",),
    partitions: Flag = False,
    chips: tuple[int, ...] = (8, 16, 32, 64, 128),
    pictures: Path | None = None,
    show: Output = SHOW,
) -> int:
    """Latency, throughput and utilisation over batch, context, precision and hardware.

    Args:
        layout: Shipped layouts or TOML files.
        hardware: Shipped names or TOML files.
        batch: Sequences that share one pass.
        context: Tokens that each sequence has.
        weights: Their precision.
        partitions: Instead of layouts, the ways to divide a layer over --chips: the frontier of latency and cost.
        chips: Of one replica, with --partitions.
        pictures: Draw it into this directory.
    """
    from moe.plan import load_shape
    from moe.plan.hardware import load_hardware
    from moe.plan.partition import frontier
    from moe.plan.sweeps import sweep

    check_pictures(pictures)
    shape = load_shape(model)
    if partitions:
        hw = load_hardware(hardware[0])
        rows = frontier(shape, hw, chips=chips, batches=batch, context=context[0], weights=weights[0])
    else:
        layouts = [read_layout(name, set_) for name in layout]
        rows = sweep(shape, layouts, hardware, batches=batch, contexts=context, weights=weights)
    if pictures is not None:
        from moe.plan.pictures import draw_frontier, draw_sweep

        print(f"picture: {(draw_frontier if partitions else draw_sweep)(rows, pictures)}", file=sys.stderr)
    shown = [row for row in rows if row["best"]] if partitions else rows
    return show_rows(f"{shape.name}: {'frontier' if partitions else 'serving'}", rows, show, shown)


@plan_app.command
def fit(
    *,
    target: Annotated[Words, arg(metavar="NAME=NUMBER ...")] = (),
    layers: int = 120,
    experts: int = 16,
    top_k: int = 2,
    kv_heads: int = 1,
    vocab_size: int = 100_352,
    show: Output = SHOW,
) -> int:
    """The shape that has claimed totals.

    Args:
        target: total, expert, attention, active, forward, dense; such as total=1.8e12. Default: the article's.
        layers: Of the shape. experts, top_k, kv_heads, vocab_size: as well.
    """
    from moe.errors import ConfigError
    from moe.plan.search import fit

    targets: dict[str, float] = {}
    for text in (t for group in target for t in group):
        name, _, value = text.partition("=")
        try:
            targets[name] = float(value)
        except ValueError:
            raise ConfigError(f"--target {text!r}: must be name=number, such as total=1.8e12") from None
    found = fit(
        targets or None, layers=layers, n_experts=experts, top_k=top_k, n_kv_heads=kv_heads, vocab_size=vocab_size
    )
    rows = [
        {
            "d_model": f.shape.d_model,
            "heads": f.shape.main.attention.n_heads,
            "d_ff": f.shape.main.mlp.d_ff,
            "largest deviation": f.error,
            **f.totals,
        }
        for f in found
    ]
    return show_rows(f"{layers} layers, top {top_k} of {experts}", rows, show)


@plan_app.command
def redesign(
    model: Positional[Model] = MODEL,
    /,
    *,
    hardware: Name = "a100-80",
    gpus: int = 128,
    per_user: float = 8.33,
    context: Context = 8192,
    weights: Weights = "bf16",
    show: Output = SHOW,
) -> int:
    """The layouts that serve a model best on given GPUs, beside the article's.

    Args:
        hardware: A shipped name or a TOML file.
        gpus: To serve on.
        per_user: Tokens/s that every user is to get.
    """
    from moe.errors import ConfigError
    from moe.plan import load_shape
    from moe.plan.hardware import load_hardware
    from moe.plan.layout import load_layout
    from moe.plan.search import evaluate, redesign

    shape, hw = load_shape(model), load_hardware(hardware)
    found = redesign(shape, hw, gpus=gpus, per_user=per_user, context=context, weights=weights)[:10]
    if not found:
        raise ConfigError(
            f"`gpus` {gpus}: no layout of {shape.name} on so many {hw.name} fits and gives {per_user:g} tokens/s a "
            "user: take another number of `gpus`, a lower `per_user` or other `hardware`"
        )
    if gpus == 128 and shape.n_layers == 120:
        article = load_layout("gpt4-serve").replace(weights=weights, name="the article's tp8 pp16")
        found.append(evaluate(shape, article, hw, 256, context))
    rows = [
        {
            "layout": d.layout.name, "batch": d.batch, "in flight": d.batch * d.layout.pp,
            "tokens/s a user": d.per_user, "tokens/s": d.throughput, "USD per 1k": d.usd_per_1k,
            "GB a GPU": d.memory / 1e9, "fits": d.memory <= hw.memory.value,
        }
        for d in found
    ]  # fmt: skip
    return show_rows(f"{shape.name} on {gpus} x {hw.name}, {per_user:g} tokens/s a user", rows, show)


# ---------------------------------------------------------------------------------------------------------- helpers


def _prices(shape: "Shape", sheet: "Sheet", utilisation: float, reclaimed: float, lifetime: str | None) -> "Sheet":
    from moe.plan.hardware import load_hardware
    from moe.plan.layout import load_layout
    from moe.plan.quantities import given, quantity
    from moe.plan.serving import serving_price
    from moe.plan.train import predict_run

    training = lifetime_tokens = None
    if lifetime is not None:
        layout = load_layout("gpt4-train")
        trained = predict_run(shape, layout, load_hardware(layout.hardware), quantity(ARTICLE_TOKENS))
        training, lifetime_tokens = trained["train.cost"], given(lifetime, "token", "lifetime")
    return serving_price(
        output=sheet["decode.cost"],
        prompt=sheet["prefill.cost"],
        utilisation=utilisation,
        reclaimed=reclaimed,
        training=training,
        lifetime_tokens=lifetime_tokens,
    )
