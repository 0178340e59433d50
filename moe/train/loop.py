"""The training script: open the run, step until done, finish. Read `train` first.

Nothing here waits for the device between log points, and a run that is resumed gives the same losses, to the last
digit, as one that was never interrupted (on one machine with one number of threads).
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe import checkpoint, evaluate, plan
from moe import device as devices
from moe.config import Config
from moe.data import Batch, ConversationData, TokenData, compression, open_data
from moe.errors import ConfigError, TrainError
from moe.io.files import write_whole
from moe.io.runs import FINAL
from moe.kernels.loss import IGNORE_INDEX
from moe.lora import ADAPTER_FILE, LoraConfig, merged, save_adapter
from moe.model import Counts, Output, losses, objective
from moe.profile import Pass
from moe.train import console, forecast, identity, pictures, predicted, start, state, traces
from moe.train.identity import SUMMARY_FILE
from moe.train.run import CONFIG_FILE, Run, open_run
from moe.train.schedule import Schedule
from moe.train.stop import Stop, StopRequested


@dataclass(frozen=True)
class Result:
    """How a run ended: "complete" (`summary` is what summary.json holds) or "stopped" by `signal`, to be resumed.

    A complete run has a `signal`, too, where one came when there was nothing left to stop.
    """

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
        resume: "auto" goes on from the newest checkpoint in `run_dir`, to a greater length or with lower rates, too,
            where `cfg` says so now (moe/train/state.py lists what may change); "never" moves an older run there aside.
        start_from: a checkpoint whose weights a new run begins with: the next stage of a recipe. Its shape must be that
            of `cfg`, but for the context and its rotations.
        lora: freeze these weights and train adapters on them. final/ then has them merged, and adapter.safetensors
            holds them alone.
        device: "cuda" or "cpu"; None takes CUDA where there is one.
        reporter: shows progress; None prints lines. See moe.train.console.
        trace_every: records the routing of every so many steps in `run_dir`/traces; 0 records none.

    Raises:
        ConfigError: `run_dir` holds a run with another configuration, start or adapters, `start_from` a model of
            another shape, `lora` has no `start_from`, or `trace_every` is negative.
        DataError: the data are not prepared, not the ones of the run in `run_dir`, or do not fit the model.
        InUseError: another process trains in `run_dir`.
        CheckpointError: a checkpoint cannot be written or read; the ones before are intact.
        TrainError: the model does not fit into memory, the loss is not finite or has exploded; the last good checkpoint
            is intact.
    """
    if trace_every < 0:
        raise ConfigError(f"trace_every = {trace_every}: must be 0 (none) or more")
    if lora is not None and start_from is None:
        raise ConfigError("lora without start_from: adapters belong on a trained model; name its checkpoint")
    where, place = devices.pick_device(device), Path(run_dir)
    summary = None if resume == "never" else identity.read_summary(place / SUMMARY_FILE)
    if summary is None:
        forecast.check_memory(cfg, where, frozen=lora is not None)
    data = open_data(data_dir)
    data.check_compatible(cfg.vocab_size)
    with Stop() as stop, devices.callers_state(where), ExitStack() as held:
        shown: Any = held.enter_context(console.Unbroken(reporter or console.Lines(), lambda: stop.signal != 0))
        if summary is not None and _is_it(cfg, data, place, summary, start_from, lora, device, trace_every):
            shown.note(
                f"the run in {place} is complete; start it anew with `resume='never'`, or choose another `run_dir`"
            )
            return Result("complete", summary["step"], place, summary)
        with _memory_explained(cfg):
            run = open_run(cfg, data, place, resume, start_from, lora, where, shown, stop, held)
            held.callback(run.log.close)
            return _run(run, trace_every)


def _run(run: Run, trace_every: int) -> Result:
    t, stop = run.cfg.train, run.stop
    try:
        while run.sample < run.schedule.windows and not stop.signal:
            _train_step(run, traced=trace_every > 0 and (run.step + 1) % trace_every == 0)
            run.reporter.step(run.step)
            if _due(run, t.log_every):
                _log(run)
            if t.eval_tokens and _due(run, t.eval_every):
                _evaluate(run)
            if _due(run, t.sample_every):
                _sample(run)
            if _due(run, t.save_every) or run.complete or stop.signal:
                _save(run)
        if run.complete:
            return Result("complete", run.step, run.dir, _finish(run), stop.signal)
    except StopRequested:
        pass  # during the final evaluation; the checkpoint is on disk
    return Result("stopped", run.step, run.dir, signal=stop.signal)


