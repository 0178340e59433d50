"""The scaling ladder: train small replicas, predict the loss of a larger one, then train that and see.

Read `plan_ladder` for how one configuration becomes many, `climb` for the order of things. Each replica is an ordinary
run of `moe.train.train` in a directory of its own, so that an interrupted ladder goes on where it stopped.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe import evaluate, plan
from moe.config import Config
from moe.data import TokenData
from moe.device import pick_device
from moe.errors import ConfigError, DataError
from moe.io.files import locked, write_whole
from moe.ladder.law import MIN_RUNGS, PowerLaw, fit, leave_one_out
from moe.train import console, identity, start, state
from moe.train.forecast import check_memory
from moe.train.identity import SUMMARY_FILE
from moe.train.loop import train
from moe.train.run import CONFIG_FILE
from moe.train.schedule import Schedule

LADDER_FILE = "ladder.json"
# DeepSeek LLM (arXiv:2401.02954), equation 1: the best batch grows as C^0.3271, the best rate falls as C^-0.1250.
# Fitted on dense models, 1e17 to 2e19 FLOP without those of the output layer; only the exponents are taken from there.
BATCH_EXPONENT, RATE_EXPONENT = 0.3271, -0.1250
EVALUATIONS, SAVES, LOGS = 4, 4, 40  # of a rung; more would be a large share of the smallest
MAX_PASSES = 4  # of the data: up to four, repeated tokens are worth nearly what new ones are (arXiv:2305.16264)


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Rung:
    """One replica: its configuration, `tokens` of training, `passes` of the data that these are, `flop` in all."""

    name: str
    cfg: Config
    tokens: int
    passes: float
    flop: float

    @property
    def active(self) -> int:
        """Parameters that a token uses, output layer included."""
        return plan.params(self.cfg).active["output"]


@dataclass(frozen=True)
class Ladder:
    """All that a ladder will do. `rungs` by rising compute; `base_flop` is the compute that `base` was tuned at."""

    base: Config
    base_flop: float
    tokens_per_parameter: float
    data_dir: Path
    data: str  # its fingerprint
    rungs: tuple[Rung, ...]
    held_out: Rung

    @property
    def notices(self) -> list[str]:
        """What is likely to spoil the prediction, in words."""
        found = []
        many = [f"{rung.name} {rung.passes:.1f}" for rung in (*self.rungs, self.held_out) if rung.passes > MAX_PASSES]
        if many:
            found.append(
                f"more than {MAX_PASSES} passes of the data ({', '.join(many)}): repeated tokens teach less and less, "
                "and the law does not know it; prepare more data or train on fewer `tokens_per_parameter`"
            )
        return found


def plan_ladder(
    base: Config,
    data_dir: str | Path,
    rungs: Sequence[str],
    held_out: str,
    *,
    tokens_per_parameter: float = 20.0,
) -> Ladder:
    """One configuration, at several sizes; builds no model and writes nothing.

    `base` is taken as tuned: its rates and batch are right for its own shape trained as long as it says, a compute of
    C0 FLOP. A replica of `Config.scaled`'s shape is trained on `tokens_per_parameter` tokens for each parameter that a
    token uses (20: Hoffmann et al. 2022), a compute of C, and gets

    - batch x (C / C0)^0.3271 and every learning rate x (C / C0)^-0.1250 (DeepSeek LLM, arXiv:2401.02954, equation 1).
      `muon_lr` moves as `lr` does: Muon's update is scaled by sqrt(max(1, rows / columns)) (moe/train/muon.py), which
      already makes its size right at every width, so what is left is the length of the run.
    - the same share of its tokens as warm-up, and everything else as it is, the schedule's shape included.

    Two configurations of this repository that were tuned by hand agree: from replica-nano to 300 steps of replica-small
    compute grows 15-fold, `lr` fell to 0.67 and `muon_lr` to 0.8 of what it was, and the rule says 0.71.

    Args:
        data_dir: what `moe.data.prepare` wrote.
        rungs: "WIDTHxLAYERS" of the replicas to fit, such as "96x2": four or more.
        held_out: that of the one to predict; it must take more compute than every rung.

    Raises:
        ConfigError: a shape that cannot be, too few rungs, one twice, a held-out replica that is not the largest, or a
            `base` with a batch ramp.
        DataError: the data are not documents, or do not fit the model.
    """
    data = TokenData.open(data_dir)
    data.check_compatible(base.vocab_size)
    if not any(len(data.tokens(source, "val")) for source in data.sources):
        raise DataError(f"{data_dir} has no held-out documents to measure a loss on: prepare more documents")
    _check_settings(base, rungs, tokens_per_parameter)
    stream = start.open_stream(base, data)
    schedule = Schedule(base.train, stream.seq_len, stream.windows_per_epoch)
    base_flop = _flop(base, schedule.windows * stream.seq_len)
    replicas = [
        _rung(base, base_flop, schedule, shape, tokens_per_parameter, stream.windows_per_epoch)
        for shape in (*rungs, held_out)
    ]
    names = [rung.name for rung in replicas]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given twice: each replica is trained once; give another size")
    *steps, top = replicas
    steps.sort(key=lambda rung: rung.flop)
    if top.flop <= steps[-1].flop:
        raise ConfigError(
            f"held_out = {top.name}: takes {top.flop:.3g} FLOP and {steps[-1].name} {steps[-1].flop:.3g}; a prediction "
            "is of a replica larger than every rung"
        )
    return Ladder(base, base_flop, tokens_per_parameter, Path(data_dir), data.fingerprint, tuple(steps), top)


def _check_settings(base: Config, rungs: Sequence[str], tokens_per_parameter: float) -> None:
    if base.train.batch_ramp:
        raise ConfigError(
            f'train.batch_ramp = {base.train.batch_ramp!r}: the rule moves one batch size; unset it ("") and '
            "set train.batch_size"
        )
    if not 0 < tokens_per_parameter <= 1e6:
        raise ConfigError(
            f"tokens_per_parameter = {tokens_per_parameter}: must be greater than 0, and at most 1e6; 20 is customary"
        )
    if len(rungs) < MIN_RUNGS:
        raise ConfigError(f"rungs = {' '.join(rungs)}: a fit needs {MIN_RUNGS} or more of them")


def _rung(base: Config, base_flop: float, base_run: Schedule, shape: str, ratio: float, windows_per_pass: int) -> Rung:
    """One replica under the rule of `plan_ladder`."""
    match = re.fullmatch(r"(\d+)x(\d+)", shape, re.ASCII)
    if not match or int(match[2]) == 0:
        raise ConfigError(f"{shape!r}: must be WIDTHxLAYERS, such as 192x4")
    name = f"{int(match[1])}x{int(match[2])}"
    t, seq_len = base.train, base_run.seq_len
    shaped = base.scaled(d_model=int(match[1]), n_layers=int(match[2]), name=f"{base.name}-{name}")
    wanted = ratio * plan.params(shaped).active["output"]
    growth = _flop(shaped, wanted) / base_flop
    batch, micro_batch = _batch(t.batch_size * growth**BATCH_EXPONENT, t.micro_batch)
    steps = max(1, round(wanted / (batch * seq_len)))
    # The share of the run that is warm-up, in steps of the first (and only) batch size.
    warmup = math.ceil(steps * t.warmup * t.batch_size / base_run.windows)
    recipe = dataclasses.replace(
        t,
        steps=steps,
        tokens="",
        batch_size=batch,
        micro_batch=micro_batch,
        lr=_rounded(t.lr * growth**RATE_EXPONENT),
        muon_lr=_rounded(t.muon_lr * growth**RATE_EXPONENT),
        warmup=min(warmup, steps),
        eval_every=math.ceil(steps / EVALUATIONS),
        save_every=math.ceil(steps / SAVES),
        sample_every=0,
        log_every=min(t.log_every, math.ceil(steps / LOGS)),
    )
    cfg = dataclasses.replace(shaped, train=recipe)
    tokens = steps * batch * seq_len
    return Rung(name, cfg, tokens, steps * batch / windows_per_pass, _flop(cfg, tokens))


def _flop(cfg: Config, tokens: float) -> float:
    """Of training on so many tokens, causal attention and the output layer included."""
    return plan.TRAINING * plan.flops_per_token(cfg, cfg.train.seq_len or cfg.max_seq_len) * tokens


def _batch(wanted: float, micro_batch: int) -> tuple[int, int]:
    """Sequences of a step and of a forward pass: near `wanted`, in equal passes of at most `micro_batch` (0: one)."""
    batch = max(1, round(wanted))
    if micro_batch == 0:
        return batch, 0
    passes = math.ceil(batch / micro_batch)
    each = max(1, round(batch / passes))
    return each * passes, each


def _rounded(rate: float) -> float:
    """Four digits: the config file of a rung is for reading, too."""
    return float(f"{rate:.4g}")


# ------------------------------------------------------------------------------------------------------------ climb


@dataclass(frozen=True)
class Measured:
    """A trained replica: nats per token and bits per byte over all held-out documents, and seconds of training."""

    loss: float
    bits_per_byte: float
    tokens_per_byte: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The loss of the held-out replica, as the law of all rungs has it and as far as those without one rung differ."""

    law: PowerLaw
    without_one: tuple[PowerLaw, ...]
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Climbed:
    """How far a ladder got: to its end, or where `signal` is not 0, to where that stopped it.

    `measured` has the rungs in order, so far as they are trained; `error` is (predicted - measured) / measured.
    """

    ladder: Ladder
    measured: tuple[Measured, ...] = ()
    prediction: Prediction | None = None
    held_out: Measured | None = None
    signal: int = 0

    @property
    def error(self) -> float | None:
        """Relative, of the prediction; None before the held-out replica is trained."""
        if self.prediction is None or self.held_out is None:
            return None
        return self.prediction.loss / self.held_out.loss - 1


