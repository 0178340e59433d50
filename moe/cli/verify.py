"""`moe verify`: does a model over many processes train as in one? As in main.py, imports wait until it runs."""

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from moe.cli.flags import Settings, assignments, within
from moe.cli.show import SHOW, Output, Show, show_rows

if TYPE_CHECKING:
    from moe.config import Config
    from moe.parallel.degrees import Degrees
    from moe.parallel.verify import Row


def verify(
    config: Positional[str],
    /,
    *,
    mesh: Annotated[str, arg(metavar="DEGREES")] = "tp=2",
    schedule: str = "1f1b",
    microbatches: int = 0,
    zero: Literal["2", "3"] = "3",
    dtype: Literal["fp64", "fp32"] = "fp64",
    batch_size: int = 8,
    seq_len: int = 32,
    seed: int = 0,
    set_: Settings = (),
    show: Output = SHOW,
) -> int:
    """Run a training step on a mesh of processes and in one, and compare all that it has.

    Loss, the routers' losses and counts, the gradient's norm, every gradient, and the weights after a step of AdamW.
    The processes are started here, or are those of torchrun; they compute on the CPU. Status 1 if anything is off.

    Args:
        config: A shipped configuration or a TOML file: best a small one, as every tensor is compared whole.
        mesh: Such as tp=2,pp=2,dp=2,ep=2; also cp, dp_replicate, dp_shard.
        schedule: Of a pipeline: gpipe, 1f1b, interleaved-1f1b, looped-bfs, interleaved-zero-bubble, zbv, dualpipev.
        microbatches: Of a pipeline; 0 for one for each stage.
        zero: 3 drops weights between passes, 2 keeps them until the backward.
        dtype: fp64 holds to 1e-12, fp32 to 1e-5.
        batch_size: Sequences of the step.
        seq_len: Tokens of a sequence.
        seed: Of weights and tokens.
    """
    from moe.config import load_config
    from moe.parallel.degrees import Degrees

    within("batch-size", batch_size, 1, 10**6)
    within("seq-len", seq_len, 2, 10**6)
    cfg = load_config(config).with_overrides(assignments(set_))
    degrees = Degrees.parse(mesh, schedule=schedule, microbatches=microbatches, zero=int(zero))
    degrees.check(cfg, batch_size=batch_size, seq_len=min(seq_len, cfg.max_seq_len))
    how = {"batch_size": batch_size, "seq_len": min(seq_len, cfg.max_seq_len), "seed": seed}
    rows = _rows(cfg, degrees, {**how, "dtype": dtype})
    return 0 if rows is None else _report(rows, show, f"{cfg.name} over {degrees.world} processes: {mesh}, {dtype}")


def _rows(cfg: "Config", degrees: "Degrees", how: dict[str, Any]) -> "list[Row] | None":
    """Of ranks that are started here, or of those among which this process is; there only the first has them."""
    from moe.parallel.launch import inside, start

    if not inside():
        return start(_rank, degrees.world, cfg, degrees, how)[0]
    import torch.distributed as dist

    rows = _rank(cfg, degrees, how)
    return rows if dist.get_rank() == 0 else None


def _rank(cfg: "Config", degrees: "Degrees", how: dict[str, Any]) -> "list[Row]":
    import torch

    from moe.parallel.launch import join
    from moe.parallel.verify import verify

    join(degrees)
    dtype = {"fp64": torch.float64, "fp32": torch.float32}[how["dtype"]]
    return verify(cfg, degrees, **{**how, "dtype": dtype})


def _report(rows: "list[Row]", show: Show, title: str) -> int:
    wrong = [row for row in rows if not row.holds]
    # What is off first, then the worst of the rest; what is missing has no number.
    order = sorted(rows, key=lambda row: (row.holds, -row.error))
    table = [
        {"what": row.name, "error": row.error if math.isfinite(row.error) else None, "tolerance": row.tolerance,
         "holds": row.holds}
        for row in order
    ]  # fmt: skip
    show_rows(title, table, show, [{**row, "error": _or_missing(row["error"])} for row in table[: len(wrong) + 8]])
    verdict = f"{len(wrong)} of {len(rows)} are off, first {order[0].name}" if wrong else f"all {len(rows)} hold"
    print(f"{title}: {verdict}", file=sys.stderr)
    return 1 if wrong else 0


def _or_missing(error: object) -> object:
    return "missing or no number" if error is None else error