@contextmanager
def _memory_explained(cfg: Config) -> Iterator[None]:
    """Turns the errors of torch's allocators into one that says what to set; a resumed run may set it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        reason, micro_batch = (str(error) or "MemoryError").splitlines()[0], cfg.train.micro_batch or "all"
        raise TrainError(
            f"out of memory with train.micro_batch = {micro_batch}: halve it, or set train.activation_checkpointing = "
            f"selective or full; the run goes on from its newest checkpoint ({reason})"
        ) from error


def _is_it(
    cfg: Config,
    data: TokenData | ConversationData,
    run_dir: Path,
    summary: dict[str, Any],
    start_from: str | Path | None,
    lora: LoraConfig | None,
    device: str | None,
    trace_every: int,
) -> bool:
    """Whether the complete run in `run_dir` is the one asked for; False where it is to be extended. Or an error."""
    saved = (run_dir / CONFIG_FILE).read_text(encoding="utf-8")
    identity.check_same(summary, identity.record(data, start_from, lora), run_dir)
    state.check_same_config(saved, cfg, run_dir)
    stream = start.open_stream(cfg, data)
    schedule = Schedule(cfg.train, stream.seq_len, stream.windows_per_epoch)
    asked = {"device": device and torch.device(device).type, "traces": trace_every > 0}
    return identity.check_complete(summary, saved, cfg, schedule, run_dir, **asked)


# ------------------------------------------------------------------------------------------------------------ steps


def _due(run: Run, every: int) -> bool:
    return every > 0 and (run.step % every == 0 or run.complete)


def _train_step(run: Run, traced: bool) -> None:
    """One optimizer step: the gradient of the mean over all its targets, `micro_batch` windows at a time."""
    t = run.cfg.train
    count = run.schedule.batch(run.sample)
    batch = run.stream.batch(run.sample, count)
    # Every window has text: of conversations at least one, of a source at least its last token.
    tokens = batch.inputs.size if batch.text is None else int(batch.text.sum())
    counts = Counts(int((batch.targets != IGNORE_INDEX).sum()), count, tokens)
    scalars: dict[str, Tensor] = {}
    counts_LE = torch.zeros_like(run.meter.counts_LE)
    passes: list[Pass] = []
    for begin in range(0, count, run.micro_batch):
        rows = slice(begin, min(begin + run.micro_batch, count))
        part = Batch(*(None if x is None else x[rows] for x in batch))  # type: ignore[arg-type]
        with evaluate.products(run.dtype, run.device):
            inputs = evaluate.model_inputs(run.cfg.train, part, run.device)
            out: Output = run.forward(**inputs)
        assert out.sums is not None
        loss = objective(run.cfg.router, out.sums, counts)
        loss.backward()
        parts = {"loss": loss, **losses(out.sums, counts)}
        for name, value in parts.items():
            scalars[name] = scalars.get(name, 0) + value.detach()
        counts_LE += torch.stack([routing.counts_E for routing in out.routing])
        if traced:
            passes.append(traces.routing_of(out, inputs["tokens_BS"]))  # type: ignore[arg-type]
    scalars["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.model.parameters(), t.grad_clip)
    run.optimizers.set_lr(run.schedule.lr_scale(run.sample + count))
    run.optimizers.step()
    run.optimizers.zero_grad()
    layers = [block.moe for block in run.model.blocks if block.moe is not None]
    for moe, counts_E in zip(layers, counts_LE, strict=True):
        moe.router.update_bias(counts_E)  # type: ignore[union-attr]
    run.meter.add(scalars, counts_LE)
    run.step += 1
    run.sample += count
    run.tokens += tokens
    if passes:
        with _untimed(run):
            traces.write(run.dir, run.step, passes, run.cfg.experts.n_experts)


def _log(run: Run) -> None:
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
    flops = plan.TRAINING * plan.flops_per_token(run.cfg, run.seq_len)
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
def _untimed(run: Run) -> Iterator[None]:
    """What happens inside does not count as training time."""
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    started = time.perf_counter()
    try:
        yield
    finally:
        run.mark += time.perf_counter() - started


def _evaluate(run: Run) -> None:
    with _untimed(run):
        windows = evaluate.some_windows(run.data, run.seq_len, run.cfg.train.eval_tokens)
        scores = _score(run, windows)
        if not scores:  # no conversation is held out
            return
        run.watch.check_finite(run.step, evaluate.total(scores).bits, 0.0)
        record = {"kind": "eval", "step": run.step, "tokens": run.tokens, "bits_per_byte": _per_byte(scores)}
        run.log.write(record)
        run.reporter.evaluation(record)


def _score(
    run: Run, windows: Iterable[evaluate.Window], progress: Callable[[int], None] = lambda scored: None
) -> dict[str, evaluate.Score]:
    return evaluate.evaluate(
        run.model,
        windows,
        run.byte_lengths,
        batch=run.micro_batch,
        dtype=run.dtype,
        progress=progress,
    )


def _per_byte(scores: dict[str, evaluate.Score]) -> dict[str, float]:
    rows = {**scores, "total": evaluate.total(scores)} if scores else {}
    return {name: score.bits_per_byte for name, score in rows.items()}


def _sample(run: Run) -> list[dict[str, str]]:
    with _untimed(run):
        samples = evaluate.draw_samples(run.model, run.tokenizer, chat=run.chat, prompts=run.prompts)
        run.log.write_samples(run.step, samples)
        run.reporter.samples(run.step, samples)
    return samples


def _save(run: Run) -> None:
    """A checkpoint, unless the steps since the last log point went wrong: the one before is then the last good one."""
    means = run.meter.means()
    run.watch.check_finite(run.step, means["loss"], means["grad_norm"])
    with _untimed(run):
        training = {
            "config": run.cfg.to_toml(),
            **run.origin,
            "device": run.device.type,
            "dtype": str(run.dtype).removeprefix("torch."),
            "changed": run.changed,
            "stream": run.stream.fingerprint,
            "step": run.step,
            "sample": run.sample,
            "tokens": run.tokens,
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


def _finish(run: Run) -> dict[str, Any]:
    """`final/`, the held-out text, samples, pictures, `summary.json`. Done again if it is interrupted."""
    memory_peak = predicted.memory_peak(run.device)
    run.watch.check_weights(run.step, run.model.parameters())
    plain = run.model if run.lora is None else merged(run.model)
    checkpoint.save(plain, run.dir / FINAL, tokenizer=run.tokenizer)  # first: scoring may take long
    if run.lora is not None:
        save_adapter(run.model, run.lora, run.dir / ADAPTER_FILE)
    windows, tokens = evaluate.all_windows(run.data, run.seq_len), evaluate.count_scored(run.data)
    bound = run.cfg.train.final_eval_tokens
    if 0 < bound < tokens:
        windows = evaluate.some_windows(run.data, run.seq_len, bound)
        run.reporter.note(f"final evaluation: about {bound:,} of {tokens:,} held-out tokens (train.final_eval_tokens)")
        tokens = bound

    def progress(scored: int) -> None:
        if run.stop.signal:
            raise StopRequested
        run.reporter.progress("final evaluation", scored, tokens)

    scores = _score(run, windows, progress)
    run.watch.check_finite(run.step, evaluate.total(scores).bits, 0.0)
    summary = {
        "name": run.cfg.name,
        "step": run.step,
        "windows": run.sample,
        "tokens": run.tokens,
        "parameters": plan.params(run.cfg).total,
        "active_parameters": plan.params(run.cfg).active["output"],
        "train_seconds": run.seconds,
        "tokens_per_second": run.tokens / run.seconds if run.seconds else None,
        "bits_per_byte": _per_byte(scores),
        "compression": compression(run.data) if isinstance(run.data, TokenData) else {},
        "held_out": {name: asdict(score) for name, score in scores.items()},
        **run.origin,
        "device": run.device.type,
        "dtype": str(run.dtype).removeprefix("torch."),
        "changed": run.changed,
        "chat": run.chat,
    }
    if run.seconds and run.lora is None:
        summary["plan"], line = predicted.compare(
            run.cfg, run.dir, run.device, run.dtype, before=run.memory_before, peak=memory_peak,
            batch=run.sample / run.step, micro_batch=run.micro_batch,
            seconds_per_step=run.seconds / run.step, peak_flops=run.peak_flops,
        )  # fmt: skip
        run.reporter.note(line)
    _sample(run)
    run.log.write(
        {"kind": "final", **{key: summary[key] for key in ("step", "tokens", "bits_per_byte", "compression")}}
    )
    pictures.draw(run.dir)
    # Last, since its presence says that the run is complete.
    write_whole(run.dir / SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())
    run.reporter.finish(summary, run.dir)
    return summary