def climb(
    ladder: Ladder,
    out: str | Path,
    *,
    device: str | None = None,
    reporter: Callable[[], console.Reporter] = console.Lines,
    announce: Callable[[Climbed], None] = lambda climbed: None,
) -> Climbed:
    """Trains the rungs, writes the prediction, trains the held-out replica, writes its error.

    Called again, it goes on where it stopped; what is complete is read, not trained.

    Args:
        out: gets a run for each replica in WIDTHxLAYERS/, and ladder.json, which has the prediction from before the
            held-out replica is begun, and its loss once that is trained. ladder.json depends on the runs alone, not on
            when they were interrupted.
        reporter: makes what shows the progress of one run.
        announce: called when the prediction is on disk, before the held-out replica is trained.

    Raises:
        ConfigError: a directory holds a run with another configuration, the rungs do not give a law, or ladder.json
            holds another prediction for a replica that is already measured.
        DataError: a run in `out` is of other data.
        InUseError: another process climbs there.
        TrainError, CheckpointError: as `moe.train.train`.
    """
    place = Path(out)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{place} is a file: choose another `out`")
    where = pick_device(device)
    with locked(place):
        for rung in (*ladder.rungs, ladder.held_out):  # before hours are spent
            _check_directory(rung, ladder, place / rung.name)
            check_memory(rung.cfg, where)
        return _climb(ladder, place, device, reporter, announce)


