"""The training script: open the run, step until done, finish. Read `train` first.

Nothing here waits for the device between log points, and a run that is resumed gives the same losses, to the last
digit, as one that was never interrupted (on one machine with one number of threads).
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe import checkpoint, plan
from moe.config import Config
from moe.data import Mixture, TokenData, compression
from moe.model import Output, Transformer
from moe.profile import load_entropy
from moe.tokenizer import Tokenizer
from moe.train import console, evaluate, pictures, predicted, state
from moe.train import device as devices
from moe.train.cpu import tune_cpu
from moe.train.metrics import Meter, MetricsLog
from moe.train.optimizer import Optimizers, build
from moe.train.schedule import lr_scale
from moe.train.stop import Stop, StopRequested
from moe.train.watch import TrainError, Watch

CONFIG_FILE = "config.toml"
SUMMARY_FILE = "summary.json"
FINAL = "final"


@dataclass(frozen=True)
class Result:
    """How a run ended: "complete" (`summary` is what summary.json holds) or "stopped" by `signal`, to be resumed."""

    status: Literal["complete", "stopped"]
    step: int
    run_dir: Path
    summary: dict[str, Any] = field(default_factory=dict)
    signal: int = 0


def train(
    cfg: Config,
    data_dir: str | Path,
    run_dir: str | Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    device: str | None = None,
    reporter: console.Reporter | None = None,
) -> Result:
    """Trains the model of `cfg` on prepared data; all results are in `run_dir`.

    Args:
        data_dir: what `moe.data.prepare` wrote.
        run_dir: gets config.toml, metrics.jsonl, samples.txt, tensorboard/, checkpoints/, and at the end final/ (for
            `moe.load`), summary.json and pictures/.
        resume: "auto" goes on from the newest checkpoint in `run_dir`; "never" moves an older run there aside.
        device: "cuda" or "cpu"; None takes CUDA where there is one.
        reporter: shows progress; None prints lines. See moe.train.console.

    Raises:
        ConfigError: `run_dir` holds a run with another configuration.
        DataError: the data are not prepared, not the ones of the run in `run_dir`, or do not fit the model.
        CheckpointError: a checkpoint cannot be written or read; the ones before are intact.
        TrainError: the loss is not finite or has exploded; the last good checkpoint is intact.
    """
    reporter = reporter or console.Lines()
    with Stop() as stop, reporter:
        finished = _already_finished(cfg, Path(run_dir), resume)
        if finished is not None:
            reporter.note(f"the run in {run_dir} is complete; start it anew with --fresh, or choose another --out")
            return finished
        run = _open(cfg, Path(data_dir), Path(run_dir), resume, device, reporter, stop)
        t = cfg.train
        try:
            while run.step < t.steps and not stop.signal:
                _train_step(run)
                reporter.step(run.step)
                if _due(run, t.log_every):
                    _log(run)
                if t.eval_tokens and _due(run, t.eval_every):
                    _evaluate(run)
                if _due(run, t.sample_every):
                    _sample(run)
                if _due(run, t.save_every) or run.step == t.steps or stop.signal:
                    _save(run)
            if run.step == t.steps:
                return Result("complete", run.step, run.dir, _finish(run))
        except StopRequested:
            pass  # during the final evaluation; the checkpoint is on disk
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"out of memory with train.micro_batch = {run.micro_batch}: halve it, or set "
                f"train.activation_checkpointing = true ({str(error).splitlines()[0]})"
            ) from error
        finally:
            run.log.close()
        return Result("stopped", run.step, run.dir, signal=stop.signal)


@dataclass
class _Run:
    """All that the steps of a run share. `step` and `sample` count what is done."""

    cfg: Config
    dir: Path
    data: TokenData
    tokenizer: Tokenizer
    mixture: Mixture
    device: torch.device
    dtype: torch.dtype
    model: Transformer
    forward: Any
    optimizers: Optimizers
    meter: Meter
    watch: Watch
    log: MetricsLog
    reporter: console.Reporter
    stop: Stop
    peak_flops: float
    byte_lengths: np.ndarray
    tokens_per_byte: float
    memory_before: int  # bytes that the process held before the model was there
    step: int = 0
    sample: int = 0
    seconds: float = 0.0  # of training, without evaluation, samples and saving, up to `mark`
    mark: float = field(default_factory=time.perf_counter)

    @property
    def seq_len(self) -> int:
        return self.mixture.seq_len

    @property
    def micro_batch(self) -> int:
        return self.cfg.train.micro_batch or self.cfg.train.batch_size

    @property
    def tokens(self) -> int:
        return self.sample * self.seq_len


# -------------------------------------------------------------------------------------------------------- beginning


def _already_finished(cfg: Config, run_dir: Path, resume: str) -> Result | None:
    summary = run_dir / SUMMARY_FILE
    if resume == "never" or not summary.is_file():
        return None
    state.check_same_config((run_dir / CONFIG_FILE).read_text(encoding="utf-8"), cfg, run_dir)
    content = json.loads(summary.read_text(encoding="utf-8"))
    return Result("complete", content["step"], run_dir, content)


def _open(
    cfg: Config, data_dir: Path, run_dir: Path, resume: str, device_name: str | None, reporter: Any, stop: Stop
) -> _Run:
    """Everything ready for the next step: a new run's first one, or the one after the newest checkpoint."""
    device = devices.pick_device(device_name)
    dtype = devices.pick_dtype(cfg.train, device)
    if device.type == "cpu":
        tune_cpu()
    data = TokenData.open(data_dir)
    data.check_compatible(cfg.vocab_size)
    mixture = Mixture(data, cfg.train.seq_len or cfg.max_seq_len, cfg.train.seed)
    found = _enter(run_dir, resume)
    saved = state.load_training(found) if found is not None else None
    if saved is not None:
        state.check_same_config(saved["config"], cfg, run_dir)
        mixture.check_resume(saved["mixture"])
    (run_dir / CONFIG_FILE).write_text(cfg.to_toml(), encoding="utf-8")
    memory_before = predicted.memory_in_use(device)
    model = _model(cfg, device, found)
    tokenizer = data.tokenizer()
    text = sum(data.n_bytes(source, "train") for source in data.sources)
    run = _Run(
        cfg=cfg,
        dir=run_dir,
        data=data,
        tokenizer=tokenizer,
        mixture=mixture,
        device=device,
        dtype=dtype,
        model=model,
        forward=torch.compile(model) if cfg.train.compile else model,
        optimizers=build(model, cfg.train),
        meter=Meter(cfg.n_layers, cfg.experts.n_experts, device),
        watch=Watch(cfg.train, cfg.router),
        log=MetricsLog(run_dir, saved["step"] if saved else 0, saved["files"] if saved else None),
        reporter=reporter,
        stop=stop,
        peak_flops=devices.peak_flops(device, dtype),
        byte_lengths=evaluate.byte_lengths(tokenizer),
        tokens_per_byte=sum(len(data.tokens(source, "train")) for source in data.sources) / text,
        memory_before=memory_before,
    )
    if saved is not None:
        _restore(run, saved)
    _introduce(run, resumed_from=found)
    return run


