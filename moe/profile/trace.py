"""The routing trace: what every router chose, token by token, in a compact file; read, compared, replayed.

A trace is a directory: `trace.json` and shards `trace-00000.safetensors`, ... Each shard holds whole forward passes:

    ids_TLK      uint8 (int16 from 257 experts on)  chosen experts, all different, in falling order of score
    weights_TLK  the router's dtype                 their routing weights; absent in an import
    tokens_T     int32                              token ids; absent where the model was called without
    passes_P2    int32                              (B, S) of each forward pass, in order; T is the sum of B * S

`trace.json` names the format and version, n_layers, n_experts, top_k, the shards with their tokens, and how many tokens
are missing from an import. It is written after every shard, so that a recording that was killed can be read up to its
last shard.

Shape suffixes: L layers, T tokens, K experts per token, P passes.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moe.errors import TraceError
from moe.io.files import is_taken, locked, write_whole
from moe.profile import observe
from moe.profile.observe import Pass
from moe.profile.override import Given, override

INDEX_FILE = "trace.json"
FORMAT, VERSION = "gpt4-moe routing trace", 1
SHARD_TOKENS = 2**18


class Recorder:
    """Writes passes to a trace; a context manager, or call `close`.

    Args:
        path: a new or empty directory, which no other process may write to until `close`.
        n_experts: E. shard_tokens: a shard is written once it holds this many.

    Raises:
        TraceError: something is there; at `add`, ids that are none of E different experts, or a pass unlike the others.
        InUseError: another process records there.
    """

    def __init__(self, path: str | os.PathLike[str], n_experts: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.path = Path(path)
        taken = TraceError(f"{self.path}: exists and is not an empty directory; choose another")
        if is_taken(self.path):
            raise taken
        with ExitStack() as lock:
            lock.enter_context(locked(self.path))
            if is_taken(self.path):  # by whom held the lock until now
                raise taken
            self._lock = lock.pop_all()
        self.n_experts = n_experts
        self.shard_tokens = shard_tokens
        self._index: dict[str, Any] = {"format": FORMAT, "version": VERSION, "n_experts": n_experts, "shards": []}
        self.missing = 0  # tokens of an import without their experts
        self._passes: list[dict[str, Tensor]] = []
        self._tokens = 0

    def add(self, p: Pass) -> None:
        """Records one forward pass; one with padding as a single sequence of its text."""
        p = p.text()
        if p.ids_LTK.shape[1]:
            shape = torch.tensor([p.shape], dtype=torch.int32, device="cpu")
            self.add_rows(p.ids_LTK.transpose(0, 1), p.weights_LTK.transpose(0, 1), p.tokens_T, shape)

    def add_rows(self, ids_TLK: Tensor, weights_TLK: Tensor | None, tokens_T: Tensor | None, shape_12: Tensor) -> None:
        """Records one forward pass, its layers after its tokens; `shape_12`: int32 [[B, S]]."""
        ids_TLK = ids_TLK.cpu()
        if wrong := wrong_ids(ids_TLK, self.n_experts):
            raise TraceError(f"{self.path}: {wrong}")
        dtype = next(d for d in (torch.uint8, torch.int16, torch.int32) if self.n_experts <= torch.iinfo(d).max + 1)
        parts = {"ids_TLK": ids_TLK.to(dtype), "passes_P2": shape_12}
        parts |= {} if weights_TLK is None else {"weights_TLK": weights_TLK}
        parts |= {} if tokens_T is None else {"tokens_T": tokens_T.to(torch.int32)}
        layers = {"n_layers": ids_TLK.shape[1], "top_k": ids_TLK.shape[2]}
        if self._passes and self._passes[0].keys() != parts.keys():
            raise TraceError(f"{self.path}: this pass has {sorted(parts)}, those before had {sorted(self._passes[0])}")
        if "n_layers" in self._index and layers != {key: self._index[key] for key in layers}:
            raise TraceError(f"{self.path}: this pass has {layers}, those before had another number")
        self._index |= layers
        self._passes.append({name: part.cpu().clone() for name, part in parts.items()})
        self._tokens += len(ids_TLK)
        if self._tokens >= self.shard_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._passes:
            tensors = {n: torch.cat([p[n] for p in self._passes]).contiguous() for n in self._passes[0]}
            name = f"trace-{len(self._index['shards']):05d}.safetensors"
            write_whole(self.path / name, save(tensors))
            self._index["shards"].append({"file": name, "tokens": self._tokens})
            self._passes, self._tokens = [], 0
        index = self._index | ({"missing": self.missing} if self.missing else {})
        write_whole(self.path / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())

    def close(self) -> None:
        """Writes what is left; a trace that ends here is complete."""
        with self._lock:
            self._flush()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def record(model: nn.Module, path: str | os.PathLike[str]) -> Iterator[Recorder]:
    """Records every forward pass of `model` inside the block: training, evaluation or generation."""
    with (
        Recorder(path, observe.n_experts(observe.routers(model)[0])) as recorder,
        observe.observe(model, recorder.add),
    ):
        yield recorder


def wrong_ids(ids_TLK: Tensor, n_experts: int) -> str | None:
    """What is wrong with the first token whose experts are not different ones of 0 to E - 1; None where none is."""
    outside_TLK = (ids_TLK < 0) | (ids_TLK >= n_experts)
    in_order_TLK = ids_TLK.sort(-1).values
    twice_TL = (in_order_TLK[..., 1:] == in_order_TLK[..., :-1]).any(-1)
    bad = (outside_TLK.any(-1) | twice_TL).nonzero()
    if not len(bad):
        return None
    token, layer = bad[0].tolist()
    row = ids_TLK[token, layer].tolist()
    why = f"outside 0 to {n_experts - 1}" if outside_TLK[token, layer].any() else "an expert twice"
    return f"the experts {row} of token {token} in layer {layer} are {why} ({len(bad)} such rows)"


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class RecordedPass:
    """One forward pass of a trace."""

    ids_TLK: Tensor  # int64
    weights_TLK: Tensor | None
    tokens_T: Tensor | None  # int64
    shape: tuple[int, int]  # B, S


@dataclass(frozen=True)
class Trace:
    """A trace on disk. `Trace.open(path)`; iterate for its passes, read a shard at a time."""

    path: Path
    n_layers: int
    n_experts: int
    top_k: int
    shards: tuple[tuple[str, int], ...]  # file, tokens
    missing: int = 0  # tokens of an import whose experts the server did not say: the last of a request

    @staticmethod
    def open(path: str | os.PathLike[str]) -> "Trace":
        """Raises TraceError: not a trace, or one of a newer version."""
        index = Path(path) / INDEX_FILE
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise TraceError(f"{index}: format {content['format']!r} version {content['version']}; want {VERSION}")
            shards = tuple((str(shard["file"]), _whole(shard["tokens"])) for shard in content["shards"])
            names = ("n_layers", "n_experts", "top_k", "missing")
            layers, experts, top_k, missing = (_whole(content.get(name, 0)) for name in names)
            return Trace(Path(path), layers, experts, top_k, shards, missing)
        except FileNotFoundError:
            raise TraceError(
                f"{path}: no {INDEX_FILE} there; record one with `moe profile routing --trace` or moe.profile.record"
            ) from None
        except OSError as error:
            raise TraceError(f"{index}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{index}: not a routing trace ({error!r})") from error

    @property
    def tokens(self) -> int:
        """Tokens recorded."""
        return sum(tokens for _, tokens in self.shards)

    def __iter__(self) -> Iterator[RecordedPass]:
        for name, tokens in self.shards:
            parts = self._read(name)
            if wrong := self._wrong(parts, tokens):
                raise TraceError(f"{self.path / name}: {wrong}; the shards before it are intact, record the rest again")
            begin = 0
            for B, S in parts["passes_P2"].tolist():
                rows = slice(begin, begin + B * S)
                weights, ids = parts.get("weights_TLK"), parts.get("tokens_T")
                yield RecordedPass(
                    parts["ids_TLK"][rows].long(),
                    None if weights is None else weights[rows],
                    None if ids is None else ids[rows].long(),
                    (B, S),
                )
                begin += B * S

    def counts_PLE(self) -> np.ndarray:
        """Routed tokens per pass, layer and expert, int64."""
        layers = np.arange(self.n_layers)[None, :, None]
        counts = [np.zeros((0, self.n_layers, self.n_experts), dtype=np.int64)]
        for p in self:
            counts.append(np.zeros((1, self.n_layers, self.n_experts), dtype=np.int64))
            np.add.at(counts[-1][0], (layers, p.ids_TLK.numpy()), 1)
        return np.concatenate(counts)

    def ids_TLK(self, max_tokens: int) -> np.ndarray:
        """The first `max_tokens` tokens' experts, int64."""
        found: list[np.ndarray] = []
        for p in self:
            if sum(map(len, found)) >= max_tokens:
                break
            found.append(p.ids_TLK.numpy())
        empty = np.zeros((0, self.n_layers, self.top_k), dtype=np.int64)
        return np.concatenate([empty, *found])[:max_tokens]

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        except (SafetensorError, OSError) as error:
            raise TraceError(f"{self.path / name}: unreadable ({error}); the shards before it are intact") from error

    def _wrong(self, parts: dict[str, Tensor], tokens: int) -> str | None:
        """What in a shard is not as its index says; None where nothing is."""
        shapes = {"ids_TLK": (tokens, self.n_layers, self.top_k), "passes_P2": (-1, 2)}
        shapes |= {"weights_TLK": shapes["ids_TLK"]} if "weights_TLK" in parts else {}
        shapes |= {"tokens_T": (tokens,)} if "tokens_T" in parts else {}
        for name, shape in shapes.items():
            if name not in parts:
                return f"has no {name}"
            found = tuple(parts[name].shape)
            if len(found) != len(shape) or any(want not in (-1, n) for n, want in zip(found, shape, strict=True)):
                return f"{name} has the shape {list(found)}, but {INDEX_FILE} says {list(shape)}"
            if parts[name].is_floating_point() != (name == "weights_TLK"):
                return f"{name} has the dtype {parts[name].dtype}"
        passes = parts["passes_P2"].long()
        if (passes < 1).any() or int(passes.prod(1).sum()) != tokens:
            return f"its passes hold other than the {tokens} tokens that {INDEX_FILE} says"
        if "weights_TLK" in parts and len(bad := (~parts["weights_TLK"].isfinite()).nonzero()):
            token, layer, slot = bad[0].tolist()
            weight = float(parts["weights_TLK"][token, layer, slot])
            return f"the weight {weight} of token {token} in layer {layer} is no number: the model had diverged"
        return wrong_ids(parts["ids_TLK"].long(), self.n_experts)


