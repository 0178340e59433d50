"""`moe eval`: how good a checkpoint is, on held-out data, on raw text and on tasks of lm-eval.

As in main.py, the command imports what it needs when it runs.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from moe.cli.show import draw_table, progress_bar

if TYPE_CHECKING:
    from moe.data import ConversationData
    from moe.evaluate import HeldOut, Score
    from moe.model import Transformer
    from moe.tokenizer import Tokenizer


def evaluate(
    checkpoint: Positional[Path],
    /,
    *,
    data: Path | None = None,
    text: tuple[Path, ...] = (),
    tasks: tuple[str, ...] = (),
    seq_len: int | None = None,
    batch: int = 16,
    limit: int | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> int:
    """Score a model: bits per byte on held-out text beside gzip and xz, or tasks of lm-eval.

    Args:
        checkpoint: A run of moe train (RUN is its RUN/final), or any checkpoint of this program.
        data: Prepared data: all of its held-out text, or of conversations all held-out responses, each source apart.
        text: Text files, each scored as one document.
        tasks: Tasks of lm-eval: YAML files, or names that it knows. Needs the extra "eval".
        seq_len: The longest context. Default: what the model was trained at; for tasks all that it has.
        batch: Windows, or requests of a task, at a time.
        limit: Only so many documents of each task.
        out: Write all figures to this JSON file.
        device: cuda or cpu. Default: cuda where there is one.
    """
    from moe import checkpoint as checkpoints
    from moe.device import pick_device
    from moe.errors import ConfigError

    if data is None and not text and not tasks:
        raise ConfigError("nothing to score: give --data DIR, --text FILE ... or --tasks TASK.yaml ...")
    cfg = checkpoints.load_config_of(checkpoint)
    for name, value, high in (("seq-len", seq_len, cfg.max_seq_len), ("batch", batch, 2**20), ("limit", limit, 2**62)):
        if value is not None and not 1 <= value <= high:
            raise ConfigError(f"--{name} = {value}: must be from 1 to {high} ({cfg.name})")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the directory {out.parent} does not exist; make it first")
    if tasks:  # a missing extra is said before the work
        import moe.lm_eval  # noqa: F401
    tokenizer = checkpoints.load_tokenizer(checkpoint) if text or tasks else None
    model = checkpoints.load(checkpoint, device=pick_device(device)).eval()
    found: dict[str, Any] = {"checkpoint": str(checkpoint), "name": cfg.name}
    length = seq_len or cfg.train.seq_len or cfg.max_seq_len
    if data is not None:
        found["data"] = _score_data(model, checkpoint, data, length, batch)
    if text:
        assert tokenizer is not None
        found["text"] = _score_text(model, tokenizer, text, length, batch)
    if tasks:
        found["tasks"] = _run_tasks(model, tokenizer, tasks, seq_len, batch, limit)
    if out is not None:
        from moe.io.files import write_whole

        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out.absolute(), (json.dumps(found, indent=1) + "\n").encode())
        print(f"all figures: {out}")
    return 0


def _score_data(model: "Transformer", checkpoint: Path, place: Path, seq_len: int, batch: int) -> dict[str, Any]:
    from moe.data import TokenData, compressed, compression, held_out_text, open_data
    from moe.train.start import check_tokenizer

    data = open_data(place)
    data.check_compatible(model.cfg.vocab_size)
    check_tokenizer(checkpoint, data)
    compressors = {}
    if isinstance(data, TokenData):
        compressors = {source: compressed(part) for source, part in held_out_text(data).items()}
        compressors["total"] = compression(data)
    figures = _score(model, data, data.tokenizer(), seq_len, batch, compressors)
    return {"path": str(place), "fingerprint": data.fingerprint, **figures}


def _score_text(
    model: "Transformer", tokenizer: "Tokenizer", files: Sequence[Path], seq_len: int, batch: int
) -> dict[str, Any]:
    from moe.data import compressed
    from moe.evaluate import Texts

    texts = {str(file): _read_text(file) for file in files}
    compressors = {name: compressed(text.encode()) for name, text in texts.items() if text}
    whole = "".join(texts.values()).encode()
    held_out = Texts(tokenizer, texts)
    return _score(model, held_out, tokenizer, seq_len, batch, {**compressors, "total": compressed(whole)})


def _read_text(file: Path) -> str:
    from moe.errors import DataError

    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start:,}): convert it, or leave it out") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; give a text file") from None


def _score(
    model: "Transformer",
    data: "HeldOut | ConversationData",
    tokenizer: "Tokenizer",
    seq_len: int,
    batch: int,
    compressors: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Scores all sources, prints a table, returns its figures."""
    from moe import evaluate
    from moe.device import pick_dtype
    from moe.errors import DataError

    device = model.embedding.weight.device
    dtype = pick_dtype(model.cfg.train, device)
    tokens = evaluate.count_scored(data)
    started = time.perf_counter()
    with _progress("scoring", tokens) as progress:
        windows = evaluate.all_windows(data, seq_len)
        lengths = evaluate.byte_lengths(tokenizer)
        scores = evaluate.evaluate(model, windows, lengths, batch=batch, dtype=dtype, progress=progress)
    seconds = time.perf_counter() - started
    for source in data.sources:
        if source not in scores:
            print(f"notice: no text of {source} could be scored within {seq_len:,} tokens", file=sys.stderr)
    if not scores:
        raise DataError(f"nothing could be scored within {seq_len:,} tokens: give more text, or a longer --seq-len")
    scores = {**scores, "total": evaluate.total(scores)}
    figures = {name: {**_figures(score), **compressors.get(name, {})} for name, score in scores.items()}
    _print_scores(figures, f"context {seq_len:,}, {str(dtype).removeprefix('torch.')}, {device}")
    print(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")
    speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    return {"seq_len": seq_len, "dtype": str(dtype).removeprefix("torch."), **speed, "scores": figures}


def _figures(score: "Score") -> dict[str, float]:
    return {**asdict(score), "bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity}


@contextmanager
def _progress(what: str, total: int) -> "Iterator[Callable[[int], None]]":
    """A bar on a terminal, nothing in a pipe."""
    with progress_bar(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _print_scores(figures: dict[str, dict[str, float]], setting: str) -> None:
    rows = []
    for name, f in figures.items():
        cells = [name, f"{f['bytes']:,}", f"{f['tokens']:,}"]
        cells += [f"{f[key]:.3f}" if key in f else "" for key in ("bits_per_byte", "gzip", "xz")]
        rows.append([*cells, f"{f['perplexity']:,.2f}"])
    columns = ["", "bytes", "tokens", "bits/byte", "gzip -9", "xz -9e", "perplexity"]
    draw_table(f"held-out bits per byte (lower is better); {setting}", columns, rows, {""}, bold="total")


# ------------------------------------------------------------------------------------------------------------ tasks


def _run_tasks(
    model: "Transformer",
    tokenizer: "Tokenizer | None",
    tasks: Sequence[str],
    seq_len: int | None,
    batch: int,
    limit: int | None,
) -> dict[str, Any]:
    from moe.lm_eval import MoeLM, run_tasks

    lm = MoeLM(model=model, tokenizer=tokenizer, batch_size=batch, max_length=seq_len)
    results, shown = run_tasks(lm, tasks, limit=limit)
    print(shown)
    return results
