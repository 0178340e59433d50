"""Every kernel and shipped tile configuration, compiled for GPUs this machine need not have, within the limits.

In processes of their own, without the interpreter that the other tests choose.
"""

import importlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe.kernels import sass, tile_model

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "moe.kernels.ahead", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950")


@pytest.mark.parametrize(
    ("arch", "flags"),
    [("sm_90", ["--once"]), *(pytest.param(arch, [], marks=pytest.mark.slow) for arch in ARCHS)],
    ids=str,
)
def test_everything_compiles_within_the_limits(arch: str, flags: list[str]) -> None:
    done = run("--arch", arch, "--jobs", "1", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all within the limits")
    rows = [line for line in done.stdout.splitlines() if line.startswith(("pointer.", "tma."))]
    for product in ("up", "down", "down_backward", "weight_gradient"):
        assert any(f"pointer.{product} " in row for row in rows)
        # TMA is of Hopper and of Blackwell's large cards; its products are the ones of training there.
        assert any(f"tma.{product} " in row for row in rows) == (arch in ("sm_90", "sm_100"))
    for row in rows:
        # name, tile, warps, stages, registers, spills, in the loop, shared memory, and that by arithmetic
        shared, about = (int(word.replace(",", "")) for word in row.split()[7:9])
        margin = tile_model.MARGIN * about + tile_model.SCRATCH
        assert shared <= about + margin, row
        assert shared >= about - margin or arch == "gfx950", row  # Triton 3.6 keeps fewer steps there
    # Two blocks of four warps, the tile of many rows, an A100's multiprocessor: see docs/kernel.md.
    large = [row.split() for row in rows if row.split()[1:3] == ["128x128x32", "4"] and arch == "sm_80"]
    assert all(row[9] == "2" for row in large), large
    assert len(large) >= 5 * (arch == "sm_80")


def test_every_target_is_compiled_by_a_test() -> None:
    from moe.kernels import ahead

    assert set(ARCHS) == set(ahead.TARGETS)


@pytest.mark.slow
def test_processes_side_by_side_print_the_same_table() -> None:
    alone, beside = (run("--arch", "sm_90", "sm_80", "--only", "rows.", "--jobs", n) for n in "12")
    assert beside.returncode == 0, beside.stdout + beside.stderr
    tables = [[line for line in done.stdout.splitlines() if " kernels in " not in line] for done in (alone, beside)]
    assert tables[0] == tables[1]
    assert sum(line.startswith("sm_") for line in tables[1]) == 2


def test_what_a_product_must_not_do_in_its_main_loop() -> None:
    ahead, pointer = (
        importlib.import_module("moe.kernels.ahead"),
        pytest.importorskip("moe.kernels.experts.triton_pointer"),
    )
    constants = (("BM", 128), ("BN", 128), ("BK", 32), ("GATHER_A", False))
    launch = ahead.Launch(pointer.down_kernel, (("a", "*bf16"),), constants, (), 4, 4)
    loop = sass.Loop(instructions=160, products=64, loads=Counter({16: 8}))
    report = ahead.Report(launch, registers=255, spills=64, shared=49_152, mma=64, loop=loop)
    assert ahead._problem(report, "sm_80") == ""
    assert report.blocks("sm_80") == 2
    # 65,536 registers and 167,936 B for both.
    assert replace(report, registers=257).blocks("sm_80") == 1
    assert [replace(report, shared=n).blocks("sm_80") for n in (82_944, 82_945)] == [2, 1]

    def problem(**change: Any) -> str:
        return ahead._problem(replace(report, **change), "sm_80")

    assert problem(spills=65) == "65 spills"
    assert problem(loop=replace(loop, spills=1)) == "1 spills in the main loop"
    assert problem(loop=replace(loop, loads=Counter({16: 4, 2: 64}))) == "the main loop reads 2 bytes at a time"
    assert problem(loop=replace(loop, loads=Counter({16: 4, 4: 1}))) == "the main loop reads 4 bytes at a time"
    # An index by which rows are gathered.
    gathers = replace(launch, constants=(*constants[:3], ("GATHER_A", True)))
    assert problem(launch=gathers, loop=replace(loop, loads=Counter({16: 4, 4: 1}))) == ""
    assert problem(loop=sass.Loop()) == "no main loop found"
    # Numbers of 32 bits that lie across the summed dimension, where tensor cores read shared memory.
    fours = replace(report, loop=replace(loop, loads=Counter({16: 4, 4: 16})))
    for arch, precision, k_first, allowed in (
        ("sm_90", "tf32", False, True), ("sm_90", "tf32", True, False), ("sm_80", "tf32", False, False),
        ("sm_90", "tf32x3", False, False),
    ):  # fmt: skip
        found = replace(launch, constants=(*constants, ("PRECISION", precision), ("K_FIRST", k_first)))
        found = replace(found, signature=(("a", "*fp32"),))
        assert (ahead._problem(replace(fours, launch=found), arch) == "") == allowed


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moe.kernels.ahead"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
