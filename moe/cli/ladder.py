"""`moe ladder`: small replicas, a prediction, a larger replica. As in main.py, imports wait until it runs."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from moe.cli.flags import Flag, Settings, assignments
from moe.cli.show import draw_table
from moe.cli.usage import in_flags

if TYPE_CHECKING:
    from moe.ladder.rungs import Climbed, Ladder

FLAGS = ("--tokens-per-parameter", "--rungs", "--held-out")  # what notices speak of


def ladder(
    config: Positional[str],
    /,
    *,
    data: Path,
    out: Path,
    rungs: tuple[str, ...],
    held_out: str,
    tokens_per_parameter: float = 20.0,
    set_: Settings = (),
    device: str | None = None,
    dry_run: Flag = False,
) -> int:
    """Train replicas of growing size, predict a larger one's loss, train it and print the error.

    Rates and batch are those of the configuration, moved to each replica's compute by the rule of DeepSeek LLM
    (arXiv:2401.02954); interrupted, the same command goes on where it stopped.

    Args:
        config: A shipped configuration (replica-nano, ...) or a TOML file, tuned at its own size and length.
        data: Prepared data (moe data prepare).
        out: Directory; each replica is a run in OUT/WIDTHxLAYERS. Gets ladder.json and ladder.png.
        rungs: WIDTHxLAYERS of four replicas or more, such as 96x2 96x4 192x2 192x4. Widths are multiples of 96.
        held_out: WIDTHxLAYERS of the larger replica to predict.
        tokens_per_parameter: Training tokens of a replica, for each parameter that a token uses.
        set_: Settings to change in the configuration, such as train.lr=3e-4.
        device: cuda or cpu. Default: cuda where there is one.
        dry_run: Print what would be trained, and what it would take, and start nothing.
    """
    from moe.config import load_config
    from moe.io import figures
    from moe.ladder.picture import draw
    from moe.ladder.rungs import LADDER_FILE, climb, plan_ladder
    from moe.train import console

    cfg = load_config(config).with_overrides(assignments(set_))
    steps = plan_ladder(cfg, data, rungs, held_out, tokens_per_parameter=tokens_per_parameter)
    _print_plan(steps, device)
    if not figures.can_draw():
        print(figures.NO_PICTURES)
    if dry_run:
        return 0

    def announce(climbed: "Climbed") -> None:
        _print_rungs(climbed)
        draw(climbed, out)

    result = climb(steps, out, device=device, reporter=console.reporter, announce=announce)
    if result.signal:
        n = len(steps.rungs) + 1
        with contextlib.suppress(OSError):  # the terminal may be what was closed
            print(f"stopped with {len(result.measured)} of {n} replicas trained; the same command goes on from there")
        return 128 + result.signal
    _print_end(result)
    picture = draw(result, out)
    print(f"all figures: {out / LADDER_FILE}; picture: {picture}" if picture else f"all figures: {out / LADDER_FILE}")
    return 0


def _print_plan(steps: "Ladder", device: str | None) -> None:
    from moe import plan
    from moe.ladder.rungs import BATCH_EXPONENT, RATE_EXPONENT
    from moe.train.console import clock
    from moe.train.forecast import forecast

    muon = steps.base.train.optimizer == "muon"
    columns = ["replica", "parameters", "used per token", "tokens", "passes", "batch", "steps", "lr"]
    columns += ["muon lr"] * muon + ["FLOP", "memory", "time at best"]
    replicas = (*steps.rungs, steps.held_out)
    forecasts = [forecast(rung.cfg, steps.data_dir, device) for rung in replicas]
    # Each forecast measures the machine anew, beside whatever else it does: the best holds for all.
    rate = max(rung.flop / f.seconds for rung, f in zip(replicas, forecasts, strict=True))
    rows, notices = [], list(steps.notices)
    for rung, f in zip(replicas, forecasts, strict=True):
        t, gib = rung.cfg.train, 2**30
        row = [rung.name, f"{plan.params(rung.cfg).total:,}", f"{rung.active:,}", f"{rung.tokens:,}"]
        row += [f"{rung.passes:.2f}", f"{t.batch_size:,}", f"{t.steps:,}", f"{t.lr:g}"] + [f"{t.muon_lr:g}"] * muon
        rows.append([*row, f"{rung.flop:.3g}", f"{f.memory / gib:.2f} GiB", clock(rung.flop / rate)])
        if f.available and f.memory > f.available:
            notices.append(
                f"{rung.name} needs {f.memory / gib:.1f} of {f.available / gib:.1f} GiB: set train.micro_batch, or "
                "train.activation_checkpointing=selective"
            )
    title = (
        f"{steps.base.name}, taken as tuned at {steps.base_flop:.3g} FLOP (C0): batch x (C/C0)^{BATCH_EXPONENT:g}, "
        f"rates x (C/C0)^{RATE_EXPONENT:g}; the last replica is held out"
    )
    draw_table(title, columns, rows, words=("replica",))
    seconds = sum(rung.flop for rung in replicas) / rate
    print(f"{clock(seconds)} in all if every product ran at this machine's best rate; small replicas are far from it")
    for line in notices:
        print(f"notice: {in_flags(line, FLAGS)}")


def _print_rungs(climbed: "Climbed") -> None:
    """The rungs as measured, the law, and the prediction."""
    p, ladder = climbed.prediction, climbed.ladder
    assert p is not None
    rows = []
    for rung, measured in zip(ladder.rungs, climbed.measured, strict=True):
        law = p.law.loss(rung.flop)
        rows.append(
            [rung.name, f"{rung.flop:.3g}", f"{measured.loss:.4f}", f"{law:.4f}", f"{law / measured.loss - 1:+.2%}"]
        )
        rows[-1].append(f"{measured.bits_per_byte:.3f}")
    columns = ["replica", "FLOP", "nats/token", "law", "law is off by", "bits/byte"]
    draw_table("held-out loss of the rungs", columns, rows, words=("replica",))
    times = ladder.held_out.flop / ladder.rungs[-1].flop
    print(
        f"{p.law}; without one rung, its exponent is {_range([law.exponent for law in p.without_one], '.3f')}\n"
        f"predicted from the rungs alone for {ladder.held_out.name}, at {times:.1f} times the compute of the largest: "
        f"{p.loss:.4f} nats/token ({_range([p.low, p.high], '.4f')} without one rung)",
        flush=True,
    )


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _print_end(climbed: "Climbed") -> None:
    p, measured, name = climbed.prediction, climbed.held_out, climbed.ladder.held_out.name
    assert p is not None
    assert measured is not None
    predicted_bits = measured.bits_per_byte * p.loss / measured.loss
    rows = [
        ["predicted", f"{p.loss:.4f}", f"{predicted_bits:.4f}"],
        ["measured", f"{measured.loss:.4f}", f"{measured.bits_per_byte:.4f}"],
        ["error", f"{climbed.error:+.2%}", f"{climbed.error:+.2%}"],
    ]
    draw_table(f"{name}, held out", ["", "nats/token", "bits/byte"], rows, words=("",))
