"""The training script: open the run, step until done, finish. Read `train` first.

Nothing here waits for the device between log points, and a run that is resumed gives the same losses, to the last
digit, as one that was never interrupted (on one machine with one number of threads).
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe import checkpoint, plan
from moe.config import Config, ConfigError
from moe.data import Batch, ConversationData, ConversationStream, Stream, TokenData, compression, open_data
from moe.kernels.reference import IGNORE_INDEX
from moe.model import Output, Transformer
from moe.profile import Pass
from moe.tokenizer import Tokenizer
from moe.train import console, evaluate, pictures, start, state, traces
from moe.train import device as devices
from moe.train.cpu import tune_cpu
from moe.train.lora import ADAPTER_FILE, LoraConfig, adapters, merged, save_adapter
from moe.train.metrics import Meter, MetricsLog
from moe.train.optimizer import Optimizers, build
from moe.train.schedule import Schedule
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
    start_from: str | Path | None = None,
    lora: LoraConfig | None = None,
    device: str | None = None,
    reporter: console.Reporter | None = None,
    trace_every: int = 0,
) -> Result:
    """Trains the model of `cfg` on prepared data; all results are in `run_dir`.

    Args:
        data_dir: what `moe.data.prepare` wrote, or `moe.data.prepare_conversations`, whose responses are learned.
        run_dir: gets config.toml, metrics.jsonl, samples.txt, tensorboard/, checkpoints/, and at the end final/ (for
            `moe.load`), summary.json and pictures/.
        resume: "auto" goes on from the newest checkpoint in `run_dir`; "never" moves an older run there aside.
        start_from: a checkpoint whose weights a new run begins with: the next stage of a recipe. Its shape must be that
            of `cfg`, but for the context and its rotations.
        lora: freeze these weights and train adapters on them. final/ then has them merged, and adapter.safetensors
            holds them alone.
        device: "cuda" or "cpu"; None takes CUDA where there is one.
        reporter: shows progress; None prints lines. See moe.train.console.
        trace_every: records the routing of every so many steps in `run_dir`/traces; 0 records none.

    Raises:
        ConfigError: `run_dir` holds a run with another configuration, `start_from` a model of another shape, `lora` has
            no `start_from`, or `trace_every` is negative.
        DataError: the data are not prepared, not the ones of the run in `run_dir`, or do not fit the model.
        CheckpointError: a checkpoint cannot be written or read; the ones before are intact.
        TrainError: the loss is not finite or has exploded; the last good checkpoint is intact.
    """
    if trace_every < 0:
        raise ConfigError(f"trace_every = {trace_every}: must be 0 (none) or more")
    reporter = reporter or console.Lines()
    with Stop() as stop, reporter:
        if lora is not None and start_from is None:
            raise ConfigError("lora without start_from: adapters belong on a trained model; name its checkpoint")
        finished = _already_finished(cfg, Path(run_dir), resume, lora)
        if finished is not None:
            reporter.note(f"the run in {run_dir} is complete; start it anew with --fresh, or choose another --out")
            return finished
        run = _open(cfg, Path(data_dir), Path(run_dir), resume, start_from, lora, device, reporter, stop)
        t = cfg.train
        try:
            while run.sample < run.schedule.windows and not stop.signal:
                _train_step(run, traced=trace_every > 0 and (run.step + 1) % trace_every == 0)
                reporter.step(run.step)
                if _due(run, t.log_every):
                    _log(run)
                if t.eval_tokens and _due(run, t.eval_every):
                    _evaluate(run)
                if _due(run, t.sample_every):
                    _sample(run)
                if _due(run, t.save_every) or run.complete or stop.signal:
                    _save(run)
            if run.complete:
                return Result("complete", run.step, run.dir, _finish(run))
        except StopRequested:
            pass  # during the final evaluation; the checkpoint is on disk
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"out of memory with train.micro_batch = {run.micro_batch}: halve it, or set "
                f"train.activation_checkpointing = selective or full ({str(error).splitlines()[0]})"
            ) from error
        finally:
            run.log.close()
        return Result("stopped", run.step, run.dir, signal=stop.signal)


@dataclass
class _Run:
    """All that the steps of a run share. `step` and `sample` count what is done."""

    cfg: Config
    dir: Path
    data: TokenData | ConversationData
    lora: LoraConfig | None
    tokenizer: Tokenizer
    stream: Stream
    schedule: Schedule
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
    step: int = 0
    sample: int = 0
    seconds: float = 0.0  # of training, without evaluation, samples and saving, up to `mark`
    mark: float = field(default_factory=time.perf_counter)
    marked_tokens: int = 0

    @property
    def seq_len(self) -> int:
        return self.stream.seq_len

    @property
    def micro_batch(self) -> int:
        return self.cfg.train.micro_batch or max(size for _, size in self.schedule.stages)

    @property
    def tokens(self) -> int:
        return self.sample * self.seq_len

    @property
    def complete(self) -> bool:
        return self.sample == self.schedule.windows

    @property
    def chat(self) -> bool:
        return isinstance(self.data, ConversationData)


# -------------------------------------------------------------------------------------------------------- beginning


def _already_finished(cfg: Config, run_dir: Path, resume: str, lora: LoraConfig | None) -> Result | None:
    summary = run_dir / SUMMARY_FILE
    if resume == "never" or not summary.is_file():
        return None
    state.check_same_config((run_dir / CONFIG_FILE).read_text(encoding="utf-8"), cfg, run_dir)
    content = json.loads(summary.read_text(encoding="utf-8"))
    start.check_same_lora(content.get("lora"), lora, run_dir)
    return Result("complete", content["step"], run_dir, content)


def _open(
    cfg: Config,
    data_dir: Path,
    run_dir: Path,
    resume: str,
    start_from: str | Path | None,
    lora: LoraConfig | None,
    device_name: str | None,
    reporter: Any,
    stop: Stop,
) -> _Run:
    """Everything ready for the next step: a new run's first one, or the one after the newest checkpoint."""
    device = devices.pick_device(device_name)
    dtype = devices.pick_dtype(cfg.train, device)
    if device.type == "cpu":
        tune_cpu()
    data = open_data(data_dir)
    data.check_compatible(cfg.vocab_size)
    t, stream = cfg.train, start.open_stream(cfg, data)
    if start_from is not None:
        start.check_start(cfg, data, Path(start_from))
    found = start.enter(run_dir, resume)
    saved = state.load_training(found) if found is not None else None
    if saved is not None:
        state.check_same_config(saved["config"], cfg, run_dir)
        start.check_same_lora(saved.get("lora"), lora, run_dir)
        stream.check_resume(saved["stream"])
    (run_dir / CONFIG_FILE).write_text(cfg.to_toml(), encoding="utf-8")
    model = start.open_model(cfg, device, found, start_from, lora)
    tokenizer = data.tokenizer()
    text = sum(data.n_bytes(source, "train") for source in data.sources)
    run = _Run(
        cfg=cfg,
        dir=run_dir,
        data=data,
        lora=lora,
        tokenizer=tokenizer,
        stream=stream,
        schedule=Schedule(t, stream.seq_len, stream.windows_per_epoch),
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
        tokens_per_byte=sum(data.n_tokens(source, "train") for source in data.sources) / text,
    )
    if saved is not None:
        _restore(run, saved)
    _introduce(run, resumed_from=found, start_from=start_from)
    return run