def _whole(value: Any) -> int:
    """A count in an index. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


# --------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Comparison:
    """How two routings of the same tokens differ, per layer, float64 [L]."""

    tokens: int
    changed_L: Tensor  # share of tokens with another set of experts
    first_changed_L: Tensor  # share of tokens with another first choice
    moved_L: Tensor  # share of routed (token, slot) pairs whose expert the other does not choose for the token
    log_weight_L: Tensor | None  # mean |ln w - ln w'| over the experts that both choose


def compare(one: Trace, other: Trace) -> Comparison:
    """Train against serve, before against after: the same tokens in the same order, in passes of any shape.

    Raises:
        TraceError: different models or tokens.
    """
    for name in ("n_layers", "n_experts", "top_k", "tokens"):
        if getattr(one, name) != getattr(other, name):
            raise TraceError(
                f"{name} = {getattr(one, name)} in {one.path}, {getattr(other, name)} in {other.path}: "
                "traces of the same tokens of the same model can be compared"
            )
    L = one.n_layers
    changed, first, moved, log_weight, shared = (torch.zeros(L, dtype=torch.float64) for _ in range(5))
    weighed, done = True, 0
    for a, b in _aligned(one, other):
        if a.tokens_T is not None and b.tokens_T is not None and not torch.equal(a.tokens_T, b.tokens_T):
            raise TraceError(f"{one.path} and {other.path} have different tokens, the first of them after {done}")
        same = a.ids_TLK.unsqueeze(3) == b.ids_TLK.unsqueeze(2)  # [T, L, K, K]
        kept = same.any(3)
        changed += (~kept).any(2).sum(0)
        first += (a.ids_TLK[..., 0] != b.ids_TLK[..., 0]).sum(0)
        moved += (~kept).sum((0, 2))
        if a.weights_TLK is None or b.weights_TLK is None:
            weighed = False
        else:
            mine, theirs = (w.double().clamp(min=1e-30).log() for w in (a.weights_TLK, b.weights_TLK))
            gap = (mine.unsqueeze(3) - theirs.unsqueeze(2)).abs()
            log_weight += torch.where(same, gap, 0.0).sum((0, 2, 3))
            shared += same.sum((0, 2, 3))
        done += len(a.ids_TLK)
    n = max(1, done)
    return Comparison(
        done, changed / n, first / n, moved / (n * one.top_k), log_weight / shared.clamp(min=1) if weighed else None
    )


def _aligned(one: Trace, other: Trace) -> Iterator[tuple[RecordedPass, RecordedPass]]:
    """Both traces in pieces of equal length."""
    left, right = iter(one), iter(other)
    a = b = None
    while True:
        a = next(left, None) if a is None else a
        b = next(right, None) if b is None else b
        if a is None or b is None:
            return
        n = min(len(a.ids_TLK), len(b.ids_TLK))
        yield _part(a, 0, n), _part(b, 0, n)
        a = _part(a, n, len(a.ids_TLK)) if n < len(a.ids_TLK) else None
        b = _part(b, n, len(b.ids_TLK)) if n < len(b.ids_TLK) else None


def _part(p: RecordedPass, begin: int, end: int) -> RecordedPass:
    weights, tokens = (None if t is None else t[begin:end] for t in (p.weights_TLK, p.tokens_T))
    return RecordedPass(p.ids_TLK[begin:end], weights, tokens, (1, end - begin))


# --------------------------------------------------------------------------------------------------------- replaying


@contextmanager
def replay(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Inside the block, each forward pass of `model` takes the next recorded pass's experts, not its routers' choice.

    The weights come from the model's own router logits at those experts, so that gradients reach the router; on the
    model, machine and input of the recording everything is equal to the last bit. Each token's experts must differ.

    Raises:
        TraceError: at the call, a pass of another size, another model, or no pass left.
    """
    layers = observe.routers(model)
    for name, want in (("n_layers", len(layers)), ("n_experts", observe.n_experts(layers[0]))):
        if getattr(trace, name) != want:
            raise TraceError(f"{trace.path}: {name} = {getattr(trace, name)}, but the model has {want}")
    passes = enumerate(trace)

    def next_pass() -> Given:
        number, recorded = next(passes, (0, None))
        if recorded is None:
            raise TraceError(f"{trace.path}: no pass left to replay; it has {trace.tokens} tokens")
        ids_TLK = recorded.ids_TLK

        def given(layer: int, tokens: int, text: int, device: torch.device) -> Tensor:
            if len(ids_TLK) not in (tokens, text):
                called = f"{tokens}" if text == tokens else f"{tokens}, of which {text} are text"
                raise TraceError(
                    f"{trace.path}: pass {number} has {len(ids_TLK)} tokens, the model was called with {called}"
                )
            return ids_TLK[:, layer].to(device)

        return given

    with override(model, next_pass):
        yield
