"""What the kernels cost the host, on a GPU that is not there: microseconds, launches and tensor maps of each call.

Triton's own JIT and launcher run on a stand-in for CUDA's driver (standin/), which looks at every launch and tensor map
and refuses what the card would. Also counted: how many kernels a server compiles, whose batches are all of another
size. Times are this machine's, and say how much of a small batch's time a GPU would wait for its host.

Run: python benchmarks/host_cost.py [--arch sm_90] [--tokens 1 8 64 8192] [--rounds 200] [--json FILE]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from duel import machine, write_record
from standin.driver import ARCHITECTURES, Standin, install

E, K, D, F = 16, 2, 10752, 28672  # gpt4-8k
SERVED = (*range(1, 130), 300, 777, 1000, 1024, 1500, 2047, 2048, 4097, 8191, 8192)


def host_cost(standin: Standin, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """Launches and maps at full width, on tensors without storage, whose making costs torch more than others' does; so
    microseconds of narrow ones, on the CPU. Nothing that is timed depends on a width."""
    rows = []
    for T in tokens:
        wide, narrow = kernels(T, D, F, "meta"), kernels(T, 1024, 256, "cpu")
        for what, call in narrow.items():
            wide[what]()
            counts = standin.count(wide[what])
            rows.append({"tokens": T, "call": what, "us": median_us(call, rounds), **counts._asdict()})
            print(_line(rows[-1]), flush=True)
    return rows


def kernels(T: int, width: int, hidden: int, device: str) -> dict[str, Callable[[], Any]]:
    """The host code of gate, forward and backward, a forward as `ops.expert_mlp` dispatches it, and of decoding."""
    from moe.kernels.experts import inference, op, triton_mlp
    from moe.kernels.gate import triton_gate

    x, weights, ids, experts = _inputs(T, width, hidden, device)
    logits = torch.empty(T, E, device=device)
    _, h, order, offsets = triton_mlp.forward(x, experts, weights, ids, "swiglu", True)

    def dispatched() -> None:
        if device == "meta":  # where it would only be asked for shapes
            triton_mlp.forward(x, experts, weights, ids, "swiglu", False)
        else:
            op._expert_mlp(x, *experts[:2], weights, ids, None, None, "swiglu", "triton", True, None)

    return {
        "gate": lambda: triton_gate.gate(logits, K),
        "forward": lambda: triton_mlp.forward(x, experts, weights, ids, "swiglu", False),
        "backward": lambda: triton_mlp.backward(x, x, experts, weights, h, order, offsets, "swiglu"),
        "forward, dispatched by torch": dispatched,
        "decoding": lambda: inference.forward(
            x, experts.w_in_EGFD, None, experts.w_out_EDF, None, weights, ids, "swiglu", "triton", False
        ),
        "paged attention": lambda: attention(T, 1024, device),
    }


def attention(n_requests: int, length: int, device: str) -> None:
    """One row of each request, 168 heads on one key head."""
    from moe.kernels.attention import triton_paged

    B = -(-length // 16)
    q, k = (torch.empty(n, h, 128, dtype=torch.bfloat16, device=device) for n, h in ((n_requests, 168), (16, 1)))
    blocks, starts, lengths = (
        torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((n_requests, B), n_requests + 1, n_requests)
    )
    triton_paged.paged_attention(q, k, k, blocks, starts, lengths, 16, 1, length, None, None)


def compilations(standin: Standin) -> dict[str, int]:
    """How many kernels a server compiles over its batches, by kernel."""
    from moe.kernels.experts import inference
    from moe.kernels.gate import triton_gate

    with standin.compilations() as found:
        for T in SERVED:
            x, weights, ids, experts = _inputs(T, 128, 256, "cpu")
            triton_gate.gate(torch.empty(T, E), K)
            w_in, w_out = experts[:2]
            inference.forward(x, w_in, None, w_out, None, weights, ids, "swiglu", "triton", False)
            attention(min(T, 130), 16 * T, "cpu")
    return {name: len(keys) for name, keys in sorted(found.items())}


def _inputs(T: int, width: int, hidden: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    from moe.kernels.experts.triton_mlp import Experts

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    weights = torch.empty(T, K, device=device)
    ids = torch.zeros(T, K, dtype=torch.int64, device=device)
    return empty(T, width), weights, ids, Experts(empty(E, 2, hidden, width), empty(E, width, hidden))


def median_us(call: Callable[[], Any], rounds: int) -> float:
    for _ in range(rounds // 10):
        call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens']:6} {row['call']:30} {row['us']:8.1f} us {row['launches']:3} launches {row['maps']:3} maps"
        + (f"  {row['faults']} REFUSED" if row["faults"] else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64, 8192])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    standin = install(arguments.arch)
    print(f"{arguments.arch}, which is not there, on {machine()}")
    compiled = compilations(standin)  # first, as it counts what has not been launched yet
    print(
        f"{sum(compiled.values())} kernels compiled over {len(SERVED)} sizes of a batch, {min(SERVED)}-{max(SERVED)}:"
    )
    print("  " + ", ".join(f"{name} {n}" for name, n in compiled.items()))
    rows = host_cost(standin, arguments.tokens, arguments.rounds)
    record = {"machine": machine(), "arch": arguments.arch, "compilations": compiled, "rows": rows}
    write_record(arguments.json, record)


if __name__ == "__main__":
    main()