def _restore(run: _Run, saved: dict[str, Any]) -> None:
    run.step, run.sample, run.seconds = saved["step"], saved["sample"], saved["seconds"]
    run.marked_tokens = saved["marked_tokens"]
    run.optimizers.load_state_dict(saved["optimizers"])
    run.meter.load_state_dict(saved["meter"])
    run.watch.load_state_dict(saved["watch"])
    state.set_rng_state(saved["rng"], run.device)


def _introduce(run: _Run, resumed_from: Path | None, start_from: str | Path | None) -> None:
    counts = plan.params(run.cfg)
    sizes = ", ".join(f"{s} {run.data.n_tokens(s, 'train'):,}" for s in run.data.sources)
    run.reporter.start(run.schedule.steps, run.step, run.tokens_per_byte)
    what = "tokens of responses" if run.chat else "training tokens"
    run.reporter.note(
        f"{run.cfg.name}: {counts.total:,} parameters, {counts.active['output']:,} active per token; "
        f"{run.schedule.steps:,} steps of {_batch_sizes(run)} x {run.seq_len} tokens on {run.device.type} "
        f"({str(run.dtype).removeprefix('torch.')}); {what}: {sizes}"
    )
    if isinstance(run.stream, ConversationStream):
        for notice in run.stream.notices:
            run.reporter.note(notice)
    if run.lora is not None:
        trained = sum(p.numel() for p in adapters(run.model).values())
        run.reporter.note(f"LoRA of rank {run.lora.rank} on {' and '.join(run.lora.targets)}: {trained:,} are trained")
    if resumed_from is not None:
        run.reporter.note(f"resumed from {resumed_from}")
    elif start_from is not None:
        run.reporter.note(f"weights of {start_from}")
    if not run.log.has_tensorboard:
        run.reporter.note('no TensorBoard events: tensorboard is not installed (pip install "gpt4-moe[train]")')


