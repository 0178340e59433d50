"""Tuning without a GPU: what it would try, what it keeps, and what becomes of tiles that crash."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.kernels import cards, tile_model, tiles
from moe.kernels.cards import CARDS
from moe.kernels.isolated import Isolated, side_by_side
from moe.kernels.tile_model import Shape
from moe.kernels.tiles import PRODUCTS, Tile, Tiles
from tests.kernels import jobs

tune = pytest.importorskip("moe.kernels.tune")
ROOT = Path(__file__).parent.parent.parent
MIXTRAL = Shape(4096, 14336, 8, 2, 8192)
USABLE = [arch for arch, card in CARDS.items() if not cards.refusal(card)]


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_products_of_a_shape() -> None:
    """Multiplications of the five products are those of the MLP: 2 * R * F * D for each matrix."""
    made = {name: tile_model.product(name, MIXTRAL) for name in PRODUCTS}
    flop = {name: 2 * p.experts * p.M * p.N * p.K for name, p in made.items()}
    one = 2 * 8192 * 2 * 14336 * 4096
    assert flop == {"up": 2 * one, "down": one, "down_backward": one, "dx": 2 * one, "dw": 2 * one}


def test_figures_of_a_tile_by_hand() -> None:
    tile, card = Tile(256, 64, warps=8, stages=3), CARDS["sm_90"]
    assert tile_model.accumulator(tile, 128) == 128  # 128 * 256 numbers on 256 threads
    up = tile_model.product("up", MIXTRAL)
    # 8 experts of 2,048 rows in tiles of 128, and 28,672 columns of 256; one program a multiprocessor.
    assert tile_model.waves(card, up, tile, 128, 1) == 8 * 16 * 112 / 132
    # 64 * (128 + 128) numbers of two bytes are 32 KiB a stage.
    small = Tile(128, 64, warps=8, stages=3)
    assert tile_model.blocks(CARDS["sm_80"], small, 128, 2 * 32_768, tma=False) == 2
    assert tile_model.blocks(CARDS["sm_86"], small, 128, 2 * 32_768, tma=False) == 1


def test_of_tiles_alike_in_all_else_the_larger_takes_fewer_clocks() -> None:
    up, card = tile_model.product("up", MIXTRAL), CARDS["sm_80"]
    wide, narrow = (Tile(n, 64, warps=8, stages=3) for n in (128, 32))
    assert tile_model.clocks(card, up, wide, 128, tma=False) < tile_model.clocks(card, up, narrow, 128, tma=False)


@pytest.mark.parametrize("arch", USABLE)
@pytest.mark.parametrize("tokens", [64, 512, 8192])
def test_few_tiles_are_tried_and_all_of_them_fit(arch: str, tokens: int) -> None:
    card, shape = CARDS[arch], MIXTRAL._replace(tokens=tokens)
    _, best, found = tune.trials(card, shape)
    assert list(found) == list(PRODUCTS)
    for name, others in found.items():
        tried = [getattr(sizes, name) for sizes in others]
        assert 2 < len(tried) <= 14
        assert len(set(tried)) == len(tried)
        assert getattr(best, name) not in tried
        assert all(replace(sizes, **{name: getattr(best, name)}) == best for sizes in others)
        for tile in tried:
            assert tile_model.shared_bytes(card, name, tile, best.rows, best.tma) <= card.shared


def test_what_would_be_tried_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = "tune --d-model 4096 --d-ff 14336 --experts 8 --top-k 2 --tokens 64 8192 --dry-run --arch sm_120"
    monkeypatch.setattr(sys, "argv", words.split())
    tune.main()
    printed = capsys.readouterr().out
    assert "64 tokens: sm_86 few" in printed
    assert "8192 tokens: sm_86 many" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(PRODUCTS)]
    assert sum("shipped" in row for row in rows) == 2 * len(PRODUCTS)
    shared = [int(row[-3].replace(",", "")) for row in rows]
    assert max(shared) <= 101_376
    assert 2 * 5 * 4 < len(rows) <= 2 * 5 * 15


@pytest.mark.parametrize(
    ("words", "said"), [("", "there is none here"), ("--arch sm_90", "--arch needs --dry-run")], ids=["no GPU", "arch"]
)
def test_without_a_gpu_it_says_what_needs_none(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", f"tune --d-model 64 --d-ff 64 --experts 2 --top-k 1 {words}".split())
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert said in f"{stopped.value}{capsys.readouterr().err}"


# ------------------------------------------------------------------------------------------------------------ timing


def test_the_fastest_of_each_product_is_kept(capsys: Any) -> None:
    _, best, found = tune.trials(CARDS["sm_80"], MIXTRAL)
    up, dx = found["up"][3].up, found["dx"][0].dx

    def time_one(product: str, sizes: Tiles) -> float:
        if product == "down" and sizes.down == found["down"][0].down:
            raise RuntimeError("an illegal memory access")
        if product == "up" and sizes.up == up:
            return 5.0
        return 9.9 if product == "dx" and sizes.dx == dx else 10.0  # 1% is no gain

    in_order = [(name, sizes) for name in PRODUCTS for sizes in found[name]]
    assert tune.fastest(best, in_order, time_one, time.monotonic() + 60) == replace(best, up=up)
    assert "an illegal memory access" in capsys.readouterr().out
    assert tune.fastest(best, in_order, time_one, time.monotonic() - 1) == best


def test_tuning_writes_what_it_found_after_every_size(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With a card that is not here, compilation and timing that are made up, and a size that fails."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("GPT4_MOE_TILES", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cards, "card", lambda device: CARDS["sm_80"])
    monkeypatch.setattr(tune, "worth_timing", lambda arch, shape, found, jobs, until: found[::2])
    monkeypatch.setattr(tune, "Isolated", MadeUp)
    tiles.tuned.cache_clear()
    words = "tune --d-model 512 --d-ff 512 --experts 8 --top-k 2 --tokens 16 8192 3"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(KeyboardInterrupt):
        tune.main()
    table = tiles.load(path, CARDS["sm_80"])
    assert list(table) == ["sm_80 few", "sm_80 many"]
    assert table["sm_80 many"].up != tiles.TABLE["sm_80"]["many"].up
    assert table["sm_80 many"].down == tiles.TABLE["sm_80"]["many"].down
    tiles.tuned.cache_clear()
    assert "tiles compile without spills" in capsys.readouterr().out


class MadeUp:
    """Of Isolated: the second tile of `up` is fast, all others are equal, three tokens are too many."""

    def __init__(self, prepare: Any, arguments: tuple[Shape, str], seconds: float) -> None:
        assert prepare is tune.timed
        self.tokens, self.seen = arguments[0].tokens, 0

    def run(self, product: str, sizes: Tiles) -> float:
        if self.tokens == 3:
            raise KeyboardInterrupt
        self.seen += product == "up"
        return 1.0 if product == "up" and self.seen == 2 else 2.0

    def close(self) -> None: ...


AHEAD = """
from moe.kernels import cards, tune
from moe.kernels.tile_model import Shape