def _enter(run_dir: Path, resume: str) -> Path | None:
    """Makes the run's directory; the checkpoint to resume from, if any."""
    if run_dir.exists() and not run_dir.is_dir():
        raise TrainError(f"run directory {run_dir} is a file: choose another --out")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        if not (run_dir / CONFIG_FILE).is_file():
            raise TrainError(f"run directory {run_dir} exists and is not a run: choose a new or an empty --out")
        if resume == "never":
            n = 1
            while (aside := run_dir.with_name(f"{run_dir.name}-old-{n}")).exists():
                n += 1
            run_dir.rename(aside)
    run_dir.mkdir(parents=True, exist_ok=True)
    state.remove_unfinished(run_dir)
    return state.latest(run_dir)


def _model(cfg: Config, device: torch.device, found: Path | None) -> Transformer:
    if found is None:
        with device:
            model = Transformer(cfg, cfg.train.seed)
    else:
        with torch.device("meta"):
            model = Transformer(cfg)
        checkpoint.load_weights(model, found, device=device)
    model.activation_checkpointing = cfg.train.activation_checkpointing
    return model


def _restore(run: _Run, saved: dict[str, Any]) -> None:
    run.step, run.sample, run.seconds = saved["step"], saved["sample"], saved["seconds"]
    run.optimizers.load_state_dict(saved["optimizers"])
    run.meter.load_state_dict(saved["meter"])
    run.watch.load_state_dict(saved["watch"])
    state.set_rng_state(saved["rng"], run.device)


