"""Measure other tile sizes on this GPU and keep the faster ones, in a file that the kernels read from then on.

The shipped table (tiles.py) is used as it is unless this is run; nothing is ever tuned during training.
Run: python -m moe.kernels.tune --d-model 4096 --d-ff 14336 --experts 8 --top-k 2 [--tokens 8192]
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from moe.kernels import tiles
from moe.kernels.experts import triton_mlp, triton_routes
from moe.kernels.experts.triton_pointer import Experts
from moe.kernels.tiles import PRODUCTS, Tile, Tiles


def candidates(product: str, tile: Tile, tma: bool) -> Iterator[Tile]:
    """Neighbours of a tile: other column widths, depths, warps, pipeline stages and groups."""
    splits = (1,)
    if product == "down_backward":
        splits = (1, 2, 4) if tma else (1, 2)
    elif tma and product in ("down", "dx"):
        splits = (1, 2)
    for columns in (64, 128, 256):
        for depth in (32, 64, 128):
            for warps, stages in ((4, 3), (4, 4), (8, 3), (8, 4)):
                for split in splits:
                    yield replace(tile, columns=columns, depth=depth, warps=warps, stages=stages, split=split)
    for group in (4, 16):
        yield replace(tile, group=group)


def milliseconds(call: Callable[[], Any], rounds: int = 7) -> float:
    """Median time of a call on the GPU."""
    times = []
    for round_ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if round_ >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def tune(d_model: int, d_ff: int, n_experts: int, top_k: int, n_tokens: int, gates: int = 2) -> tuple[str, Tiles]:
    """The key and the fastest tiles found for one shape, product after product, each with the others as they are."""
    device, dtype = torch.device("cuda"), torch.bfloat16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, dy = normal(n_tokens, d_model), normal(n_tokens, d_model)
    experts = Experts(normal(n_experts, gates, d_ff, d_model), normal(n_experts, d_model, d_ff))
    weights = torch.rand(n_tokens, top_k, device=device)
    ids = triton_routes.balanced_ids(n_tokens, n_experts, top_k, device)
    activation, R = "swiglu" if gates == 2 else "gelu", n_tokens * top_k
    products, best = triton_mlp._choose(x, experts, R)
    order, offsets = triton_routes.place(ids, n_experts)

    def calls(sizes: Tiles) -> dict[str, Callable[[], Any]]:
        routes = triton_routes.cut(order, offsets, sizes.rows)
        x_rows, dy_rows = products.rows(x, routes, top_k), products.rows(dy, routes, top_k)
        h, act = products.up(x_rows, experts, routes, top_k, activation, best, True, True)
        return {
            "up": lambda: products.up(x_rows, experts, routes, top_k, activation, sizes, True, True),
            "down": lambda: products.down(act, experts, routes, sizes),
            "down_backward": lambda: products.down_backward(dy_rows, experts, weights, h, routes, activation, sizes),
            "dx": lambda: products.dx(h, experts, routes, sizes),
            "dw": lambda: products.weight_gradient(h, x_rows, routes, top_k, n_experts, sizes, "b"),
        }

    for product in PRODUCTS:
        fastest = milliseconds(calls(best)[product])
        print(f"{product:14} {fastest:9.3f} ms  {getattr(best, product)}")
        for tile in candidates(product, getattr(best, product), best.tma):
            sizes = replace(best, **{product: tile})
            try:
                found = milliseconds(calls(sizes)[product])
            except Exception:  # too much shared memory, or a tile that the compiler does not take
                torch.cuda.synchronize()
                continue
            if found < 0.98 * fastest:
                fastest, best = found, sizes
                print(f"{'':14} {fastest:9.3f} ms  {tile}", flush=True)
    row = tiles.architecture(device) + (" tma" if best.tma else "")
    return f"{row} {tiles.shape_class(R, n_experts)}", best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("d-model", "d-ff", "experts", "top-k"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 8192])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning measures on a CUDA GPU, and there is none here")
    path = tiles.tuned_path()
    table = dict(tiles.tuned())
    for tokens in arguments.tokens:
        print(f"\n{tokens} tokens")
        with patch.object(tiles, "tuned", dict):  # begin from the shipped table
            key, best = tune(arguments.d_model, arguments.d_ff, arguments.experts, arguments.top_k, tokens)
        table[key] = best
        tiles.save(path, table)  # after every size: what is found stays
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
