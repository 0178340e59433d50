"""The Gluon variant of `up`, `down` and `dx`: what it computes in any order of events, what it compiles to, and, on a
GPU, that it is right. Its functions run on the machine of gluon_machine.py, which keeps to the hardware's rules."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.kernels import cards, ops, tiles
from moe.kernels.experts import reference
from tests.conftest import rel
from tests.kernels import gluon_machine
from tests.kernels.test_gpu import LIMIT, step, tensors

triton_gluon = pytest.importorskip("moe.kernels.experts.triton_gluon")
triton_mlp = pytest.importorskip("moe.kernels.experts.triton_mlp")
triton_routes = pytest.importorskip("moe.kernels.experts.triton_routes")
ROOT = Path(__file__).parent.parent.parent
TILE = tiles.Tile(128, 64, stages=3, group=2)
SMALL = tiles.Tiles(32, TILE, TILE, TILE, TILE, dw=TILE, tma=True)
# On a GPU; T, E, K, D, F. benchmarks/precompile.py compiles these on all cores beforehand.
SHAPES = [(512, 4, 2, 64, 128), (1000, 5, 2, 712, 856), (8192, 16, 2, 512, 1024), (4096, 4, 1, 2048, 136)]
LARGE = (8192, 16, 2, 1024, 2048)
DTYPES = (torch.bfloat16, torch.float16)


def hopper(test: Any) -> Any:
    """Of a test that needs a Hopper GPU."""
    is_here = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return pytest.mark.gpu(pytest.mark.skipif(not is_here, reason="needs a Hopper GPU")(test))


def routes_of(counts: list[int], tile_rows: int) -> Any:
    """The routes of rows that are sorted already, `counts` of each expert."""
    begins = [sum(counts[:e]) for e in range(len(counts) + 1)]
    tiles_ = [(e, row) for e in range(len(counts)) for row in range(begins[e], begins[e + 1], tile_rows)]
    experts, rows = torch.tensor([*tiles_, (-1, 0)], dtype=torch.int32).t().contiguous()
    order = torch.arange(sum(counts), dtype=torch.int32)
    offsets, n_tiles = (torch.tensor(values, dtype=torch.int32) for values in (begins, [len(tiles_)]))
    return triton_routes.Routes(order, order, offsets, experts, rows, n_tiles)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def by_expert(counts: list[int], rows: Tensor, w: Tensor) -> Tensor:
    """rows[r] @ w[the expert of r] in float64."""
    return torch.cat([a.double() @ b.double() for a, b in zip(rows.split(counts), w, strict=True)])


@pytest.mark.parametrize(
    ("counts", "D", "F"),
    [
        ([0, 1, 0], 64, 64),  # one tile of one row, in fewer steps than slots; two programs have none
        ([33, 0, 70, 31, 32, 1], 200, 136),  # widths that no tile divides, experts that end within a half
        ([50], 520, 72),  # more steps than slots, a tile wider than the matrix
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_events_gives_the_products(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], D: int, F: int, activation: str, seed: int
) -> None:
    monkeypatch.setattr(triton_gluon, "product_kernel", gluon_machine.Machine(triton_gluon.product_kernel, seed))
    monkeypatch.setattr(tiles, "programs", lambda device: 3)
    R, E, G = sum(counts), len(counts), ops.ACTIVATIONS[activation]
    routes = routes_of(counts, SMALL.rows)
    x, w_in, w_out = normal(R, D), normal(E, G, F, D, seed=1) / D**0.5, normal(E, D, F, seed=2) / F**0.5
    experts = triton_gluon.Experts(w_in, w_out)

    want_h = by_expert(counts, x, w_in.flatten(1, 2).mT)
    want_act = reference.activate(want_h.view(R, G, F), activation)
    for store_h, store_act in ((True, True), (True, False), (False, True)):
        h, act = triton_gluon.up(x, experts, routes, 1, activation, SMALL, store_h, store_act)
        assert not store_h or rel(h, want_h) < 4e-3
        assert not store_act or rel(act, want_act) < 4e-3
        assert (len(h), len(act)) == (R * store_h, R * store_act)
    act = normal(R, F, seed=3)
    assert rel(triton_gluon.down(act, experts, routes, SMALL), by_expert(counts, act, w_out.mT)) < 4e-3
    dh = normal(R, G * F, seed=4)
    assert rel(triton_gluon.dx(dh, experts, routes, SMALL), by_expert(counts, dh, w_in.flatten(1, 2))) < 4e-3


# Each takes one rule out of a kernel; the machine must notice, or it proves nothing.
FAULTS = {
    "a slot is free before its product is complete": (
        "warpgroup_mma_wait",
        lambda real: lambda n, deps: real(n and 3, deps),
    ),
    "a buffer is written while a store reads it": ("store_wait", lambda real: lambda n: None),
    "TMA reads what was not fenced": ("fence", lambda real: lambda: None),
    "a slot is free when one half has read it": ("init", lambda real: lambda bar, count: real(bar, 1)),
    "a product does not wait for its operands": (
        "wait",
        lambda real: lambda bar, parity: real(bar, parity if bar.count == 2 else parity ^ 1),
    ),
    "a slot is filled before it is free": (
        "wait",
        lambda real: lambda bar, parity: real(bar, parity) if bar.count == 1 else None,
    ),
    "more bytes come than were named": ("expect", lambda real: lambda bar, n: real(bar, n // 2)),
    "a barrier waits for more bytes than come": ("expect", lambda real: lambda bar, n: real(bar, 2 * n)),
    "slots are not given back": ("arrive", lambda real: lambda bar, count, pred=True: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_notices(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    method, wrong = FAULTS[fault]
    real = getattr(gluon_machine.Machine, method)
    monkeypatch.setattr(
        gluon_machine.Machine, method, lambda self, *given, **named: wrong(partial(real, self))(*given, **named)
    )
    counts = [40, 33]
    x, w_in = normal(73, 520), normal(2, 2, 72, 520, seed=1) / 520**0.5
    want = by_expert(counts, x, w_in.flatten(1, 2).mT)
    kernel, noticed = triton_gluon.product_kernel, 0
    monkeypatch.setattr(tiles, "programs", lambda device: 1)
    for seed in range(2):
        monkeypatch.setattr(triton_gluon, "product_kernel", gluon_machine.Machine(kernel, seed))
        try:
            experts = triton_gluon.Experts(w_in, x.new_empty(0))
            h, _ = triton_gluon.up(x, experts, routes_of(counts, 32), 1, "swiglu", SMALL, True, True)
            noticed += not rel(h, want) < 4e-3
        except AssertionError:
            noticed += 1
    assert noticed


def test_the_setting_chooses_it_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w_in, w_out = (
        torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((64, 64), (2, 2, 64, 64), (2, 64, 64))
    )
    experts = triton_gluon.Experts(w_in, w_out)
    big = tiles.Tiles(128, *[tiles.Tile(256, 64, stages=4)] * 4, dw=TILE, tma=True)
    shapes = {
        "as shipped": big,
        "few rows": replace(big, rows=64),
        "narrow": replace(big, dx=replace(TILE, columns=64)),
    }
    shapes["no room"] = replace(big, down=replace(big.down, stages=5))
    for on in (False, True):
        monkeypatch.setattr(tiles, "GLUON", on)
        for name, sizes in shapes.items():
            for architecture in ("sm_90", "sm_100"):
                monkeypatch.setattr(tiles, "choose", lambda *_, sizes=sizes: sizes)
                monkeypatch.setattr(cards, "card", lambda device, arch=architecture: cards.CARDS[arch])
                wanted = on and name == "as shipped" and architecture == "sm_90"
                found = triton_mlp._choose(x, experts, 4096)[0]
                assert found is (triton_gluon if wanted else triton_mlp.triton_tma), (on, name, architecture)


COMPILE = """
import json, triton
from moe.kernels import ahead, tiles

