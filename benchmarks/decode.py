"""How much of the memory's speed does decoding reach on this GPU: its expert kernels, its attention, whole steps?

With few rows nothing but reading takes time, so the measure of each is its floor: the bytes that must be read once,
over the speed of a large copy measured in the same run (read + written).

    experts    3 D F numbers of each expert that the tokens touch; one to 64 tokens; bfloat16, int8, float8_e4m3fn
    attention  2 N C numbers of each position of each request, at 8k and at 32k of them; the same three types
    steps      all weights but the embedding and the experts not touched, and the cache; one to 512 requests

Beside transformers' grouped_mm, torch's, vLLM's fused_moe where it can be imported, and torch's own attention on keys
and values that lie in one piece. Results are compared before anything is timed; sides take turns; figures are medians.
Run: python benchmarks/decode.py [--only experts attention steps] [--quick] [--json FILE] [--floors] [--dry-run]

--floors prints the floors by arithmetic, for any number of GB/s, and needs no GPU.
--dry-run goes through all of it on a CPU, at toy sizes, in Triton's interpreter: for checking the script, no figures.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from duel import stop_without_gpu
from measure import Report, ceilings, difference, emptied, failure, head, lacking, medians
from peers import available, ours, transformers_grouped_mm
from shapes import SHAPES, Shape
from torch import Tensor

import moe
from moe import plan, profile
from moe.config import Config
from moe.kernels import ops
from moe.kernels.experts import inference, quantized, reference
from moe.kernels.experts.quantized import QuantizedExperts
from moe.serve.pages import Pages, Segment
from moe.serve.runner import Runner
from moe.serve.tables import Tables

OURS, INVARIANT, GRAPH = "gpt4-moe", "gpt4-moe, batch invariant", "gpt4-moe, as a graph"
NARROW = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
LIMIT = 3e-2  # relative norms of differences, of bfloat16
PARTS = ("experts", "attention", "steps")
TOKENS, QUICK_TOKENS = (1, 2, 4, 8, 16, 32, 64), (1, 8, 64)
EXPERTS = {name: SHAPES[name] for name in ("gpt4 few", "mixtral few", "replica-1b")}
TOY = Shape(32, 32, 4, 2, (1,))


class Heads(NamedTuple):
    """Attention of a model, and how many requests of each length are measured."""

    n_heads: int
    n_kv_heads: int
    width: int
    batches: dict[int, tuple[int, ...]]  # positions of each request -> numbers of requests


ATTENTION = {
    "gpt4": Heads(168, 1, 128, {8192: (1, 16, 128), 32768: (1, 16, 64)}),
    "mixtral": Heads(32, 8, 128, {8192: (1, 16, 64), 32768: (1, 16)}),
}
TOY_HEADS = {"toy": Heads(6, 2, 16, {40: (2,)})}
STEPS = {"one layer of gpt4-8k": ("gpt4-8k", ["n_layers=1"]), "replica-1b": ("replica-1b", [])}
BATCHES, CONTEXT, BLOCK = (1, 8, 64, 512), 1024, 16


class Bench(NamedTuple):
    """What all parts share."""

    device: str
    dtype: torch.dtype
    rounds: int
    copy_gbs: float
    quick: bool
    report: Report


# ------------------------------------------------------------------------------------------------------------- floors


def expert_bytes(shape: Shape, touched: int, itemsize: int) -> int:
    """Of the experts touched, with scales where numbers have eight bits."""
    scales = 4 * (2 * shape.d_ff + shape.d_model) if itemsize == 1 else 0
    return touched * (3 * shape.d_model * shape.d_ff * itemsize + scales)


def expected_touched(n_experts: int, top_k: int, tokens: int) -> float:
    """Experts that tokens touch that choose evenly: E (1 - (1 - K/E)^T)."""
    return n_experts * (1 - (1 - top_k / n_experts) ** tokens)


def cache_bytes(heads: Heads, requests: int, length: int, itemsize: int) -> int:
    """Of the keys and values of all positions, with scales where numbers have eight bits."""
    return requests * length * 2 * heads.n_kv_heads * (heads.width * itemsize + (4 if itemsize == 1 else 0))


def step_bytes(cfg: Config, touched: int, requests: int, length: int) -> int:
    """Of a decoding step in 16-bit numbers; `touched` experts in all layers together."""
    counts, a = plan.params(cfg), cfg.attention
    always = counts.total - counts.experts - (counts.embedding if counts.head else 0)
    heads = Heads(a.n_heads, a.n_kv_heads, a.head_dim, {})
    experts = counts.expert * touched // max(1, cfg.n_moe_layers)
    return 2 * (always + experts) + cfg.n_layers * cache_bytes(heads, requests, length, 2)


def print_floors(gbs: float) -> None:
    """What no kernel can be faster than, at so many GB/s."""
    print(f"floors at {gbs:,.0f} GB/s\n\nexperts, tokens that choose evenly: experts touched, GB, ms")
    for name, shape in EXPERTS.items():
        for label, itemsize in (("bfloat16", 2), ("8 bits", 1)):
            cells = []
            for tokens in TOKENS:
                touched = expected_touched(shape.n_experts, shape.top_k, tokens)
                n_bytes = expert_bytes(shape, 1, itemsize) * touched
                cells.append(f"T {tokens}: {touched:.1f}, {n_bytes / 1e9:.3g}, {n_bytes / gbs / 1e6:.3g}")
            print(f"  {name:12} {label:9} " + "; ".join(cells))
    print("\nattention: MB, us, operations a byte")
    for name, heads in ATTENTION.items():
        for length, batches in heads.batches.items():
            for label, itemsize in (("bfloat16", 2), ("8 bits", 1)):
                cells = []
                for requests in batches:
                    n_bytes = cache_bytes(heads, requests, length, itemsize)
                    per_byte = 4 * heads.n_heads * heads.width * requests * length / n_bytes
                    cells.append(f"Q {requests}: {n_bytes / 1e6:.3g}, {n_bytes / gbs / 1e3:.3g}, {per_byte:.0f}")
                print(f"  {name:12} {length:6} {label:9} " + "; ".join(cells))
    print(f"\nsteps of {CONTEXT} positions, requests that choose evenly: GB, ms")
    for name, (config, changes) in STEPS.items():
        cfg, cells = moe.load_config(config).with_overrides(changes), []
        for requests in BATCHES:
            touched = expected_touched(cfg.experts.n_experts, cfg.experts.top_k, requests) * cfg.n_moe_layers
            n_bytes = step_bytes(cfg, round(touched), requests, CONTEXT)
            cells.append(f"Q {requests}: {n_bytes / 1e9:.3g}, {n_bytes / gbs / 1e6:.3g}")
        print(f"  {name:22} " + "; ".join(cells))


# ---------------------------------------------------------------------------------------------------------- measuring


def graphed(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call as one launch; on a CPU, where there are no graphs, as it is."""
    if device == "cpu":
        return call
    call()  # compiled, and workspaces made
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compare(
    what: dict[str, Any], n_bytes: int, calls: dict[str, Callable[[], Any]], want: Tensor | None, bench: Bench
) -> None:
    """Leave out what is wrong or fails, time the others, and report a row of each."""
    sides = {}
    for side, call in calls.items():
        try:
            with torch.no_grad():
                off = 0.0 if want is None else difference([call()], [want])
        except Exception as error:
            bench.report.note(failure(error), **what, side=side)
            continue
        if off < LIMIT:
            sides[side] = call
        else:
            bench.report.note(f"wrong: off by {off:.1e}", **what, side=side)
    if OURS in sides and what["what"] != "step":
        sides[GRAPH] = graphed(sides[OURS], bench.device)
    problems: dict[str, str] = {}
    with torch.no_grad():
        seconds = medians(sides, bench.rounds, bench.device, problems)
    for side, problem in problems.items():
        bench.report.note(problem, **what, side=side)
    for side, s in seconds.items():
        gbs = n_bytes / s / 1e9
        bench.report.row({**what, "side": side, "ms": s * 1e3, "gbs": gbs, "of_copy": gbs / bench.copy_gbs})
    emptied(bench.device)