def _climb(
    ladder: Ladder,
    place: Path,
    device: str | None,
    reporter: Callable[[], console.Reporter],
    announce: Callable[[Climbed], None],
) -> Climbed:
    measured: list[Measured] = []
    for rung in ladder.rungs:
        result, signal = _trained(rung, ladder, place, device, reporter)
        if result is not None:
            measured.append(result)
        if signal:
            return Climbed(ladder, tuple(measured), signal=signal)
    climbed = Climbed(ladder, tuple(measured), _predict(ladder, measured))
    _keep(climbed, place)
    announce(climbed)
    result, signal = _trained(ladder.held_out, ladder, place, device, reporter)
    if result is None:
        return dataclasses.replace(climbed, signal=signal)
    climbed = dataclasses.replace(climbed, held_out=result)
    _write(climbed, place)
    return climbed


def _check_directory(rung: Rung, ladder: Ladder, run_dir: Path) -> None:
    """A run that is there must be this one, on this data. One that is not complete checks its data when it resumes."""
    file = run_dir / CONFIG_FILE
    changed = state.harmful(file.read_text(encoding="utf-8"), rung.cfg) if file.is_file() else []
    if changed:
        raise ConfigError(
            f"{run_dir} holds a run with another configuration: {', '.join(changed)}. Give the settings it had, or "
            "choose another `out`"
        )
    summary = identity.read_summary(run_dir / SUMMARY_FILE)
    if summary is not None and summary["data"] != ladder.data:
        raise DataError(
            f"{run_dir} was trained on other data than {ladder.data_dir} holds: losses on different text give no law; "
            "give the data it had, or choose another `out`"
        )
    if summary is not None:
        identity.check_same(summary, {"data": ladder.data, "from": None, "lora": None}, run_dir)


def _trained(
    rung: Rung, ladder: Ladder, place: Path, device: str | None, reporter: Callable[[], console.Reporter]
) -> tuple[Measured | None, int]:
    """What a run measured, trained now if it is not yet; and the number of the signal that came meanwhile, or 0."""
    file = place / rung.name / SUMMARY_FILE
    if file.is_file():
        return _measured(json.loads(file.read_text(encoding="utf-8"))), 0
    result = train(rung.cfg, ladder.data_dir, place / rung.name, device=device, reporter=reporter())
    return _measured(result.summary) if result.status == "complete" else None, result.signal


