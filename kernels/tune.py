"""Measure other tile sizes on this GPU and keep the faster ones, in a file that the kernels read from then on.

The shipped table (tiles.py) is used as it is unless this is run; nothing is ever tuned during training. Which tiles are
worth a try is arithmetic (tile_model.py); they are compiled side by side, without the GPU, and those that spill are
dropped; the others are timed in another process, so that one that crashes costs only itself.
Run: python -m moe.kernels.tune --d-model 4096 --d-ff 14336 --experts 8 --top-k 2 [--tokens 8192] [--seconds 120]
     ... --dry-run --arch sm_90 lists, on any machine, what would be tried on such a card.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from moe.kernels import ahead, cards, tile_model, tiles
from moe.kernels.cards import CARDS, Card
from moe.kernels.experts import triton_mlp, triton_routes
from moe.kernels.experts.triton_pointer import Experts
from moe.kernels.isolated import Isolated, side_by_side
from moe.kernels.tile_model import Shape
from moe.kernels.tiles import PRODUCTS, Tiles

Trial = tuple[str, Tiles]  # one product, with tiles of which those of the others stay as they are


def trials(card: Card, shape: Shape) -> tuple[str, Tiles, dict[str, list[Tiles]]]:
    """The shipped tiles with their key, and for each product the tiles to try in the place of its own."""
    size = tiles.shape_class(shape.tokens * shape.top_k, shape.experts)
    key, best = tiles.shipped(card, size, tma=shape.d_model % 8 == 0 and shape.d_ff % 8 == 0)
    found = {}
    for name in PRODUCTS:
        product, tile = tile_model.product(name, shape), getattr(best, name)
        others = tile_model.candidates(card, product, tile, best.rows, best.tma)
        found[name] = [replace(best, **{name: other}) for other in others]
    return key, best, found


def prepare(shape: Shape, device: str) -> Callable[[str, Tiles], Callable[[], Any]]:
    """Operands of a shape on a device; returns what makes the call of one product with given tiles."""
    dtype = torch.bfloat16

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, dtype=dtype)

    D, F, E, K, T, G = shape
    x, dy = normal(T, D), normal(T, D)
    experts, weights = Experts(normal(E, G, F, D), normal(E, D, F)), torch.rand(T, K, device=device)
    activation = "swiglu" if G == 2 else "gelu"
    products, best = triton_mlp._choose(x, experts, T * K)
    order, offsets = triton_routes.place(triton_routes.balanced_ids(T, E, K, device), E)
    routes = triton_routes.cut(order, offsets, best.rows)  # no trial has other rows
    x_rows, dy_rows = products.rows(x, routes, K), products.rows(dy, routes, K)
    h, act = products.up(x_rows, experts, routes, K, activation, best, True, True)

    def call(product: str, sizes: Tiles) -> Callable[[], Any]:
        return {
            "up": lambda: products.up(x_rows, experts, routes, K, activation, sizes, True, True),
            "down": lambda: products.down(act, experts, routes, sizes),
            "down_backward": lambda: products.down_backward(dy_rows, experts, weights, h, routes, activation, sizes),
            "dx": lambda: products.dx(h, experts, routes, sizes),
            "dw": lambda: products.weight_gradient(h, x_rows, routes, K, E, sizes, "b"),
        }[product]

    return call


# --------------------------------------------------------------------------------------------------------- compiling


def compiler(arch: str, shape: Shape) -> Callable[[str, Tiles], str]:
    """For the processes that compile: why a trial is not worth timing, or nothing; Triton's cache keeps the kernel."""

    def problem(product: str, sizes: Tiles) -> str:
        with ahead.recording(arch) as launches:
            call = prepare(shape, "meta")
            launches.clear()
            call(product, sizes)()
        (launch,) = (launch for launch in launches if launch.is_product)
        return ahead.compile_launch(launch, arch).problem

    return problem


def worth_timing(arch: str, shape: Shape, found: list[Trial], jobs: int, until: float) -> list[Trial]:
    """The trials that compile, and without spills, before `until`."""
    problems = side_by_side(compiler, (arch, shape), found, jobs, until=until)
    return [trial for trial, problem in zip(found, problems, strict=True) if problem == ""]


# ------------------------------------------------------------------------------------------------------------ timing


def timed(shape: Shape, device: str) -> Callable[[str, Tiles], float]:
    """For the process that times: the function that a trial is given to."""
    torch.cuda.set_device(torch.device(device))
    call = prepare(shape, device)
    return lambda product, sizes: milliseconds(call(product, sizes))


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