def normal(*shape: int, bench: Bench, std: float = 1.0) -> Tensor:
    return torch.empty(shape, device=bench.device, dtype=bench.dtype).normal_(0, std)


def vllm_fused_moe() -> Callable[..., Tensor]:
    """vLLM's Triton kernel, with the tile sizes that it has for the shape."""
    fused: Any = importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts

    def layer(x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return fused(x_TD, w_in_EGFD.flatten(1, 2), w_out_EDF, weights_TK, ids_TK.int())

    return layer


def experts(bench: Bench) -> None:
    """The expert MLP of few tokens."""
    dry = bench.device == "cpu"
    makers = {
        "transformers grouped_mm": transformers_grouped_mm,
        "torch grouped_mm (our `grouped`)": lambda: ours("grouped"),
        "vLLM fused_moe": vllm_fused_moe,
    }
    peers = available(makers, bench.device)
    for name, shape in ({"toy": TOY} if dry else EXPERTS).items():
        D, width, E, K, _ = shape
        what = {"what": "experts", "shape": name}
        if problem := lacking(2 * shape.weights() + 8 * 2**30, bench.device):
            bench.report.note(problem, **what)
            continue
        w_in = normal(E, 2, width, D, bench=bench, std=D**-0.5)
        w_out = normal(E, D, width, bench=bench, std=width**-0.5)
        for tokens in (1, 4) if dry else QUICK_TOKENS if bench.quick else TOKENS:
            g = torch.Generator().manual_seed(tokens)
            ids = torch.rand(tokens, E, generator=g).argsort(1)[:, :K].contiguous().to(bench.device)
            given = normal(tokens, D, bench=bench), torch.rand(tokens, K, generator=g).to(bench.device), ids
            _plain(given, (w_in, w_out), peers, shape, {**what, "tokens": tokens, "kept": str(bench.dtype)[6:]}, bench)
        for kept, dtype in NARROW.items():
            small = ops.quantize_experts(w_in, w_out, dtype)
            for tokens in (1, 4) if dry else QUICK_TOKENS if bench.quick else TOKENS:
                _quantized(tokens, small, shape, {**what, "tokens": tokens, "kept": kept}, bench)
            del small
        del w_in, w_out
        emptied(bench.device)


def _plain(
    given: tuple[Tensor, Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    peers: dict[str, Callable[..., Tensor]],
    shape: Shape,
    what: dict[str, Any],
    bench: Bench,
) -> None:
    (x, weights, ids), (w_in, w_out) = given, kept
    want = torch.zeros_like(x, dtype=torch.float32)
    for e in ids.unique().tolist():
        up, down = (w[e : e + 1].float() for w in (w_in, w_out))
        share = (weights * (ids == e)).sum(1, keepdim=True)
        want += reference.expert_mlp(x.float(), up, down, share, torch.zeros_like(ids[:, :1]), "swiglu")
    calls: dict[str, Callable[[], Any]] = {
        side: lambda invariant=invariant: inference.forward(
            x, w_in, None, w_out, None, weights, ids, "swiglu", "triton", invariant
        )
        for side, invariant in ((OURS, False), (INVARIANT, True))
    }
    calls |= {side: lambda layer=layer: layer(x, w_in, w_out, weights, ids) for side, layer in peers.items()}
    touched = ids.unique().numel()
    compare({**what, "touched": touched}, expert_bytes(shape, touched, x.element_size()), calls, want, bench)


def _quantized(tokens: int, small: QuantizedExperts, shape: Shape, what: dict[str, Any], bench: Bench) -> None:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, shape.n_experts, generator=g).argsort(1)[:, : shape.top_k].contiguous().to(bench.device)
    x, weights = normal(tokens, shape.d_model, bench=bench), torch.rand(ids.shape, generator=g).to(bench.device)
    want = quantized.expert_mlp(x.float(), small, weights, ids, "swiglu")
    calls: dict[str, Callable[[], Any]] = {
        side: lambda invariant=invariant: ops.expert_mlp_quantized(
            x, small, weights, ids, "swiglu", "triton", batch_invariant=invariant
        )
        for side, invariant in ((OURS, False), (INVARIANT, True))
    }
    touched = ids.unique().numel()
    compare({**what, "touched": touched}, expert_bytes(shape, touched, 1), calls, want, bench)


def attention(bench: Bench) -> None:
    """One new position of each request, against all that it has."""
    dry = bench.device == "cpu"
    for name, heads in (TOY_HEADS if dry else ATTENTION).items():
        for length, batches in heads.batches.items():
            for requests in batches[-1:] if bench.quick else batches:
                what = {"what": "attention", "shape": name, "requests": requests, "length": length}
                try:
                    _attention(heads, length, requests, what, bench)
                except Exception as error:
                    bench.report.note(failure(error), **what)
                emptied(bench.device)


def _attention(heads: Heads, length: int, requests: int, what: dict[str, Any], bench: Bench) -> None:
    H, N, C, _ = heads
    per_request = -(-length // BLOCK)
    q = normal(requests, H, C, bench=bench)
    k, v = (normal(requests * per_request * BLOCK, N, C, bench=bench) for _ in "kv")
    order = torch.randperm(requests * per_request, generator=torch.Generator().manual_seed(0))
    blocks = order.view(requests, per_request).tolist()
    tables = Tables.of(blocks, [1] * requests, [length] * requests, torch.device(bench.device))
    slots = (order.view(requests, -1, 1) * BLOCK + torch.arange(BLOCK)).flatten(1)[:, :length].to(bench.device)
    k_QNAC, v_QNAC = (x[slots].transpose(1, 2).contiguous() for x in (k, v))

    def in_one_piece() -> Tensor:
        return F.scaled_dot_product_attention(q.view(requests, N, H // N, C), k_QNAC, v_QNAC).view(requests, H, C)

    def call(*layer: Tensor | None) -> Callable[[], Tensor]:
        return lambda: ops.paged_attention(
            q, layer[0], layer[1], *tables[:3], BLOCK, max_query_len=1, max_seq_len=length,  # type: ignore[arg-type]
            k_scale_PN=layer[2], v_scale_PN=layer[3], impl="triton",
        )  # fmt: skip

    calls: dict[str, Callable[[], Any]] = {OURS: call(k, v, None, None), "torch SDPA, in one piece": in_one_piece}
    kept = str(bench.dtype)[6:]
    compare(
        {**what, "kept": kept}, cache_bytes(heads, requests, length, q.element_size()), calls, in_one_piece(), bench
    )
    for kept, dtype in NARROW.items():
        (k8, k_scale), (v8, v_scale) = ops.quantize(k, dtype), ops.quantize(v, dtype)
        layer = k8, v8, k_scale, v_scale
        exact = ops.paged_attention(
            q, k8, v8, *tables[:3], BLOCK, max_query_len=1, max_seq_len=length, k_scale_PN=k_scale, v_scale_PN=v_scale,
            impl="reference",
        )  # fmt: skip
        compare({**what, "kept": kept}, cache_bytes(heads, requests, length, 1), {OURS: call(*layer)}, exact, bench)


def step_cases(dry: bool) -> Iterator[tuple[str, Config, tuple[int, ...], int]]:
    """Name, model, numbers of requests, and positions that each has."""
    if dry:
        yield "toy", moe.load_config("replica-tiny").with_overrides(["n_layers=1", "experts.d_ff=64"]), (2,), 8
        return
    for name, (config, changes) in STEPS.items():
        yield name, moe.load_config(config).with_overrides(changes), BATCHES, CONTEXT


def steps(bench: Bench) -> None:
    """A step of the engine's runner, the host's part of it included."""
    for name, cfg, batches, context in step_cases(bench.device == "cpu"):
        what = {"what": "step", "shape": name}
        if problem := lacking(2.2 * plan.params(cfg).total + 8 * 2**30, bench.device):
            bench.report.note(problem, **what)
            continue
        model = profile.random_model(cfg, bench.dtype, bench.device)
        for requests in batches[:: 3 if bench.quick else 1]:
            try:
                _step(model, cfg, requests, context, {**what, "requests": requests, "length": context}, bench)
            except Exception as error:
                bench.report.note(failure(error), **what, requests=requests)
            emptied(bench.device)
        del model


def _step(model: Any, cfg: Config, requests: int, context: int, what: dict[str, Any], bench: Bench) -> None:
    per_request = -(-(context + 1) // BLOCK)
    pages = Pages(cfg, requests * per_request, BLOCK, bench.dtype, bench.device)
    for layer in pages.layers:
        layer[0].normal_()
        layer[1].normal_()
    runner = Runner(model, pages)
    runner.record = True
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.vocab_size, (requests,), generator=g).tolist()
    blocks = torch.randperm(requests * per_request, generator=g).view(requests, -1).tolist()
    segments = [Segment([t], context, b) for t, b in zip(tokens, blocks, strict=True)]

    def call() -> Tensor:
        return runner(segments, range(requests))

    call()
    touched = sum(choice[0].unique().numel() for choice in runner.routing)
    n_bytes = step_bytes(cfg, touched, requests, context)
    compare({**what, "touched": touched}, n_bytes, {OURS: call}, None, bench)


# --------------------------------------------------------------------------------------------------------------- main


def line(row: dict[str, Any]) -> str:
    asked = f"T {row['tokens']}" if "tokens" in row else f"{row['requests']} x {row['length']}"
    text = (
        f"  {row['what']:9} {row['shape']:21} {asked:12} {row.get('kept', ''):14} {row['side']:33} {row['ms']:9.3f} ms"
    )
    return f"{text} {row['gbs']:7.0f} GB/s {row['of_copy']:5.0%} of the copy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument(
        "--floors", nargs="?", type=float, const=4800.0, metavar="GB/s", help="print the floors, and end"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    if arguments.floors:
        print_floors(arguments.floors)
        return
    dry = arguments.dry_run
    stop_without_gpu(dry)
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    first = head(device)
    _, copy = ceilings(device)
    report = Report(arguments.json, {**first, "copy_gbs": copy}, line)
    print(f"a copy: {copy:.0f} GB/s")
    bench = Bench(device, dtype, 1 if dry else 5 if arguments.quick else 11, copy, arguments.quick, report)
    for part in arguments.only:
        {"experts": experts, "attention": attention, "steps": steps}[part](bench)
    report.ended()
    found = {row["what"] for row in report.record["rows"] if row["side"] == OURS}
    wanted = {part.removesuffix("s") if part == "steps" else part for part in arguments.only}
    if found != wanted:
        raise SystemExit(f"not measured: {', '.join(sorted(wanted - found))}; see above")


if __name__ == "__main__":
    main()