assert tiles.GLUON  # the setting, which is not of what is compiled
kernels, compile = [], triton.compile
triton.compile = lambda *args, **options: kernels.append(compile(*args, **options)) or kernels[-1]
for launch in ahead.launches("sm_90"):
    c = dict(launch.constants)
    # test_ahead compiles the others.
    if launch.name == "gluon.product" and (c["STORE_ACT"] and c["STORE_RAW"] or not c["K_FIRST"]):
        report = ahead.compile_launch(launch, "sm_90")
        ptx = kernels[-1].asm["ptx"]
        print(json.dumps({**vars(report), "launch": dict(launch.constants), "ptx": ptx}, default=str))
"""


@pytest.mark.slow
def test_it_compiles_to_partitions_that_load_multiply_and_store_apart() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"GPT4_MOE_GLUON": "1"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(k["launch"]["G"], k["launch"]["STORE_ACT"], k["launch"]["K_FIRST"]) for k in found} == {
        (2, True, True),
        (1, False, False),
    }
    for kernel in found:
        ptx, c = kernel["ptx"], kernel["launch"]
        assert not kernel["problem"]
        assert kernel["spills"] == 0
        assert kernel["registers"] <= 65_536 // 384
        assert kernel["shared"] <= 232_448
        # A warp group is 4 warps; those of the producer's group that it does not need sleep.
        assert ".reqntid 384" in ptx
        assert set(re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32\s+(\d+)", ptx)) >= {("inc", "232"), ("dec", "40")}
        # The bytes that the producer names are those of its boxes.
        assert f", {(c['BM'] + c['BN']) * c['BK'] * 2};" in ptx
        assert "cp.async.bulk.tensor.2d.shared" in ptx
        assert "cp.async.bulk.tensor.4d.shared" in ptx
        assert "cp.async.bulk.tensor.5d.global.shared" in ptx
        # Two halves, each BK / 16 products of 64 rows a step.
        assert ptx.count("wgmma.mma_async") == 2 * c["BK"] // 16
        assert f"wgmma.mma_async.sync.aligned.m64n{c['BN']}k16" in ptx


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Turns the variant on; the list grows with every product that it takes."""
    taken, real = [], triton_gluon._product
    monkeypatch.setattr(tiles, "GLUON", True)
    monkeypatch.setattr(triton_gluon, "_product", lambda *given, **named: taken.append(0) or real(*given, **named))
    return taken


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("T", "E", "K", "D", "width"), SHAPES, ids=str)
def test_on_a_gpu_against_float64(
    products: list[Any], T: int, E: int, K: int, D: int, width: int, activation: str, dtype: torch.dtype
) -> None:
    inputs = tensors(T, E, K, D, width, dtype, ops.ACTIVATIONS[activation])
    want = step([t.double() if t.is_floating_point() else t for t in inputs], activation, "reference")
    got = step(inputs, activation, "triton")
    assert len(products) == 3
    for name, a, b in zip(("y", "dx", "dw_in", "dw_out", "dweights"), got, want, strict=True):
        assert rel(a, b) < LIMIT[dtype], name
        assert (a.double() - b).abs().max() / b.abs().max() < 2 * LIMIT[dtype], name


@hopper
def test_on_a_gpu_the_same_bits_twice_also_without_kept_pre_activations(products: list[Any]) -> None:
    inputs = tensors(*LARGE, torch.bfloat16)
    first, second, third = (step(inputs, "swiglu", "triton", recompute=r) for r in (False, False, True))
    assert len(products) == 3 + 3 + 4
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


@hopper
def test_on_a_gpu_as_the_shipped_variant(products: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both add up in float32, so they differ by the rounding of what they store."""
    inputs = tensors(*LARGE, torch.bfloat16)
    got = step(inputs, "swiglu", "triton")
    assert len(products) == 3
    monkeypatch.setattr(tiles, "GLUON", False)
    for a, b in zip(got, step(inputs, "swiglu", "triton"), strict=True):
        assert rel(a, b) < 1e-3
    assert len(products) == 3
