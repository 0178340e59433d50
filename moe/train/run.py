"""A run of training: what its steps share, and how it begins, anew or from its newest checkpoint."""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe import device as devices
from moe import evaluate, plan
from moe.config import Config
from moe.data import ConversationData, ConversationStream, Stream, TokenData
from moe.device import tune_cpu
from moe.io import figures
from moe.io.files import write_whole
from moe.lora import LoraConfig, adapters
from moe.model import Transformer
from moe.tokenizer import Tokenizer
from moe.train import console, identity, predicted, samples, start, state
from moe.train.metrics import Meter, MetricsLog
from moe.train.optimizer import Optimizers, build
from moe.train.schedule import Schedule
from moe.train.stop import Stop
from moe.train.watch import Watch

CONFIG_FILE = "config.toml"


@dataclass
class Run:
    """All that the steps of a run share. `step`, `sample` (windows) and `tokens` (of text) count what is done."""

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
    memory_before: int  # bytes that the process held before the model was there
    origin: identity.Record  # data, start and adapters
    changed: list[dict[str, Any]]  # what was set otherwise when it was resumed: {"step", "changes": {key: [was, now]}}
    prompts: tuple[str, ...]  # of samples
    step: int = 0
    sample: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluation, samples and saving, up to `mark`
    mark: float = field(default_factory=time.perf_counter)
    marked_tokens: int = 0

    @property
    def seq_len(self) -> int:
        return self.stream.seq_len

    @property
    def micro_batch(self) -> int:
        return self.schedule.micro_batch

    @property
    def complete(self) -> bool:
        return self.sample == self.schedule.windows

    @property
    def chat(self) -> bool:
        return isinstance(self.data, ConversationData)


def open_run(
    cfg: Config,
    data: TokenData | ConversationData,
    run_dir: Path,
    resume: str,
    start_from: str | Path | None,
    lora: LoraConfig | None,
    device: torch.device,
    reporter: Any,
    stop: Stop,
    held: ExitStack,
) -> Run:
    """Everything ready for the next step: a new run's first one, or the one after the newest checkpoint.

    The directory is this process's until `held` is closed.
    """
    dtype = devices.pick_dtype(cfg.train, device)
    if device.type == "cpu":
        tune_cpu()
    t, stream = cfg.train, start.open_stream(cfg, data)
    schedule = Schedule(t, stream.seq_len, stream.windows_per_epoch)
    if start_from is not None:
        start.check_start(cfg, data, Path(start_from))
    now = identity.record(data, start_from, lora)
    found = start.enter(run_dir, resume, start_from, held)
    saved = state.load_training(found) if found is not None else None
    changes: dict[str, list[Any]] = {}
    if saved is not None:
        identity.check_same(saved, now, run_dir)
        changes = state.check_same_config(saved["config"], cfg, run_dir)
        stream.check_resume(saved["stream"])
        identity.check_ahead(saved, schedule, run_dir)
        used = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
        changes |= {key: [saved[key], value] for key, value in used.items() if saved.get(key, value) != value}
        if saved["sample"] < schedule.windows:
            identity.set_aside(run_dir, saved["step"])
    write_whole(run_dir / CONFIG_FILE, cfg.to_toml().encode())
    memory_before = predicted.memory_before(device)
    predicted.reset_peak(device)
    model = start.open_model(cfg, device, found, start_from, lora)
    tokenizer = data.tokenizer()
    text = sum(data.n_bytes(source, "train") for source in data.sources)
    run = Run(
        cfg=cfg,
        dir=run_dir,
        data=data,
        lora=lora,
        tokenizer=tokenizer,
        stream=stream,
        schedule=schedule,
        device=device,
        dtype=dtype,
        model=model,
        forward=torch.compile(model) if cfg.train.compile else model,
        optimizers=build(model, t),
        meter=Meter(cfg.n_moe_layers, cfg.experts.n_experts, device),
        watch=Watch(cfg.train, cfg.router),
        log=MetricsLog(run_dir, saved["step"] if saved else 0, saved["files"] if saved else None),
        reporter=reporter,
        stop=stop,
        peak_flops=devices.peak_flops(device, dtype),
        byte_lengths=evaluate.byte_lengths(tokenizer),
        tokens_per_byte=sum(data.n_tokens(source, "train") for source in data.sources) / text,
        memory_before=memory_before,
        origin=now,
        changed=saved.get("changed", []) if saved else [],
        prompts=samples.prompts(data, tokenizer),
    )
    if saved is not None:
        _restore(run, saved)
    else:
        # Relative, so that runs which are moved together still find each other.
        before = os.path.relpath(start_from, run_dir) if start_from is not None else None
        run.log.write({"kind": "start", "step": 0, "name": cfg.name, "from": before, "seq_len": stream.seq_len})
    _introduce(run, resumed_from=found, start_from=start_from)
    if changes:
        run.changed.append({"step": run.step, "changes": changes})
        run.log.write({"kind": "changed", **run.changed[-1]})
        said = ", ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changes.items())
        run.reporter.note(f"changed from step {run.step:,} on: {said}")
    return run


def _restore(run: Run, saved: dict[str, Any]) -> None:
    run.step, run.sample, run.seconds = saved["step"], saved["sample"], saved["seconds"]
    run.tokens = saved.get("tokens", run.sample * run.seq_len)
    run.marked_tokens = saved["marked_tokens"]
    run.optimizers.load_state_dict(saved["optimizers"])
    run.meter.load_state_dict(saved["meter"])
    run.watch.load_state_dict(saved["watch"])
    state.set_rng_state(saved["rng"], run.device)


def _introduce(run: Run, resumed_from: Path | None, start_from: str | Path | None) -> None:
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
    if not figures.can_draw():
        run.reporter.note(figures.NO_PICTURES)
    if not run.log.has_tensorboard:
        run.reporter.note('no TensorBoard events: tensorboard is not installed (pip install "gpt4-moe[train]")')


def _batch_sizes(run: Run) -> str:
    return " -> ".join(f"{size:,}" for _, size in run.schedule.ramp)