def fastest(best: Tiles, found: list[Trial], time_one: Callable[[str, Tiles], float], deadline: float) -> Tiles:
    """Of each product the fastest tile, the shipped one unless another takes 2% less.

    Args:
        time_one: milliseconds of one product with given tiles; raises RuntimeError where it does not run.
    """
    for product in PRODUCTS:
        least = _try(time_one, product, best)
        print(f"{product:14} {least:9.3f} ms  {getattr(best, product)}", flush=True)
        for sizes in (sizes for name, sizes in found if name == product):
            if time.monotonic() > deadline:
                print("the time is up: the rest stays as it is shipped", flush=True)
                return best
            tile = getattr(sizes, product)
            if (ms := _try(time_one, product, sizes)) < 0.98 * least:
                least, best = ms, replace(best, **{product: tile})
                print(f"{'':14} {least:9.3f} ms  {tile}", flush=True)
    return best


def _try(time_one: Callable[[str, Tiles], float], product: str, sizes: Tiles) -> float:
    try:
        return time_one(product, sizes)
    except RuntimeError as error:
        print(f"{'':14}   failed      {getattr(sizes, product)}: {error}", flush=True)
        return math.inf


# -------------------------------------------------------------------------------------------------------- the command


def listing(card: Card, shape: Shape) -> str:
    """What would be tried at a shape on a card, with the figures that it was chosen by."""
    key, best, found = trials(card, shape)
    lines = [f"{shape.tokens} tokens: {key}, {sum(map(len, found.values()))} to try"]
    lines.append(f"{'':14} {'rows x columns x depth':23} warps stages split group registers   shared  waves  clocks")
    for name in PRODUCTS:
        product = tile_model.product(name, shape)
        for mark, sizes in (("shipped", best), *(("", sizes) for sizes in found[name])):
            tile = getattr(sizes, name)
            rows = tile.rows if name == "dw" else sizes.rows
            shared = tile_model.shared_bytes(card, name, tile, rows, sizes.tma)
            n_blocks = tile_model.blocks(card, tile, rows, shared, sizes.tma)
            box = f"{rows} x {tile.columns} x {tile.depth}"
            lines.append(
                f"{name:14} {box:14} {mark:8} {tile.warps:5} {tile.stages:6} {tile.split:5} {tile.group:5} "
                f"{tile_model.accumulator(tile, rows):9} {shared:8,} "
                f"{tile_model.waves(card, product, tile, rows, n_blocks):6.1f} "
                f"{tile_model.clocks(card, product, tile, rows, sizes.tma):7.2g}"
            )
    return "\n".join(lines)


def tune(card: Card, shape: Shape, jobs: int, seconds: float) -> tuple[str, Tiles]:
    """The key and the fastest tiles found for a shape on the current GPU, within about so many seconds."""
    deadline = time.monotonic() + seconds
    key, best, found = trials(card, shape)
    # The best of every product first: where processors are few, there is no time for all.
    ranks = zip_longest(*([(name, sizes) for sizes in found[name]] for name in PRODUCTS))
    kept = in_order = [trial for rank in ranks for trial in rank if trial]
    # A card of a kind that nothing is compiled for ahead of time, such as sm_121, compiles as it is timed.
    if card.arch in ahead.TARGETS:
        kept = worth_timing(card.arch, shape, in_order, jobs, until=deadline - seconds / 2)
    print(f"\n{shape.tokens} tokens, {key}: {len(kept)} of {len(in_order)} tiles compile without spills", flush=True)
    timer = Isolated(timed, (shape, f"cuda:{torch.cuda.current_device()}"), seconds=20)
    try:
        return key, fastest(best, kept, timer.run, deadline)
    finally:
        timer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("d-model", "d-ff", "experts", "top-k"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--gates", type=int, choices=(1, 2), default=2, help="1: GELU; 2: gate and up (default)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 8192])
    parser.add_argument("--seconds", type=float, default=120, help="for each number of tokens (default: 120)")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried, and measure nothing")
    parser.add_argument("--arch", choices=ahead.TARGETS, help="with --dry-run: a card that is not here")
    arguments = parser.parse_args()
    if arguments.arch and not arguments.dry_run:
        parser.error("--arch needs --dry-run: only the GPU of this machine can be measured")
    if not arguments.arch and not torch.cuda.is_available():
        raise SystemExit("tuning measures on a CUDA GPU, and there is none here; --dry-run --arch sm_90 needs none")
    card = CARDS[arguments.arch] if arguments.arch else cards.card(torch.device("cuda"))
    if reason := cards.refusal(card):
        raise SystemExit(f"there is nothing to tune: {reason}")
    sizes = (arguments.d_model, arguments.d_ff, arguments.experts, arguments.top_k)
    shapes = [Shape(*sizes, tokens, arguments.gates) for tokens in arguments.tokens]
    if arguments.dry_run:
        print("\n\n".join(listing(card, shape) for shape in shapes))
        return
    path = tiles.tuned_path(card)
    table = dict(tiles.tuned(card))
    for shape in shapes:
        key, table[key] = tune(card, shape, arguments.jobs, arguments.seconds)
        tiles.save(path, card, table)  # after every size: what is found stays
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
