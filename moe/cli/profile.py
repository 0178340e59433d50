"""`moe profile`: what the router does, on the command line.

As in main.py, commands import what they need when they run.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tyro.conf import Positional

from moe.cli.flags import within
from moe.cli.profile_step import step
from moe.cli.show import check_pictures, print_table
from moe.errors import ConfigError, TraceError

if TYPE_CHECKING:
    from moe.profile.subject import Subject, Text

SEQ_LEN = 256  # tokens of a sequence, where a model was trained at no less

profile_app = tyro.extras.SubcommandApp()
profile_app.command(step)


@profile_app.command
def routing(
    checkpoint: Positional[Path],
    /,
    *,
    data: Path | None = None,
    text: tuple[str, ...] = (),
    tokens: int = 65536,
    seq_len: int | None = None,
    batch: int = 16,
    trace: Path | None = None,
    out: Path | None = None,
    pictures: Path | None = None,
    device: str | None = None,
) -> int:
    """Run held-out text through a model and show what its routers do with it.

    Args:
        checkpoint: A run of moe train (or RUN/final), any checkpoint of this program, or a Hugging Face directory.
        data: Prepared data (moe data prepare); each of its sources is looked at apart, too.
        text: Instead of data: text files, as PATH or NAME=PATH, for the checkpoint's own tokenizer.json.
        tokens: About how many held-out tokens.
        seq_len: Tokens of a sequence. Default: 256, or what the model was trained at where that is less.
        batch: Sequences of a forward pass.
        trace: Record the routing here, for placement, serving, compare and replay.
        out: Write all figures to this JSON file.
        pictures: Draw load, sources and co-activation into this directory.
        device: cuda or cpu. Default: cuda where there is one.
    """
    from moe import profile
    from moe.io.files import is_taken
    from moe.profile import subject as subjects
    from moe.profile import tables

    length = _check(data, text, tokens, seq_len, batch, checkpoint)
    check_pictures(pictures)
    if trace is not None and is_taken(trace):
        raise TraceError(f"--trace {trace}: exists and is not an empty directory; choose another")
    subject = _subject(checkpoint, device)
    seen = _text(subject, data, text, tokens, length)
    p = subjects.profile_routing(subject, seen.windows, batch, trace)
    pairs = profile.closest_pairs(subject.model)
    print_table(tables.by_layer(p))
    print(tables.dead(p))
    if pairs:
        print_table(tables.duplicates(pairs))
    for table in tables.sources(p):
        print_table(table)
    try:
        print_table(tables.top_tokens(p, len(p.counts_LE) // 2, seen.show))
    except ValueError as error:
        print(f"no token classes: {error}")
    if out is not None:
        _write(out, json.dumps(tables.as_json(p, pairs), indent=1) + "\n")
        print(f"all figures: {out}")
    if pictures is not None:
        from moe.profile.pictures import draw

        draw(p, pictures)
        print(f"pictures: {pictures}")
    if trace is not None:
        print(f"trace: {trace}")
    return 0


@profile_app.command
def report(
    checkpoint: Positional[Path],
    /,
    *,
    data: Path | None = None,
    text: tuple[str, ...] = (),
    out: Path = Path("report.html"),
    tokens: int = 65536,
    seq_len: int | None = None,
    batch: int = 16,
    time_rounds: int = 5,
    device: str | None = None,
) -> int:
    """Write all that routing, serving and time show, with pictures, to one HTML file that needs no network.

    Where the checkpoint lies in a training run, the load over training is in it.

    Args:
        checkpoint: A run of moe train (or RUN/final), any checkpoint of this program, or a Hugging Face directory.
        data: Prepared data (moe data prepare); each of its sources is looked at apart, too.
        text: Instead of data: text files, as PATH or NAME=PATH, for the checkpoint's own tokenizer.json.
        out: The file.
        tokens: About how many held-out tokens.
        seq_len: Tokens of a sequence. Default: 256, or what the model was trained at where that is less.
        batch: Sequences of a forward pass.
        time_rounds: Passes to measure for the section on time (of our models); 0 leaves it out.
        device: cuda or cpu. Default: cuda where there is one.
    """
    from moe import profile
    from moe.model import Transformer
    from moe.profile import subject as subjects
    from moe.profile.report.page import Material, report
    from moe.profile.report.time import time_section
    from moe.profile.similarity import expert_bytes
    from moe.train.metrics import load_over_training

    length = _check(data, text, tokens, seq_len, batch, checkpoint)
    within("time-rounds", time_rounds, 0, 10**6)
    subject = _subject(checkpoint, device)
    seen = _text(subject, data, text, tokens, length)
    with tempfile.TemporaryDirectory() as place:
        p = subjects.profile_routing(subject, seen.windows, batch, Path(place, "trace"))
        ids_TLK = profile.Trace.open(Path(place, "trace")).ids_TLK(2**20)
    material = Material(
        name=str(checkpoint),
        text=str(data) if data is not None else ", ".join(text),
        profile=p,
        ids_TLK=ids_TLK,
        show=seen.show,
        pairs=profile.closest_pairs(subject.model),
        expert_bytes=expert_bytes(subject.model),
        training=load_over_training(checkpoint),
    )
    extra = []
    if isinstance(subject.model, Transformer) and time_rounds:
        extra.append(time_section(subject.model, subjects.equal_windows(subject, seen.windows, batch), time_rounds))
    _write(out, report(material, extra))
    print(f"report: {out}")
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
    from moe.profile import tables

    within("gpus", gpus, 1, 10**6)
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
    title = f"busiest GPU over the mean, {gpus} GPUs, {redundant} redundant; {judged}"
    print_table(tables.Table(title, ["layer", "round-robin", "placed"], rows))
    if out is not None:
        content = {"n_experts": opened.n_experts, "gpus": chosen.gpus}
        _write(out, json.dumps(content) + "\n")
        print(f"placement: {out}")
    return 0


@profile_app.command
def serving(
    trace: Positional[Path],
    /,
    *,
    config: str | None = None,
    bandwidth: float | None = None,
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
    from moe.plan.hardware import load_hardware
    from moe.profile import tables

    check_pictures(pictures)
    within("bits", bits, 1, 64)
    if bandwidth is not None:
        within("bandwidth", bandwidth, 1e-3, 1e9)
    expert_bytes = 0.0  # in all layers
    opened = profile.Trace.open(trace)
    if config is not None:
        cfg = load_config(config)
        if cfg.experts.n_experts != opened.n_experts:
            raise ConfigError(
                f"--config {config}: has {cfg.experts.n_experts} experts a layer, but {trace} {opened.n_experts}; "
                "give the configuration of the model that was traced"
            )
        expert_bytes = plan.params(cfg).expert * bits / 8
    if not opened.tokens:
        raise TraceError(f"{trace}: has no tokens; record one with moe profile routing --trace")
    found = profile.decode_steps(opened.ids_TLK(2**20), opened.n_experts)
    title = f"one decoding step of {trace}; uniform: independent choices at even load"
    if bandwidth is None:
        bandwidth = load_hardware("h100-sxm").bandwidth.to("GB/s")
    print_table(tables.steps(found, title, expert_bytes, bandwidth))
    if pictures is not None:
        from moe.profile.pictures import draw_serving

        print(f"picture: {draw_serving(found, opened.n_experts, pictures)}")
    return 0


@profile_app.command
def compare(
    one: Positional[Path],
    other: Positional[Path],
    /,
    *,
    data: Path | None = None,
    text: tuple[str, ...] = (),
    tokens: int = 65536,
    seq_len: int | None = None,
    batch: int = 16,
    device: str | None = None,
) -> int:
    """How two routings of the same tokens differ: train against serve, before against after fine-tuning.

    With data or text, two checkpoints are compared instead of two traces: the probabilities that they give the text's
    tokens, too.

    Args:
        one: A trace; or, with data or text, a checkpoint of this program or a Hugging Face directory.
        other: A trace of the same tokens; or a checkpoint of the same shape.
        data: Prepared data (moe data prepare), for two checkpoints.
        text: Instead of data: text files, as PATH or NAME=PATH, for the checkpoints' own tokenizer.json.
        tokens: About how many held-out tokens.
        seq_len: Tokens of a sequence. Default: 256, or what the model was trained at where that is less.
        batch: Sequences of a forward pass.
        device: cuda or cpu. Default: cuda where there is one.
    """
    from moe import profile
    from moe.profile import difference, tables

    if data is None and not text:
        print_table(tables.changes(profile.compare(profile.Trace.open(one), profile.Trace.open(other))))
        return 0
    length = _check(data, text, tokens, seq_len, batch, one, other)
    with tempfile.TemporaryDirectory() as place:
        readings = []
        for name, checkpoint in (("one", one), ("other", other)):  # one model in memory at a time
            subject = _subject(checkpoint, device)
            seen = _text(subject, data, text, tokens, length)
            readings.append(difference.read(subject, seen.windows, batch, Path(place, name)))
            del subject
        changes, routes = difference.compare_readings(*readings)
    print_table(tables.log_probability_changes(changes))
    print_table(tables.changes(routes))
    return 0


# ------------------------------------------------------------------------------------------------------------- parts


def _check(
    data: Path | None, text: tuple[str, ...], tokens: int, seq_len: int | None, batch: int, *checkpoints: Path
) -> int:
    """What can be known to be wrong before a model is loaded -> tokens of a sequence."""
    for flag, value in (("tokens", tokens), ("seq-len", 1 if seq_len is None else seq_len), ("batch", batch)):
        within(flag, value, 1, 10**12)
    if (data is not None) == bool(text):
        raise ConfigError(f"{'both' if text else 'neither'} of --data and --text: give one of them")
    return seq_len if seq_len is not None else min(SEQ_LEN, *map(_trained_at, checkpoints))


def _trained_at(checkpoint: Path) -> int:
    """The window that a checkpoint of this program was trained at, in tokens; of others nothing is known."""
    from moe import checkpoint as checkpoints

    place = checkpoints.locate(checkpoint)
    if not (place / checkpoints.CONFIG_FILE).is_file():
        return SEQ_LEN
    cfg = checkpoints.load_config_of(place)
    return cfg.train.seq_len or cfg.max_seq_len


def _subject(checkpoint: Path, device: str | None) -> "Subject":
    from moe.device import pick_device
    from moe.profile.subject import open_subject

    return open_subject(checkpoint, pick_device(device))


def _text(subject: "Subject", data: Path | None, text: tuple[str, ...], tokens: int, seq_len: int) -> "Text":
    """The windows that --data or --text ask for, at least one."""
    from moe.errors import SubjectError
    from moe.profile import subject as subjects

    if data is not None:
        found = subjects.prepared_text(subject, data, tokens, seq_len)
    else:
        found = subjects.text_of_files(subject, text, tokens, seq_len)
    if not found.windows:
        raise SubjectError(f"{data or ', '.join(text)}: no held-out text of two tokens; give more text")
    return found


def _write(file: Path, content: str) -> None:
    from moe.io.files import write_whole

    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content.encode())
