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

import torch
from torch import Tensor

from moe import checkpoint, evaluate, plan
from moe.config import Config
from moe.data import Batch, TokenData, compression
from moe.errors import ConfigError, TrainError
from moe.io.files import write_whole
from moe.io.runs import FINAL
from moe.kernels.loss import IGNORE_INDEX
from moe.lora import ADAPTER_FILE, LoraConfig, merged, save_adapter
from moe.model import Counts, Output, losses, objective
from moe.profile import Pass
from moe.train import console, pictures, predicted, start, state, traces
from moe.train.run import CONFIG_FILE, Run, open_run
from moe.train.stop import Stop, StopRequested

SUMMARY_FILE = "summary.json"


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
        run = open_run(cfg, Path(data_dir), Path(run_dir), resume, start_from, lora, device, reporter, stop)
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
                return Result("complete", run.step, run.dir, _finish(run), stop.signal)
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


def _already_finished(cfg: Config, run_dir: Path, resume: str, lora: LoraConfig | None) -> Result | None:
    summary = run_dir / SUMMARY_FILE
    if resume == "never" or not summary.is_file():
        return None
    state.check_same_config((run_dir / CONFIG_FILE).read_text(encoding="utf-8"), cfg, run_dir)
    content = json.loads(summary.read_text(encoding="utf-8"))
    start.check_same_lora(content.get("lora"), lora, run_dir)
    return Result("complete", content["step"], run_dir, content)


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
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
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
        samples = evaluate.draw_samples(run.model, run.tokenizer, chat=run.chat)
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
            "lora": start.lora_record(run.lora),
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
    """The whole held-out text, samples, `final/`, `summary.json`, pictures. Done again if it is interrupted."""
    memory_peak = predicted.memory_peak(run.device)
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
    plain = run.model if run.lora is None else merged(run.model)
    checkpoint.save(plain, run.dir / FINAL, tokenizer=run.tokenizer)
    if run.lora is not None:
        save_adapter(run.model, run.lora, run.dir / ADAPTER_FILE)
    drawn = pictures.draw(run.dir)
    if drawn is None:
        run.reporter.note('no pictures: matplotlib is not installed (pip install "gpt4-moe[plot]")')
    # Last, since its presence says that the run is complete.
    write_whole(run.dir / SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())
    run.reporter.finish(summary, run.dir)
    return summary
