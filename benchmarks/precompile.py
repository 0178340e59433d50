"""Compile on all cores, before it begins, what a part of the GPU run will launch: one process would take minutes.

The host code of the kernels runs on tensors without storage, and every launch goes through Triton's own launcher, short
of the launch: so the cache holds just what the part will look for. What is not foreseen here is compiled there.
Run: python benchmarks/precompile.py tests|peers|layers|decode|gluon [--seconds N] [--dry-run] [--json FILE]

After --seconds it ends with what it has: the rest is compiled where it is launched.
--dry-run counts the launches, as for an H100, and compiles nothing.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # it would make functions of the kernels

import torch
from duel import write_record
from triton.knobs import runtime

from moe.kernels import ahead, cards, tiles
from moe.kernels.attention import triton_paged
from moe.kernels.experts import inference, triton_mlp
from moe.kernels.experts.triton_pointer import Experts
from moe.kernels.gate import triton_gate
from moe.kernels.loss import triton_chunked

BFLOAT16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ----------------------------------------------------------------------------------------------- what will be launched


def experts(
    T: int,
    E: int,
    K: int,
    D: int,
    F: int,
    dtype: torch.dtype = BFLOAT16,
    activation: str = "swiglu",
    train: bool = True,
    recompute: bool = False,
) -> None:
    """A forward and, to train, a backward of the expert MLP, from pre-activations that were kept, or not."""
    G = 1 if activation == "gelu" else 2
    weights = Experts(meta(E, G, F, D, dtype=dtype), meta(E, D, F, dtype=dtype))
    x, gate = meta(T, D, dtype=dtype), meta(T, K, dtype=torch.float32)
    y, h, order, offsets = triton_mlp.forward(x, weights, gate, meta(T, K, dtype=torch.int64), activation, train)
    if train:
        triton_mlp.backward(y, x, weights, gate, h, order, offsets, activation)
        if recompute:
            triton_mlp.forward(x, weights, gate, meta(T, K, dtype=torch.int64), activation, False)
            triton_mlp.backward(y, x, weights, gate, h[:0], order, offsets, activation)


def loss(T: int, D: int, V: int, dtype: torch.dtype = BFLOAT16) -> None:
    x, w = meta(T, D, dtype=dtype), meta(V, D, dtype=dtype)
    triton_chunked.linear_cross_entropy(x, w, meta(T, dtype=torch.int64), True)


def gate(T: int, E: int, K: int) -> None:
    weights, ids = triton_gate.gate(meta(T, E, dtype=torch.float32), K)
    triton_gate.gate_backward(weights, weights, ids, E)


def tests() -> None:
    from tests.kernels import test_gpu as cases

    for shape in cases.SHAPES:
        for dtype in cases.LIMIT:
            for activation in ("swiglu", "gelu"):
                experts(*shape, dtype=dtype, activation=activation)
    for T in cases.GRAPH_TOKENS:
        experts(T, *cases.GRAPH_SHAPE, train=False)
    experts(8192, *cases.GRAPH_SHAPE, recompute=True)  # twice the same bits
    experts(*cases.WRAPPED_SHAPE)
    for T, V in cases.HEADS:
        for dtype in cases.LIMIT:
            loss(T, 192, V, dtype)
    for kept in weights_kept_in():
        for T in cases.FEW_TOKENS:
            few(T, *cases.FEW_SHAPE, kept, False)
        few(1, *cases.FEW_SHAPE, kept, True)
        for H, N, C in cases.PAGED_HEADS:
            paged((H, N, C, {}), 4, 5000, 16, kept)


def peers() -> None:
    import expert_mlp
    import linear_cross_entropy

    for name, shape in expert_mlp.SHAPES.items():
        for T in shape.tokens:
            experts(T, shape.n_experts, shape.top_k, shape.d_model, shape.d_ff, train=name not in expert_mlp.FEW)
    for head in linear_cross_entropy.SHAPES.values():
        loss(head.tokens, head.d_model, head.vocab_size)


def layers() -> None:
    from moe import load_config

    for T in (512, 8192):  # hf_layer.py
        experts(T, 8, 2, 4096, 14336)
    for name, sizes in (("gpt4-8k", (64, 8192)), ("replica-1b", (16384, 32768))):  # step.py, replica_1b.py
        cfg = load_config(name)
        E, K, F = cfg.experts.n_experts, cfg.experts.top_k, cfg.experts.d_ff
        for T in sizes:
            experts(T, E, K, cfg.d_model, F, train=T > 64, recompute=name == "replica-1b")
            gate(T, E, K)
            loss(T, cfg.d_model, cfg.vocab_size)


def weights_kept_in() -> list[torch.dtype]:
    """The types that decoding reads, on this card."""
    e4m3 = [torch.float8_e4m3fn] * (cards.why_not_e4m3(torch.device("cuda", 0)) is None)
    return [BFLOAT16, torch.int8, *e4m3]


def few(T: int, E: int, K: int, D: int, F: int, kept: torch.dtype, batch_invariant: bool) -> None:
    """The expert MLP of few tokens, of weights with scales where they are kept in eight bits."""
    w_in, w_out = meta(E, 2, F, D, dtype=kept), meta(E, D, F, dtype=kept)
    s_in, s_out = (meta(*w.shape[:-1], dtype=torch.float32) if kept.itemsize == 1 else None for w in (w_in, w_out))
    weights, ids = meta(T, K, dtype=torch.float32), meta(T, K, dtype=torch.int64)
    inference.forward(meta(T, D), w_in, s_in, w_out, s_out, weights, ids, "swiglu", "triton", batch_invariant)


def paged(heads: Any, requests: int, length: int, block_size: int, kept: torch.dtype) -> None:
    """Attention of one row of each request."""
    H, N, C, _ = heads
    B = -(-length // block_size)
    k, shapes = meta(requests * B * block_size, N, C, dtype=kept), ((requests, B), (requests + 1,), (requests,))
    scale = meta(len(k), N, dtype=torch.float32) if kept.itemsize == 1 else None
    tables, starts, lengths = (meta(*shape, dtype=torch.int32) for shape in shapes)
    q = meta(requests, H, C)
    triton_paged.paged_attention(q, k, k, tables, starts, lengths, block_size, 1, length, scale, scale)


def decode() -> None:
    import decode as cases

    kinds = weights_kept_in()
    for shape in cases.EXPERTS.values():
        E, K, D, F = shape.n_experts, shape.top_k, shape.d_model, shape.d_ff
        for kept in kinds:
            for T in cases.TOKENS:
                few(T, E, K, D, F, kept, False)
            few(1, E, K, D, F, kept, True)
    for heads in cases.ATTENTION.values():
        for length, batches in heads.batches.items():
            for kept in kinds:
                paged(heads, batches[-1], length, cases.BLOCK, kept)


def gluon() -> None:
    from tests.kernels import test_gluon as cases

    with patch.object(tiles, "GLUON", True):
        for shape in cases.SHAPES:
            for dtype in cases.DTYPES:
                for activation in ("swiglu", "gelu"):
                    experts(*shape, dtype=dtype, activation=activation)
        experts(*cases.LARGE, recompute=True)


GROUPS: dict[str, Callable[[], None]] = {
    "tests": tests,
    "peers": peers,
    "layers": layers,
    "decode": decode,
    "gluon": gluon,
}

# ---------------------------------------------------------------------------------------------------------- compiling


Note = Callable[[dict[str, Any]], None]


class _NotLaunched:
    """Stands in for a kernel: what is launched is compiled, unless another process has taken it, and loaded."""

    def __init__(self, kernel: Any, note: Note) -> None:
        self.kernel, self.note = getattr(kernel, "jit", kernel), note

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compiled(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            name = ".".join((self.kernel.fn.__module__.rpartition(".")[2], self.kernel.fn.__name__))
            try:
                made = self.kernel.run(*args, grid=grid, warmup=True, **kwargs)
                if made is None:
                    return  # another process's
                _ = made.run  # the launcher, which is compiled too
            except Exception as error:
                self.note({"kernel": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
                return
            seconds = time.perf_counter() - start
            if seconds > 0.01:  # else it has been compiled before
                self.note({"kernel": name, "seconds": round(seconds, 3)})

        return compiled


@contextmanager
def compiling(claims: Path, device: torch.device, note: Note) -> Iterator[None]:
    """Inside, launches on tensors without storage are compiled for `device`; `claims` says by whom.

    `note` is given a row for each kernel.
    """

    def taken(*_: Any, fn: Any, key: Any, **__: Any) -> bool:
        """A hook of Triton's: whether not to compile."""
        name = hashlib.sha256(f"{fn.module}.{fn.name} {key}".encode()).hexdigest()
        try:
            os.close(os.open(claims / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True
        return False

    with ExitStack() as stack:
        for module in ahead.MODULES:
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    stack.enter_context(patch.object(module, name, _NotLaunched(kernel, note)))
        # Tiles are chosen by the card of a tensor's device; these have none.
        card = cards.card(device)
        stack.enter_context(patch.object(cards, "card", lambda device: card))
        stack.enter_context(patch.object(runtime, "jit_cache_hook", taken))
        yield


def in_parallel(command: list[str], limit_s: float, n: int) -> dict[str, Any]:
    """Run `command` in `n` processes, which share the work and print a row for each kernel; returns the record.

    After `limit_s` seconds they are ended, and their rows are those of the kernels that are done.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        claims, printed = Path(folder, "claims"), [Path(folder, f"{i}.jsonl") for i in range(n)]
        claims.mkdir()
        workers = []
        for path in printed:
            with path.open("w") as file:
                workers.append(subprocess.Popen([*command, "--claims", str(claims)], stdout=file))
        ended = failed = 0
        for worker in workers:
            try:
                failed += worker.wait(max(0.0, start + limit_s - time.perf_counter())) != 0
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
                ended += 1
        lines = [line for path in printed for line in path.read_text().splitlines()]
    if failed:
        raise SystemExit(f"{failed} of {n} processes of the compilation failed; see above")
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # one that was ended may have been printing
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    return {
        "processes": n,
        "ended": ended,
        "kernels": len(seconds),
        "wall_s": time.perf_counter() - start,
        "compile_s": sum(seconds),
        "slowest_s": max(seconds, default=0.0),
        "compiled": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which it ends with what it has")
    parser.add_argument("--dry-run", action="store_true", help="count the launches, compile nothing")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)  # of one of the processes
    arguments = parser.parse_args()
    if arguments.claims:
        with compiling(arguments.claims, torch.device("cuda", 0), lambda row: print(json.dumps(row), flush=True)):
            GROUPS[arguments.group]()
        return
    if arguments.dry_run:
        with ahead.recording("sm_90") as launches:
            GROUPS[arguments.group]()
        record: dict[str, Any] = {"launches": len(launches), "different": len(set(launches))}
    else:
        command = [sys.executable, __file__, arguments.group]
        record = in_parallel(command, arguments.seconds, min(16, os.cpu_count() or 1))
    print(", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, int | float)))
    if record.get("ended"):
        print(f"  ended after {arguments.seconds:.0f} s; the rest is compiled where it is launched")
    errors = {row["kernel"]: row["error"] for row in record.get("compiled", []) if "error" in row}
    for kernel, error in errors.items():
        print(f"  {kernel}: {error}")
    write_record(arguments.json, record)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
