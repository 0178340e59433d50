"""`moe profile step`: where the time of a step goes, on the command line. As in main.py, imports wait until it runs."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from moe.cli.flags import Settings, assignments, within
from moe.cli.show import check_pictures, print_table

if TYPE_CHECKING:
    from moe.model import Transformer
    from moe.plan.work import What
    from moe.profile import Run


def step(
    model: Positional[str],
    /,
    *,
    what: Literal["forward", "backward", "train", "decode"] = "train",
    batch: int = 8,
    seq_len: int | None = None,
    context: int | None = None,
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    set_: Settings = (),
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
        out: Write all figures to this JSON file, and append a row for moe plan calibrate to plan.csv beside it.
        pictures: Draw time, roofline and memory into this directory.
        chrome: Write a trace for chrome://tracing or Perfetto.
        device: cuda or cpu. Default: cuda where there is one.
    """
    from moe import profile
    from moe.io.files import write_whole
    from moe.plan.calibrate import FILE, append_row
    from moe.profile import tables

    within("rounds", rounds, 1, 10**6)
    check_pictures(pictures)
    subject, run = _prepare_step(model, set_, what, batch, seq_len, context, dtype, device)
    found = profile.profile_step(subject, run, rounds=rounds)
    print_table(tables.parts(found))
    print(tables.ceilings(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, (json.dumps(dataclasses.asdict(found), indent=1) + "\n").encode())
        append_row(out.with_name(FILE), found.plan_row())
        print(f"all figures: {out}; a row for moe plan calibrate: {out.with_name(FILE)}")
    if pictures is not None or chrome is not None:
        if chrome is not None:
            chrome.parent.mkdir(parents=True, exist_ok=True)
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
    from moe.config import load_config
    from moe.device import pick_device, pick_dtype, tune_cpu
    from moe.errors import ConfigError
    from moe.train.optimizer import build

    where = pick_device(device)
    if where.type == "cpu":
        tune_cpu()
    trained = Path(name).is_dir()
    if trained and changes:
        raise ConfigError(f"--set {' '.join(changes[0])}: {name} is a checkpoint, whose shape is given")
    cfg = checkpoint.load_config_of(name) if trained else load_config(name)
    cfg = cfg.with_overrides(assignments(changes))
    length = seq_len if seq_len is not None else cfg.train.seq_len or cfg.max_seq_len
    for flag, value, low, high in (("batch", batch, 1, 2**20), ("seq-len", length, 1, cfg.max_seq_len)):
        if not low <= value <= high:
            raise ConfigError(f"--{flag} = {value}: must be from {low} to {high} ({cfg.name})")
    compute = pick_dtype(cfg.train, where) if dtype == "auto" else torch.bfloat16 if dtype == "bf16" else torch.float32
    # Training keeps its weights in float32; everything else has them as they are multiplied.
    stored = torch.float32 if what == "train" else compute
    if trained:
        model = checkpoint.load(Path(name), device=where).to(stored)
    else:
        model = profile.random_model(cfg, stored, where)
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