shape = Shape(1024, 2048, 8, 2, 2048)
_, best, found = tune.trials(cards.CARDS["sm_90"], shape)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the stand-in for CUDA's driver needs a C compiler")
def test_a_launch_finds_the_kernels_that_were_compiled_ahead(tmp_path: Path) -> None:
    """In Triton's cache, under the key that the JIT itself gives them."""
    products = ("up", "down_backward", "dw")
    compiles = f"{AHEAD}run = tune.compiler('sm_90', shape)\nassert [run(p, best) for p in {products}] == [''] * 3"
    launches = f"from benchmarks.standin.driver import install\nstandin = install('sm_90')\n{AHEAD}"
    launches += (
        f"call = tune.prepare(shape, 'meta')\nassert all(standin.count(call(p, best)).launches for p in {products})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    for script in (compiles, launches):
        done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kernels = [path.name for path in tmp_path.glob("*/*.cubin")]
        for name in ("up_kernel", "down_backward_kernel", "weight_gradient_kernel"):
            assert kernels.count(f"{name}.cubin") == 1, kernels


# ----------------------------------------------------------------------------------- processes that may be brought down


def test_a_job_that_crashes_costs_only_itself() -> None:
    isolated = Isolated(jobs.prepare, ("a",), seconds=1)
    try:
        text, process = isolated.run("one")
        assert (text, process) == ("a one", isolated.run("one")[1])
        with pytest.raises(RuntimeError, match="exit code -6"):
            isolated.run("crash")
        text, after = isolated.run("two")
        assert text == "a two"
        assert after != process
        with pytest.raises(RuntimeError, match="ValueError: this one does not run"):
            isolated.run("raise")
        assert isolated.run("three")[0] == "a three"
        with pytest.raises(RuntimeError, match="no answer after 1 s"):
            isolated.run("hang")
        assert isolated.run("four")[0] == "a four"
    finally:
        isolated.close()


def test_jobs_side_by_side_come_back_in_their_order() -> None:
    whats = ["one", "crash", "two", "raise", "three", "four"]
    found = list(side_by_side(jobs.prepare, ("b",), [(what,) for what in whats], n=2))
    assert [r[0] for r in found if not isinstance(r, RuntimeError)] == ["b one", "b two", "b three", "b four"]
    assert [what for what, r in zip(whats, found, strict=True) if isinstance(r, RuntimeError)] == ["crash", "raise"]
    (late,) = side_by_side(jobs.prepare, ("b",), [("one",)], n=1, until=time.monotonic() - 1)
    assert isinstance(late, RuntimeError)
    assert "no time was left" in str(late)
