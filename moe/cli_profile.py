"""`moe profile`: what the router does, on the command line.

As in cli.py, commands import what they need when they run.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    import torch

    from moe.model import Transformer
    from moe.plan.work import What
    from moe.profile import RoutingProfile, Run, Share, StepProfile

profile_app = tyro.extras.SubcommandApp()

# Held-out sequences are few and the experts many: a difference counts from four standard errors on.
CLEAR_Z = 4.0
LEFT = ("tokens", "component", "phase")  # columns of words


@profile_app.command
def routing(
    checkpoint: Positional[Path],
    /,
    *,
    data: Path,
    tokens: int = 65536,
    seq_len: int = 256,
    batch: int = 16,
    trace: Path | None = None,
    out: Path | None = None,
    pictures: Path | None = None,
    device: str | None = None,
) -> int:
    """Run held-out text through a model and show what its routers do with it.

    Args:
        checkpoint: What moe train leaves in RUN/final, or any checkpoint of this program.
        data: Prepared data (moe data prepare); each of its sources is looked at apart, too.
        tokens: About how many held-out tokens.
        seq_len: Tokens of a sequence.
        batch: Sequences of a forward pass.
        trace: Record the routing here, for placement, serving, compare and replay.
        out: Write all figures to this JSON file.
        pictures: Draw load, sources and co-activation into this directory.
        device: cuda or cpu. Default: cuda where there is one.
    """
    import itertools

    from moe import checkpoint as checkpoints
    from moe import profile
    from moe.data import TokenData
    from moe.train import evaluate
    from moe.train.device import pick_device

    held_out = TokenData.open(data)
    model = checkpoints.load(checkpoint, device=pick_device(device)).eval()
    held_out.check_compatible(model.cfg.vocab_size)
    tokenizer = held_out.tokenizer()
    windows = evaluate.some_windows(held_out, min(seq_len, model.cfg.max_seq_len), tokens)
    recording = profile.record(model, trace) if trace is not None else contextlib.nullcontext()
    with recording, profile.routing(model, model.cfg.vocab_size) as p:
        for p.source, own in itertools.groupby(windows, key=lambda window: window[0]):
            evaluate.evaluate(model, own, evaluate.byte_lengths(tokenizer), batch=batch)
    _print_routing(p)
    _print_sources(p)
    _print_tokens(p, tokenizer)
    if out is not None:
        out.write_text(json.dumps(_figures(p), indent=1) + "\n", encoding="utf-8")
        print(f"all figures: {out}")
    if pictures is not None:
        from moe.profile.pictures import draw

        draw(p, pictures)
        print(f"pictures: {pictures}")
    if trace is not None:
        print(f"trace: {trace}")
    return 0


@profile_app.command
def placement(trace: Positional[Path], /, *, gpus: int, redundant: int = 0, out: Path | None = None) -> int:
    """Place experts on GPUs by their load, and say what that gains over round-robin.

    Every other pass of the trace chooses; those between judge.

    Args:
        trace: What moe profile routing --trace recorded.
        gpus: GPUs that share the experts of a layer.
        redundant: More expert slots per layer, for copies of busy experts.
        out: Write the placement to this JSON file.
    """
    from moe import profile
    from moe.config import ConfigError

    opened = profile.Trace.open(trace)
    counts_PLE = opened.counts_PLE()
    if len(counts_PLE) < 2:
        raise ConfigError(f"{trace}: has {len(counts_PLE)} passes; 2 are needed, one to choose and one to judge by")
    try:
        chosen = profile.place(counts_PLE[::2].sum(0).astype(float), gpus, redundant)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    before = profile.round_robin(opened.n_layers, opened.n_experts, gpus).max_over_mean(counts_PLE[1::2])
    after = chosen.max_over_mean(counts_PLE[1::2])
    rows = [[str(i), f"{b:.3f}", f"{a:.3f}"] for i, (b, a) in enumerate(zip(before, after, strict=True))]
    rows.append(["all", f"{before.mean():.3f}", f"{after.mean():.3f}"])
    judged = f"{len(counts_PLE) // 2:,} passes that did not choose"
    _table(
        f"busiest GPU over the mean, {gpus} GPUs, {redundant} redundant; {judged}",
        ["layer", "round-robin", "placed"],
        rows,
    )
    if out is not None:
        content = {"n_experts": opened.n_experts, "gpus": chosen.gpus}
        out.write_text(json.dumps(content) + "\n", encoding="utf-8")
        print(f"placement: {out}")
    return 0


@profile_app.command
def serving(
    trace: Positional[Path],
    /,
    *,
    config: str | None = None,
    bandwidth: float = 3350.0,
    bits: int = 16,
    pictures: Path | None = None,
) -> int:
    """Tokens per expert in a decoding step, and what the weights it reads cost, by batch size.

    Args:
        trace: What moe profile routing --trace recorded.
        config: Also bytes and time for the experts of this model: a shipped configuration or a TOML file.
        bandwidth: GB/s of the memory that holds the weights. Default: one H100 SXM.
        bits: Of a weight.
        pictures: Draw it into this directory.
    """
    from moe import plan, profile
    from moe.config import load_config

    opened = profile.Trace.open(trace)
    found = profile.decode_steps(opened.ids_TLK(2**20), opened.n_experts)
    columns = ["batch", "tokens per expert", "p5 to p95", "uniform", "busiest", "idle", "uniform", "experts", "uniform"]
    expert_bytes = 0.0
    if config is not None:
        expert_bytes = plan.params(load_config(config)).expert * bits / 8  # in all layers
        columns += ["GB per step", "ms per step"]
    rows = []
    for s in found:
        row = [f"{s.batch:,}", f"{s.mean:.4g}", f"{s.tokens_p5:.0f} to {s.tokens_p95:.0f}"]
        row += [f"{s.tokens_p5_uniform:.0f} to {s.tokens_p95_uniform:.0f}", f"{s.busiest:.1f}"]
        row += [f"{s.idle:.1%}", f"{s.idle_uniform:.1%}", f"{s.distinct:.1f}", f"{s.distinct_uniform:.1f}"]
        if config is not None:
            gigabytes = s.distinct * expert_bytes / 1e9
            row += [f"{gigabytes:,.2f}", f"{gigabytes / bandwidth * 1e3:,.2f}"]
        rows.append(row)
    _table(f"one decoding step of {trace}; uniform: independent choices at even load", columns, rows)
    if pictures is not None:
        from moe.profile.pictures import draw_serving

        print(f"picture: {draw_serving(found, opened.n_experts, pictures)}")
    return 0


@profile_app.command
def compare(one: Positional[Path], other: Positional[Path], /) -> int:
    """How two routings of the same tokens differ: train against serve, before against after.

    Args:
        one: A trace.
        other: A trace of the same tokens.
    """
    from moe import profile

    found = profile.compare(profile.Trace.open(one), profile.Trace.open(other))
    columns = ["layer", "tokens rerouted", "first choice", "slots", "|ln w - ln w'|"]
    rows = []
    for layer in range(len(found.changed_L)):
        shares = [f"{float(x[layer]):.3%}" for x in (found.changed_L, found.first_changed_L, found.moved_L)]
        weight = "" if found.log_weight_L is None else f"{float(found.log_weight_L[layer]):.2e}"
        rows.append([str(layer), *shares, weight])
    _table(f"{found.tokens:,} tokens", columns, rows)
    return 0


@profile_app.command
def step(
    model: Positional[str],
    /,
    *,
    what: Literal["forward", "backward", "train", "decode"] = "train",
    batch: int = 8,
    seq_len: int | None = None,
    context: int | None = None,
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    set_: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(name="set", metavar="KEY=VALUE ...")] = (),
    rounds: int = 5,
    out: Path | None = None,
    pictures: Path | None = None,
    chrome: Path | None = None,
    device: str | None = None,
) -> int:
    """Where the time of one step goes: per component time, FLOP/s, bytes/s and the share of the roofline.

    Args:
        model: A checkpoint, a shipped configuration or a TOML file; of the last two with random weights.
        what: forward; backward (forward too); train (with the optimizer, weights in float32); decode (one token more).
        batch: Sequences.
        seq_len: Tokens of each. Default: what the configuration trains at.
        context: For decode: positions in the cache. Default: seq_len - 1.
        dtype: Of the matrix products.
        set_: Settings to change, such as n_layers=1: a whole layer of a model that does not fit.
        rounds: Steps measured; figures are medians.
        out: Write all figures to this JSON file.
        pictures: Draw time, roofline and memory into this directory.
        chrome: Write a trace for chrome://tracing or Perfetto.
        device: cuda or cpu. Default: cuda where there is one.
    """
    from moe import profile

    subject, run = _prepare_step(model, set_, what, batch, seq_len, context, dtype, device)
    found = profile.profile_step(subject, run, rounds=rounds)
    _print_step(found)
    if out is not None:
        out.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
        print(f"all figures: {out}")
    if pictures is not None or chrome is not None:
        memory = profile.trace_step(subject, run, chrome)
        if chrome is not None:
            print(f"trace: {chrome}")
        if pictures is not None:
            from moe.profile.step_pictures import draw_memory, draw_step

            draw_step(found, pictures)
            draw_memory(memory, pictures)
            print(f"pictures: {pictures}")
    return 0


def _prepare_step(
    name: str,
    changes: tuple[tuple[str, ...], ...],
    what: "What",
    batch: int,
    seq_len: int | None,
    context: int | None,
    dtype: str,
    device: str | None,
) -> tuple["Transformer", "Run"]:
    """The model and the step to measure: random tokens, and weights as the step would have them."""
    import torch

    from moe import checkpoint, profile
    from moe.config import ConfigError, load_config
    from moe.model import Transformer
    from moe.train.cpu import tune_cpu
    from moe.train.device import pick_device, pick_dtype
    from moe.train.optimizer import build

    where = pick_device(device)
    if where.type == "cpu":
        tune_cpu()
    trained = Path(name).is_dir()
    if trained and changes:
        raise ConfigError(f"--set {' '.join(changes[0])}: {name} is a checkpoint, whose shape is given")
    cfg = checkpoint.load_config_of(name) if trained else load_config(name)
    cfg = cfg.with_overrides([assignment for group in changes for assignment in group])
    length = seq_len or cfg.train.seq_len or cfg.max_seq_len
    for flag, value, low, high in (("batch", batch, 1, 2**20), ("seq-len", length, 1, cfg.max_seq_len)):
        if not low <= value <= high:
            raise ConfigError(f"--{flag} = {value}: must be from {low} to {high} ({cfg.name})")
    compute = pick_dtype(cfg.train, where) if dtype == "auto" else torch.bfloat16 if dtype == "bf16" else torch.float32
    # Training keeps its weights in float32; everything else has them as they are multiplied.
    stored = torch.float32 if what == "train" else compute
    if trained:
        model = checkpoint.load(Path(name), device=where).to(stored)
    else:
        with where, _default_dtype(stored):
            model = Transformer(cfg)
    model.activation_checkpointing = cfg.train.activation_checkpointing
    columns = {"decode": 1, "forward": length}.get(what, length + 1)
    tokens = torch.randint(cfg.vocab_size, (batch, columns), device=where)
    try:
        run = profile.make_run(
            model,
            what,
            tokens,
            dtype=compute,
            optimizer=build(model, cfg.train) if what == "train" else None,
            context=(length - 1 if context is None else context) if what == "decode" else 0,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model, run


@contextlib.contextmanager
def _default_dtype(dtype: "torch.dtype") -> "Iterator[None]":
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ----------------------------------------------------------------------------------------------------------- output


def _print_routing(p: "RoutingProfile") -> None:
    columns = ["layer", "load entropy", "CV", "max/mean", "in a pass", "dropped at 1.25", "router entropy"]
    columns += ["confidence", "same as before", "by chance", "next layer"]
    drop, after = p.drop_rate_L(1.25), p.next_layer_information
    rows = []
    for i in range(len(p.counts_LE)):
        row = [f"{p.load_entropy_L[i]:.3f}", f"{p.load_cv_L[i]:.2f}", f"{p.max_over_mean_L[i]:.2f}"]
        row += [f"{p.pass_max_over_mean_L[i]:.2f}", f"{drop[i]:.2%}", f"{p.router_entropy_L[i]:.2f}"]
        row += [f"{p.top_probability_L[i]:.2f}", f"{p.repeat_rate_L[i]:.1%}", f"{p.expected_repeat_rate_L[i]:.1%}"]
        rows.append([str(i), *row, f"{after[i]:.2f}" if i < len(after) else ""])
    _table(f"{p.tokens:,} tokens in {p.passes:,} passes", columns, rows)
    dead = p.dead_experts()
    shown = ", ".join(f"layer {i} expert {e}" for i, e in dead[:8]) + (", ..." if len(dead) > 8 else "")
    print(f"experts with less than a tenth of the mean load: {len(dead)}" + (f" ({shown})" if dead else ""))


def _print_sources(p: "RoutingProfile") -> None:
    """Of each pair of sources, the experts that they use most differently."""
    shares = p.sources
    names = list(shares)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            difference, z = p.specialisation(one, other)
            clear = (z.abs() > CLEAR_Z).sum(1)
            rows = []
            for layer in range(len(z)):
                ends = int(difference[layer].argmax()), int(difference[layer].argmin())
                cells = [f"{e}: {_share(shares[one], layer, e)} / {_share(shares[other], layer, e)}" for e in ends]
                rows.append([str(layer), f"{int(clear[layer])} of {z.shape[1]}", *cells])
            columns = ["layer", f"differ (|z| > {CLEAR_Z:g})", f"most for {one}", f"most for {other}"]
            sizes = f"{shares[one].sequences} and {shares[other].sequences} sequences"
            _table(f"share of {one} / {other} that an expert serves, ± standard error; {sizes}", columns, rows)


def _share(share: "Share", layer: int, expert: int) -> str:
    return f"{float(share.mean_LE[layer, expert]):.1%} ± {float(share.error_LE[layer, expert]):.1%}"


def _print_tokens(p: "RoutingProfile", tokenizer: Any) -> None:
    """The tokens that each expert of the middle layer takes most above its share."""
    layer = len(p.counts_LE) // 2
    try:
        _ = p.token_counts_LEV
    except ValueError as error:
        print(f"no token classes: {error}")
        return
    rows = []
    for e in range(p.n_experts):
        best = p.top_tokens(layer, e, 8)
        words = [repr(tokenizer.decode([i]))[1:-1] for i, _ in best]
        rows.append([str(e), f"{float(p.load_LE[layer, e]):.1%}", "  ".join(words)])
    _table(f"layer {layer}: the tokens an expert serves most above its share", ["expert", "load", "tokens"], rows)


def _figures(p: "RoutingProfile") -> dict[str, Any]:
    """Everything, for a JSON file."""
    names = ["load_entropy_L", "load_cv_L", "max_over_mean_L", "pass_max_over_mean_L", "router_entropy_L"]
    names += ["top_probability_L", "top_weight_L", "repeat_rate_L", "expected_repeat_rate_L", "next_layer_information"]
    names += ["counts_LE", "first_counts_LE", "coactivation_LEE", "next_layer_counts"]
    passes, load = p.load_over_time
    return {
        "tokens": p.tokens,
        "passes": p.passes,
        **{name: getattr(p, name).tolist() for name in names},
        "drop_rate_L": {f"{factor:g}": p.drop_rate_L(factor).tolist() for factor in p.capacity_factors},
        "dead_experts": p.dead_experts(),
        "load_over_time": {"passes": passes.tolist(), "load_NLE": load.tolist()},
        "sources": {
            name: {"sequences": s.sequences, "mean_LE": s.mean_LE.tolist(), "error_LE": s.error_LE.tolist()}
            for name, s in p.sources.items()
        },
    }


def _print_step(p: "StepProfile") -> None:
    columns = ["component", "phase", "calls", "ms", "of the step", "GFLOP/s", "GB/s", "floor ms", "of the roofline"]
    rows = []
    for r in p.rows:
        cells = [r.component, r.phase, str(r.calls), f"{r.seconds * 1e3:,.2f}", f"{r.seconds / p.seconds:.1%}"]
        cells.append(f"{r.flop / r.seconds / 1e9:,.1f}" if r.flop and r.seconds else "")
        cells.append(f"{r.bytes / r.seconds / 1e9:,.1f}" if r.bytes and r.seconds else "")
        cells.append(f"{r.floor * 1e3:,.2f}" if r.floor is not None else "")
        cells.append(f"{r.roofline_fraction:.0%}" if r.roofline_fraction is not None else "")
        rows.append(cells)
    flop = sum(r.flop or 0.0 for r in p.rows)
    cells = [
        "all",
        "",
        "",
        f"{p.seconds * 1e3:,.2f}",
        "",
        f"{flop / p.seconds / 1e9:,.1f}",
        "",
        f"{p.floor * 1e3:,.2f}",
    ]
    rows.append([*cells, f"{p.floor / p.seconds:.0%}"])
    c = p.ceilings
    where = f"{p.batch} x {p.seq_len} tokens" + (f" after {p.context}" if p.what == "decode" else "")
    _table(f"{p.config}, {p.what}, {where}, {p.dtype}, {p.device}", columns, rows)
    print(f"the same step with nothing measured inside: {p.plain_seconds * 1e3:,.2f} ms")
    fp32 = "" if p.dtype == "float32" else f", {c.product_fp32 / 1e9:,.0f} in float32"
    print(
        f"ceilings, measured: {c.product / 1e9:,.0f} GFLOP/s (a large product){fp32}, {c.copy / 1e9:,.0f} GB/s (a copy)"
    )


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT or name.startswith("most for") else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A pipe has no width to fit.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(Text(title), soft_wrap=True)
    console.print(table)
