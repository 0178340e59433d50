"""`moe bench`: what a model's engine reaches here. As in main.py, commands import what they need when they run."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from moe.cli.flags import Flag, Settings, Speculative, guesser, within
from moe.cli.show import SHOW, Output, Show, check_pictures, show_rows, write_csv

if TYPE_CHECKING:
    from moe.serve.bench import Bench, Row

bench_app = tyro.extras.SubcommandApp()
Model = Annotated[str, arg(metavar="MODEL", help="A checkpoint, a shipped configuration or a TOML file.")]
Batches = Annotated[tuple[int, ...], arg(metavar="N ...")]
Rates = Annotated[tuple[float, ...], arg(metavar="NUMBER ...")]


@dataclass(frozen=True)
class Load:
    """What is asked, of what, and where the results go."""

    input_len: Annotated[int, arg(help="Tokens of a prompt.")] = 32
    output_len: Annotated[int, arg(help="Tokens of an answer.")] = 16
    spread: Annotated[float, arg(help="Draw both evenly from that share below to that share above.")] = 0.0
    workload: Annotated[
        Literal["random", "prefix-repetition"], arg(help="Prompts of their own, or some that begin alike.")
    ] = "random"
    prefixes: Annotated[int, arg(help="With prefix-repetition: how many different beginnings.")] = 4
    prefix_len: Annotated[int, arg(help="With prefix-repetition: tokens of a beginning, part of --input-len.")] = 16
    seed: Annotated[int, arg(help="Of prompts and arrivals.")] = 0
    set_: Settings = ()
    dtype: Annotated[Literal["auto", "bf16", "fp32"], arg(help="Of weights and products.")] = "auto"
    speculative: Speculative = "none"
    num_drafts: Annotated[int, arg(help="Guesses for a request and pass, at most.")] = 4
    fixed_drafts: Annotated[Flag, arg(help="Always so many, not what the engine finds to be best.")] = False
    quantization: Annotated[Literal["none", "int8", "fp8"], arg(help="Expert weights in eight bits; fp8 on CUDA.")] = (
        "none"
    )
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"], arg(help="Of keys and values.")
    ] = "auto"
    batch_invariant: Annotated[Flag, arg(help="A request's logits have the same bits whatever runs beside it.")] = False
    max_batch_tokens: Annotated[int, arg(help="Tokens of a pass at most: long prompts take several.")] = 2048
    device: Annotated[str | None, arg(help="cuda or cpu. Default: cuda where there is one.")] = None
    pictures: Annotated[Path | None, arg(help="Draw latency, throughput and utilisation into this directory.")] = None
    passes: Annotated[
        Path | None, arg(help="Write each pass's experts, bytes, FLOP, floor and time to this CSV file.")
    ] = None
    calibrate: Annotated[
        Path | None, arg(help="Append a row for each pass to this CSV file, for moe plan calibrate.")
    ] = None


On = Annotated[Load, OmitArgPrefixes, arg(name="")]
LOAD = Load()

# What a table shows; --csv and --json have all.
SHOWN = ("ttft_ms", "tpot_ms", "plan_tpot_ms", "throughput", "plan_throughput", "utilisation", "plan_utilisation")
PASSES = ("roofline", "host", "running", "experts", "experts_expected", "experts_most")


@bench_app.command
def latency(
    model: Positional[Model], /, *, load: On = LOAD, batch: Batches = (1, 2, 4, 8), rounds: int = 3, show: Output = SHOW
) -> int:
    """Time per token when so many requests begin together and nothing else runs.

    Args:
        batch: Requests; a row for each number.
        rounds: How often each.
    """
    within("rounds", rounds, 1, 10**6)
    subject = _prepare(model, load, {"batch": batch})
    return _results(subject, load, subject.latency(batch, rounds), "batch", show)


@bench_app.command
def throughput(
    model: Positional[Model], /, *, load: On = LOAD, batch: Batches = (1, 2, 4, 8), requests: int = 16,
    show: Output = SHOW,
) -> int:  # fmt: skip
    """Tokens a second when many requests are there from the beginning.

    Args:
        batch: Requests that run together at most; a row for each number.
        requests: Of each row.
    """
    within("requests", requests, 1, 10**6)
    subject = _prepare(model, load, {"batch": batch})
    return _results(subject, load, subject.throughput(batch, requests), "batch", show)


@bench_app.command
def serve(
    model: Positional[Model], /, *, load: On = LOAD, rate: Rates = (8.0, 32.0, 128.0),
    requests: int = 16, max_running: int = 16, ttft_limit: float | None = None, tpot_limit: float | None = None,
    show: Output = SHOW,
) -> int:  # fmt: skip
    """What users get when requests arrive by chance, at a rate: a Poisson process.

    Args:
        rate: Requests that arrive a second, on average; a row for each.
        requests: Of each row.
        max_running: Requests that run together at most.
        ttft_limit: Milliseconds to the first token within which a request counts into the goodput. Default: any.
        tpot_limit: Milliseconds between tokens, as well.
    """
    from moe.serve.bench import Limits

    within("requests", requests, 1, 10**6)
    within("max-running", max_running, 1, 10**6)
    subject = _prepare(model, load, {"rate": rate})
    rows = subject.serve(rate, requests, max_running, Limits(ttft_limit, tpot_limit))
    return _results(subject, load, rows, "rate", show)


# ------------------------------------------------------------------------------------------------------------ helpers


def _prepare(name: str, load: Load, over: "Mapping[str, tuple[float, ...]]") -> "Bench":
    """The model, as it will be served, and the machine."""
    import torch

    from moe import checkpoint, profile
    from moe.cli.flags import assignments
    from moe.config import load_config
    from moe.device import pick_device, pick_dtype, tune_cpu
    from moe.errors import ConfigError
    from moe.serve.bench import Bench, Workload
    from moe.serve.roofline import machine

    check_pictures(load.pictures)
    for flag, values in over.items():
        for value in values:
            within(flag, value, 1 if flag == "batch" else 1e-6, 10**6)
    work = Workload(
        load.workload, load.input_len, load.output_len, load.spread, load.prefixes, load.prefix_len, load.seed
    )
    where = pick_device(load.device)
    if where.type == "cpu":
        tune_cpu()
    trained = Path(name).is_dir()
    if trained and load.set_:
        raise ConfigError(f"--set {' '.join(load.set_[0])}: {name} is a checkpoint, whose shape is given")
    cfg = checkpoint.load_config_of(name) if trained else load_config(name).with_overrides(assignments(load.set_))
    auto = pick_dtype(cfg.train, where)
    dtype = {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[load.dtype]
    model = checkpoint.load(name, device=where).to(dtype) if trained else profile.random_model(cfg, dtype, where)
    settings: dict[str, Any] = {
        "quantization": None if load.quantization == "none" else load.quantization,
        "kv_cache_dtype": load.kv_cache_dtype,
        "batch_invariant": load.batch_invariant,
        "max_batch_tokens": load.max_batch_tokens,
        "speculative": guesser(load.speculative, where, dtype),
        "num_drafts": load.num_drafts,
        "adaptive": not load.fixed_drafts,
    }
    return Bench(model.eval(), machine(where, dtype), work, **settings)


def _results(subject: "Bench", load: Load, rows: "Iterable[Row]", x: str, show: Show) -> int:
    found = []
    for row in rows:
        found.append(row)
        print(f"{x} {row[x]:g}: {row['throughput']:,.0f} tokens/s", file=sys.stderr)
    for report in subject.reports:
        print(report, file=sys.stderr)
    if load.passes is not None:
        write_csv(subject.passes, load.passes)
    if load.calibrate is not None:
        from moe.plan.calibrate import append_row

        for row in subject.plan_rows:
            append_row(load.calibrate, row)
        print(f"rows for moe plan calibrate: {load.calibrate}", file=sys.stderr)
    title = f"{subject.model.cfg.name}, {subject.dtype}, {subject.machine.name}"
    if load.pictures is not None:
        from moe.serve.pictures import draw_axes

        work = f"{load.input_len} tokens in, {load.output_len} out"
        print(f"picture: {draw_axes(found, x, f'{title}; {work}', load.pictures)}", file=sys.stderr)
    names = (x, *(("goodput",) if "goodput" in found[0] else ()), *SHOWN, *PASSES)
    shown = [{name: row[name] for name in names} for row in found]
    return show_rows(title, found, show, shown)