def _measured(summary: dict[str, Any]) -> Measured:
    score = evaluate.total({name: evaluate.Score(**s) for name, s in summary["held_out"].items()})
    nats = score.bits / score.tokens * math.log(2)
    return Measured(nats, score.bits_per_byte, score.tokens / score.bytes, summary["train_seconds"])


def _predict(ladder: Ladder, measured: Sequence[Measured]) -> Prediction:
    compute, losses = [rung.flop for rung in ladder.rungs], [m.loss for m in measured]
    law, others = fit(compute, losses), leave_one_out(compute, losses)
    loss = law.loss(ladder.held_out.flop)
    all_ = [loss, *(other.loss(ladder.held_out.flop) for other in others)]
    return Prediction(law, tuple(others), loss, min(all_), max(all_))


# ------------------------------------------------------------------------------------------------------------- file


def _keep(climbed: Climbed, place: Path) -> None:
    """Writes the prediction, or leaves what is there where it is the same; another one would come after the fact."""
    assert climbed.prediction is not None
    file, name, loss = place / LADDER_FILE, climbed.ladder.held_out.name, climbed.prediction.loss
    if file.is_file():
        before = _read(file)
        if before["name"] != name:
            raise ConfigError(
                f"{file} has the prediction for {before['name']}, and this is one for {name}: move it away to go on "
                "with the same replicas, or choose another `out`"
            )
        if math.isclose(before["predicted_loss"], loss, rel_tol=1e-6):
            return
        if before["loss"] is not None:
            raise ConfigError(
                f"{file} has the prediction {before['predicted_loss']:.4f} for {name}, made before its loss was "
                f"measured; these rungs give {loss:.4f}. Predict another replica (`held_out`), or give the rungs it "
                "was made with"
            )
    _write(climbed, place)


def _read(file: Path) -> dict[str, Any]:
    """What a ladder.json says of its held-out replica."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["held_out"]
        return {"name": found["name"], "predicted_loss": float(found["predicted_loss"]), "loss": found["loss"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} is not of a ladder, or damaged: move it away, or choose another `out`") from None


def _write(climbed: Climbed, place: Path) -> None:
    text = json.dumps(record(climbed), indent=2) + "\n"
    write_whole(place / LADDER_FILE, text.encode())


def record(climbed: Climbed) -> dict[str, Any]:
    """What ladder.json holds: base, rule, rungs with their losses, law, prediction, and what came of it."""
    ladder, p = climbed.ladder, climbed.prediction
    assert p is not None
    to_bits = climbed.measured[0].tokens_per_byte / math.log(2)
    rungs = [_row(rung, m) for rung, m in zip(ladder.rungs, climbed.measured, strict=True)]
    held_out = {
        **_row(ladder.held_out, climbed.held_out),
        "predicted_loss": p.loss,
        "predicted_low": p.low,
        "predicted_high": p.high,
        "predicted_bits_per_byte": p.loss * to_bits,
        "relative_error": climbed.error,
    }
    return {
        "config": ladder.base.name,
        "base": {"flop": ladder.base_flop, **_recipe(ladder.base)},
        "rule": {"batch": BATCH_EXPONENT, "rate": RATE_EXPONENT, "tokens_per_parameter": ladder.tokens_per_parameter},
        "data": ladder.data,
        "rungs": rungs,
        "law": asdict(p.law),
        "laws_without_one": [
            {"without": rung.name, **asdict(law), "predicted_loss": law.loss(ladder.held_out.flop)}
            for rung, law in zip(ladder.rungs, p.without_one, strict=True)
        ],
        "held_out": held_out,
    }


def _row(rung: Rung, measured: Measured | None) -> dict[str, Any]:
    return {
        "name": rung.name,
        "parameters": plan.params(rung.cfg).total,
        "active_parameters": rung.active,
        "tokens": rung.tokens,
        "flop": rung.flop,
        **_recipe(rung.cfg),
        "loss": measured.loss if measured else None,
        "bits_per_byte": measured.bits_per_byte if measured else None,
    }


def _recipe(cfg: Config) -> dict[str, Any]:
    t = cfg.train
    muon = {"muon_lr": t.muon_lr} if t.optimizer == "muon" else {}
    return {"steps": t.steps, "batch_size": t.batch_size, "lr": t.lr, **muon, "warmup": t.warmup}