def _introduce(run: _Run, resumed_from: Path | None) -> None:
    counts = plan.params(run.cfg)
    sizes = ", ".join(f"{s} {len(run.data.tokens(s, 'train')):,}" for s in run.data.sources)
    t = run.cfg.train
    run.reporter.start(run.cfg, run.step, run.tokens_per_byte)
    run.reporter.note(
        f"{run.cfg.name}: {counts.total:,} parameters, {counts.active['output']:,} active per token; "
        f"{t.steps:,} steps of {t.batch_size} x {run.seq_len} tokens on {run.device.type} "
        f"({str(run.dtype).removeprefix('torch.')}); training tokens: {sizes}"
    )
    if resumed_from is not None:
        run.reporter.note(f"resumed from {resumed_from}")
    if not run.log.has_tensorboard:
        run.reporter.note('no TensorBoard events: tensorboard is not installed (pip install "gpt4-moe[train]")')


# ------------------------------------------------------------------------------------------------------------ steps


def _due(run: _Run, every: int) -> bool:
    return every > 0 and (run.step % every == 0 or run.step == run.cfg.train.steps)


def _train_step(run: _Run) -> None:
    """One optimizer step: the gradient of `batch_size` windows, `micro_batch` at a time."""
    t = run.cfg.train
    inputs, targets = (_to(run.device, part) for part in run.mixture.batch(run.sample, t.batch_size))
    n_micro = t.batch_size // run.micro_batch
    scalars: dict[str, Tensor] = {}
    counts_LE = torch.zeros_like(run.meter.counts_LE)
    for tokens_BS, targets_BS in zip(inputs.split(run.micro_batch), targets.split(run.micro_batch), strict=True):
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
            out: Output = run.forward(tokens_BS, targets_BS)
        assert out.loss is not None
        (out.loss / n_micro).backward()
        # All windows have the same number of targets: the mean over micro-batches is the mean over the batch.
        for name, value in {"loss": out.loss, **out.losses}.items():
            scalars[name] = scalars.get(name, 0) + value.detach() / n_micro
        counts_LE += torch.stack([routing.counts_E for routing in out.routing])
    scalars["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.model.parameters(), t.grad_clip)
    run.optimizers.set_lr(lr_scale(run.step, t))
    run.optimizers.step()
    run.optimizers.zero_grad()
    for block, counts_E in zip(run.model.blocks, counts_LE, strict=True):
        block.moe.router.update_bias(counts_E)  # type: ignore[union-attr]
    run.meter.add(scalars, counts_LE)
    run.step += 1
    run.sample += t.batch_size


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _log(run: _Run) -> None:
    """Reads the meters, the only regular wait for the device, and writes a record."""
    t = run.cfg.train
    means = run.meter.means()
    run.watch.check_finite(run.step, means["loss"], means["grad_norm"])
    now = time.perf_counter()
    elapsed, steps = now - run.mark, run.meter.steps
    run.seconds, run.mark = run.seconds + elapsed, now
    rate = steps * t.batch_size * run.seq_len / elapsed if steps else math.nan
    load = run.meter.load()
    flops = 3 * plan.flops_per_token(run.cfg, run.seq_len)  # the backward pass takes twice the forward's
    record = {
        "kind": "train",
        "step": run.step,
        "tokens": run.tokens,
        **means,
        "lr": t.lr * lr_scale(run.step - 1, t),
        "tokens_per_second": rate,
        "mfu": rate * flops / run.peak_flops,
        "load": load,
        "load_max_over_mean": max(max(layer) * len(layer) for layer in load),
        "load_entropy": load_entropy(torch.tensor(load, dtype=torch.float64)).min().item(),
    }
    run.meter.reset()
    run.log.write(record)
    run.reporter.train(record, seconds_per_step=elapsed / max(1, steps))
    for alarm in run.watch.check_load(run.step, load):
        run.log.write({"kind": "alarm", "step": run.step, "text": alarm})
        run.reporter.note(alarm)
    run.watch.check(run.step, means["lm"])


@contextmanager
def _untimed(run: _Run) -> Iterator[None]:
    """What happens inside does not count as training time."""
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    started = time.perf_counter()
    try:
        yield
    finally:
        run.mark += time.perf_counter() - started


def _evaluate(run: _Run) -> None:
    with _untimed(run):
        windows = evaluate.some_windows(run.data, run.seq_len, run.cfg.train.eval_tokens)
        scores = evaluate.evaluate(run.model, windows, run.byte_lengths, batch=run.micro_batch, dtype=run.dtype)
        record = {"kind": "eval", "step": run.step, "tokens": run.tokens, "bits_per_byte": _per_byte(scores)}
        run.log.write(record)
        run.reporter.evaluation(record)


def _per_byte(scores: dict[str, evaluate.Score]) -> dict[str, float]:
    return {name: s.bits_per_byte for name, s in {**scores, "total": evaluate.total(scores)}.items()}


def _sample(run: _Run) -> list[dict[str, str]]:
    with _untimed(run):
        samples = evaluate.draw_samples(run.model, run.tokenizer)
        run.log.write_samples(run.step, samples)
        run.reporter.samples(run.step, samples)
    return samples


def _save(run: _Run) -> None:
    """A checkpoint, unless the steps since the last log point went wrong: the one before is then the last good one."""
    means = run.meter.means()
    run.watch.check_finite(run.step, means["loss"], means["grad_norm"])
    with _untimed(run):
        training = {
            "config": run.cfg.to_toml(),
            "mixture": run.mixture.fingerprint,
            "step": run.step,
            "sample": run.sample,
            "seconds": run.seconds,
            "optimizers": run.optimizers.state_dict(),
            "meter": run.meter.state_dict(),
            "watch": run.watch.state_dict(),
            "rng": state.rng_state(run.device),
            "files": run.log.sizes(),
        }
        place = state.save(run.dir, run.step, run.model, run.tokenizer, training)
        run.reporter.saved(run.step, place)


# -------------------------------------------------------------------------------------------------------------- end


def _finish(run: _Run) -> dict[str, Any]:
    """The whole held-out text, samples, `final/`, `summary.json`, pictures. Done again if it is interrupted."""
    memory_peak = predicted.memory_peak(run.device)
    tokens = evaluate.count_scored(run.data)

    def progress(scored: int) -> None:
        if run.stop.signal:
            raise StopRequested
        run.reporter.progress("final evaluation", scored, tokens)

    windows = evaluate.all_windows(run.data, run.seq_len)
    scores = evaluate.evaluate(
        run.model, windows, run.byte_lengths, batch=run.micro_batch, dtype=run.dtype, progress=progress
    )
    summary = {
        "name": run.cfg.name,
        "step": run.step,
        "tokens": run.tokens,
        "parameters": plan.params(run.cfg).total,
        "active_parameters": plan.params(run.cfg).active["output"],
        "train_seconds": run.seconds,
        "tokens_per_second": run.tokens / run.seconds if run.seconds else None,
        "bits_per_byte": _per_byte(scores),
        "compression": compression(run.data),
        "held_out": {name: asdict(score) for name, score in scores.items()},
        "data": run.data.fingerprint,
    }
    if run.seconds:
        summary["plan"], line = predicted.compare(
            run.cfg, run.dir, run.device, run.dtype, before=run.memory_before, peak=memory_peak,
            seconds_per_step=run.seconds / run.step, peak_flops=run.peak_flops,
        )  # fmt: skip
        run.reporter.note(line)
    _sample(run)
    run.log.write(
        {"kind": "final", **{key: summary[key] for key in ("step", "tokens", "bits_per_byte", "compression")}}
    )
    checkpoint.save(run.model, run.dir / FINAL, tokenizer=run.tokenizer)
    drawn = pictures.draw(run.dir)
    if drawn is None:
        run.reporter.note('no pictures: matplotlib is not installed (pip install "gpt4-moe[plot]")')
    # Last, since its presence says that the run is complete.
    (run.dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    run.reporter.finish(summary, run.dir)
    return summary
