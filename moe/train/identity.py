"""Whether the run that is there is the one that is asked for: what it recorded, beside what is given now."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe.config import Config
from moe.errors import ConfigError, DataError
from moe.io.runs import FINAL, locate
from moe.io.tensorfiles import list_tensors
from moe.lora import LoraConfig
from moe.train import state
from moe.train.schedule import Schedule

_SAMPLE = 256  # elements of a tensor that its digest reads, from the beginning

SUMMARY_FILE = "summary.json"

Record = dict[str, Any]


def record(data: Any, start_from: str | Path | None, lora: LoraConfig | None) -> Record:
    """What makes two runs of one configuration different: the data, the weights they begin with, the adapters.

    Args:
        data: opened.

    Raises:
        CheckpointError: `start_from` is no checkpoint.
    """
    begun = None if start_from is None else {"path": str(start_from), "sha256": digest(Path(start_from))}
    return {"data": data.fingerprint, "from": begun, "lora": lora and {**vars(lora), "targets": list(lora.targets)}}


def digest(checkpoint: Path) -> str:
    """A sha256 (hex) of each tensor's name, shape and first elements: training moves them all, and it is fast."""
    stored = list_tensors(locate(checkpoint))
    samples: dict[str, bytes] = {}
    for file in {tensor.file for tensor in stored.values()}:
        with safe_open(file, framework="pt", device="cpu") as source:
            for name in (name for name, tensor in stored.items() if tensor.file == file):
                sample = source.get_tensor(stored[name].name).reshape(-1)[:_SAMPLE].double()
                samples[name] = f"{name} {stored[name].shape}\n".encode() + sample.numpy().tobytes()
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest()


def check_same(saved: Mapping[str, Any], now: Record, run_dir: Path) -> None:
    """Raises ConfigError or DataError, naming what differs, where `saved` (a `record`) is not what is asked for.

    What `saved` lacks, since an older version wrote it, is taken to be the same.
    """
    for key, say in (("lora", _lora), ("from", _from)):
        before, given = (_known(key, r.get(key)) for r in (saved, now))
        if key in saved and before != given:
            raise ConfigError(
                f"{run_dir} holds a run {say(saved[key])}, and this is one {say(now[key])}: give what it had, choose "
                "another directory (`run_dir`), or start anew (`resume='never'`)"
            )
    if "data" in saved and saved["data"] != now["data"]:
        raise DataError(
            f"{run_dir} holds a run on other data, another stream of tokens (fingerprint {saved['data'][:12]}, here "
            f"{now['data'][:12]}): give the data it had, choose another directory (`run_dir`), or start anew "
            "(`resume='never'`)"
        )


def _known(key: str, value: Any) -> Any:
    """Of a checkpoint the weights alone count: it may have moved."""
    return value["sha256"] if key == "from" and value is not None else value


def _lora(settings: Any) -> str:
    return f"with LoRA {settings}" if settings else "without LoRA"


def _from(begun: Any) -> str:
    return f"begun with the weights of {begun['path']}" if begun else "begun without another's weights (`start_from`)"


def check_complete(
    summary: Mapping[str, Any], saved: str, cfg: Config, schedule: Schedule, run_dir: Path, **asked: Any
) -> bool:
    """Whether a complete run is what is asked for; False where it is to be extended.

    Args:
        summary: what it left. saved: its configuration (TOML). schedule: the one that is asked for.
        asked: its device, "cpu" or "cuda", or None for any, and whether it is to leave traces.

    Raises:
        ConfigError: it is another one, or is asked for less than it did; the message names what differs.
    """
    changed = state.check_same_config(saved, cfg, run_dir)
    done = summary.get("windows", summary["tokens"] // schedule.seq_len)
    if done < schedule.windows and any(key in changed for key in state.LENGTH):
        if state.latest(run_dir) is None:
            raise ConfigError(
                f"{run_dir} has no checkpoint left to go on from: begin another run with its weights ("
                f"`start_from={run_dir / FINAL}`, another `run_dir`)"
            )
        return False
    wrong = [f"{key} (was {v[0]!r}, now {v[1]!r})" for key, v in changed.items() if key in state.RATES]
    if done > schedule.windows:
        wrong.append(f"{schedule.windows * schedule.seq_len:,} tokens, of which it has had {done * schedule.seq_len:,}")
    device, traces = asked["device"], asked["traces"]
    if device is not None and summary.get("device", device) != device:
        wrong.append(f"device (was {summary['device']}, now {device})")
    if traces and not (run_dir / "traces").is_dir():
        wrong.append("traces, of which it has recorded none")
    if wrong:
        raise ConfigError(
            f"{run_dir} holds a run that is complete, and this asks for another: {', '.join(wrong)}. Choose another "
            "directory (`run_dir`), start anew (`resume='never'`), or set a greater train.steps to go on"
        )
    return True


def check_ahead(saved: Mapping[str, Any], schedule: Schedule, run_dir: Path) -> None:
    """Raises ConfigError where a run's newest checkpoint (`saved`) lies beyond the end that is asked for."""
    if saved["sample"] > schedule.windows:
        raise ConfigError(
            f"{run_dir} has had {saved['sample'] * schedule.seq_len:,} tokens in {saved['step']:,} steps already, and "
            f"train.steps or train.tokens asks for {schedule.windows * schedule.seq_len:,}: give that many or more, "
            "choose another directory (`run_dir`), or start anew (`resume='never'`)"
        )


def set_aside(run_dir: Path, step: int) -> None:
    """Renames what a complete run left, before that goes on: summary.json and final/ as they were at `step`."""
    if not (run_dir / SUMMARY_FILE).is_file():
        return
    for name in (SUMMARY_FILE, FINAL):
        old = run_dir / name
        if old.exists():
            kept = run_dir / f"{old.stem}-step-{step:06d}{old.suffix}"
            n = 1
            while kept.exists():
                n += 1
                kept = run_dir / f"{old.stem}-step-{step:06d}-{n}{old.suffix}"
            old.rename(kept)


def read_summary(file: Path) -> dict[str, Any] | None:
    """What a complete run left; None where there is none. Raises ConfigError for a file that is not whole."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "step": int(found["step"]), "tokens": int(found["tokens"])}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} is damaged: delete it, and the same command makes it again") from None
