"""`moe profile`: what the router does, on the command line.

As in cli.py, commands import what they need when they run.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tyro.conf import Positional

from moe.cli_output import table

if TYPE_CHECKING:
    from moe.config import Config
    from moe.profile import RoutingProfile, Share

profile_app = tyro.extras.SubcommandApp()

# Held-out sequences are few and the experts many: a difference counts from four standard errors on.
CLEAR_Z = 4.0


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
    import contextlib
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
    started = time.perf_counter()
    recording = profile.record(model, trace) if trace is not None else contextlib.nullcontext()
    with recording, profile.routing(model, model.cfg.vocab_size) as p:
        for p.source, own in itertools.groupby(windows, key=lambda window: window[0]):
            evaluate.evaluate(model, own, evaluate.byte_lengths(tokenizer), batch=batch)
    _print_rate(p, model.cfg, seq_len, time.perf_counter() - started, out)
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
    table(
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
    table(f"one decoding step of {trace}; uniform: independent choices at even load", columns, rows)
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
    table(f"{found.tokens:,} tokens", columns, rows)
    return 0


# ----------------------------------------------------------------------------------------------------------- output


def _print_rate(p: "RoutingProfile", cfg: "Config", seq_len: int, seconds: float, out: Path | None) -> None:
    """How fast the text went through, and with `out` a row beside it for `moe plan calibrate`."""
    from moe import plan
    from moe.plan.calibrate import append_row

    flop = p.tokens * plan.flops_per_token(cfg, min(seq_len, cfg.max_seq_len))
    weights = 4 * plan.params(cfg).total * p.passes
    print(f"{p.tokens:,} tokens in {seconds:.1f} s: {flop / seconds / 1e9:,.1f} GFLOP/s by the planner's count")
    if out is not None:
        row = {"kind": "profile", "name": cfg.name, "tokens": p.tokens, "flop": flop, "bytes": weights}
        append_row(out.with_name("plan.csv"), {**row, "seconds": seconds})


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
    table(f"{p.tokens:,} tokens in {p.passes:,} passes", columns, rows)
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
            table(f"share of {one} / {other} that an expert serves, ± standard error; {sizes}", columns, rows)


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
    table(f"layer {layer}: the tokens an expert serves most above its share", ["expert", "load", "tokens"], rows)


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