def _batch_sizes(run: _Run) -> str:
    return " -> ".join(f"{size:,}" for _, size in run.schedule.stages)


# ------------------------------------------------------------------------------------------------------------ steps


def _due(run: _Run, every: int) -> bool:
    return every > 0 and (run.step % every == 0 or run.complete)


def _train_step(run: _Run, traced: bool) -> None:
    """One optimizer step: the gradient of the mean over all its targets, `micro_batch` windows at a time."""
    t = run.cfg.train
    count = run.schedule.batch(run.sample)
    batch = run.stream.batch(run.sample, count)
    n_targets = int((batch.targets != IGNORE_INDEX).sum())
    scalars: dict[str, Tensor] = {}
    counts_LE = torch.zeros_like(run.meter.counts_LE)
    passes: list[Pass] = []
    for begin in range(0, count, run.micro_batch):
        rows = slice(begin, min(begin + run.micro_batch, count))
        targets = batch.targets[rows]
        # The share of the batch: of its targets for the cross-entropy, of its windows for the router's losses.
        of_targets = int((targets != IGNORE_INDEX).sum()) / max(1, n_targets)
        of_windows = len(targets) / count
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
            tokens_BS = _to(run.device, batch.inputs[rows])
            out: Output = run.forward(tokens_BS, _to(run.device, targets), documents_BS=_documents(run, batch, rows))
        assert out.loss is not None
        loss = out.loss * of_windows + out.losses["lm"] * (of_targets - of_windows)
        loss.backward()
        shares = {"lm": of_targets, "balance": of_windows, "z": of_windows}
        scalars["loss"] = scalars.get("loss", 0) + loss.detach()
        for name, value in out.losses.items():
            scalars[name] = scalars.get(name, 0) + value.detach() * shares[name]
        counts_LE += torch.stack([routing.counts_E for routing in out.routing])
        if traced:
            passes.append(traces.routing_of(out, tokens_BS))
    scalars["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.model.parameters(), t.grad_clip)
    run.optimizers.set_lr(run.schedule.lr_scale(run.sample + count))
    run.optimizers.step()
    run.optimizers.zero_grad()
    for block, counts_E in zip(run.model.blocks, counts_LE, strict=True):
        block.moe.router.update_bias(counts_E)  # type: ignore[union-attr]
    run.meter.add(scalars, counts_LE)
    run.step += 1
    run.sample += count
    if passes:
        with _untimed(run):
            traces.write(run.dir, run.step, passes, run.cfg.experts.n_experts)


def _documents(run: _Run, batch: Batch, rows: slice) -> Tensor | None:
    """Document ids on the device; None where no window crosses a boundary, which spares the attention a mask."""
    if batch.documents is None or (batch.documents[rows] == batch.documents[rows, :1]).all():
        return None
    return _to(run.device, batch.documents[rows])


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _log(run: _Run) -> None:
    """Reads the meters, the only regular wait for the device, and writes a record."""
    t, top_k, n_experts = run.cfg.train, run.cfg.experts.top_k, run.cfg.experts.n_experts
    means = run.meter.means()
    run.watch.check_finite(run.step, means["loss"], means["grad_norm"])
    now = time.perf_counter()
    elapsed, steps = now - run.mark, run.meter.steps
    run.seconds, run.mark = run.seconds + elapsed, now
    rate = (run.tokens - run.marked_tokens) / elapsed if steps else math.nan
    per_step = (run.tokens - run.marked_tokens) / max(1, steps)
    run.marked_tokens = run.tokens
    load = run.meter.load()
    flops = 3 * plan.flops_per_token(run.cfg, run.seq_len)  # the backward pass takes twice the forward's
    record = {
        "kind": "train",
        "step": run.step,
        "tokens": run.tokens,
        **means,
        "lr": t.lr * run.schedule.lr_scale(run.sample),
        "batch_tokens": per_step,
        "tokens_per_expert": per_step * top_k / n_experts,
        "tokens_per_second": rate,
        "mfu": rate * flops / run.peak_flops,
        "load": load,
        **run.meter.load_statistics(),
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
        scores = _score(run, windows)
        if not scores:  # no conversation is held out
            return
        record = {"kind": "eval", "step": run.step, "tokens": run.tokens, "bits_per_byte": _per_byte(scores)}
        run.log.write(record)
        run.reporter.evaluation(record)


def _score(
    run: _Run, windows: Iterable[evaluate.Window], progress: Callable[[int], None] = lambda scored: None
) -> dict[str, evaluate.Score]:
    return evaluate.evaluate(
        run.model,
        windows,
        run.byte_lengths,
        batch=run.micro_batch,
        dtype=run.dtype,
        mask_by=run.data.eot_id if isinstance(run.data, TokenData) and run.cfg.train.document_mask else None,
        progress=progress,
    )


def _per_byte(scores: dict[str, evaluate.Score]) -> dict[str, float]:
    rows = {**scores, "total": evaluate.total(scores)} if scores else {}
    return {name: score.bits_per_byte for name, score in rows.items()}


def _sample(run: _Run) -> list[dict[str, str]]:
    with _untimed(run):
        samples = evaluate.draw_samples(run.model, run.tokenizer, chat=run.chat)
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
            "lora": start.lora_record(run.lora),
            "stream": run.stream.fingerprint,
            "step": run.step,
            "sample": run.sample,
            "seconds": run.seconds,
            "marked_tokens": run.marked_tokens,
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
    tokens = evaluate.count_scored(run.data)

    def progress(scored: int) -> None:
        if run.stop.signal:
            raise StopRequested
        run.reporter.progress("final evaluation", scored, tokens)

    windows = evaluate.all_windows(run.data, run.seq_len)
    scores = _score(run, windows, progress)
    summary = {
        "name": run.cfg.name,
        "step": run.step,
        "tokens": run.tokens,
        "parameters": plan.params(run.cfg).total,
        "active_parameters": plan.params(run.cfg).active["output"],
        "train_seconds": run.seconds,
        "tokens_per_second": run.tokens / run.seconds if run.seconds else None,
        "bits_per_byte": _per_byte(scores),
        "compression": compression(run.data) if isinstance(run.data, TokenData) else {},
        "held_out": {name: asdict(score) for name, score in scores.items()},
        "data": run.data.fingerprint,
        "chat": run.chat,
        "lora": start.lora_record(run.lora),
    }
    _sample(run)
    run.log.write(
        {"kind": "final", **{key: summary[key] for key in ("step", "tokens", "bits_per_byte", "compression")}}
    )
    plain = run.model if run.lora is None else merged(run.model)
    checkpoint.save(plain, run.dir / FINAL, tokenizer=run.tokenizer)
    if run.lora is not None:
        save_adapter(run.model, run.lora, run.dir / ADAPTER_FILE)
    drawn = pictures.draw(run.dir)
    if drawn is None:
        run.reporter.note('no pictures: matplotlib is not installed (pip install "gpt4-moe[plot]")')
    # Last, since its presence says that the run is complete.
    (run.dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    run.reporter.finish(summary, run.dir)
    return summary
