"""Which GPU gets which tiles, by what it has; which gets the reference; whose tuned file is read."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moe.kernels import cards, ops, tile_model, tiles
from moe.kernels.arguments import float32_precision
from moe.kernels.cards import CARDS, Card
from moe.kernels.experts import op
from moe.kernels.gate import op as gate
from moe.kernels.loss import op as loss
from moe.kernels.tiles import PRODUCTS

H100 = Card("sm_90", 232_448, 132, "NVIDIA H100 80GB HBM3")
USABLE = {arch: card for arch, card in CARDS.items() if not cards.refusal(card)}


@pytest.mark.parametrize(
    ("arch", "shared", "with_tma", "without"),
    [
        ("sm_80", 166_912, "sm_80", "sm_80"),
        ("sm_86", 101_376, "sm_86", "sm_86"),
        ("sm_87", 166_912, "sm_80", "sm_80"),  # Orin
        ("sm_89", 101_376, "sm_86", "sm_86"),
        ("sm_90", 232_448, "sm_90 tma", "sm_90"),
        ("sm_100", 232_448, "sm_100 tma", "sm_90"),
        ("sm_103", 232_448, "sm_100 tma", "sm_90"),  # B300
        ("sm_120", 101_376, "sm_86", "sm_86"),
        ("sm_121", 101_376, "sm_86", "sm_86"),  # DGX Spark
        ("gfx90a", 65_536, "gfx942", "gfx942"),
        ("gfx942", 65_536, "gfx942", "gfx942"),
        ("gfx950", 163_840, "gfx942", "gfx942"),
    ],
)
def test_the_row_of_tiles_is_that_of_what_a_card_has(arch: str, shared: int, with_tma: str, without: str) -> None:
    card = Card(arch, shared, 100, "some card")
    assert arch not in CARDS or CARDS[arch].shared == shared
    assert tiles.shipped(card, "many", tma=True)[0] == f"{with_tma} many"
    assert tiles.shipped(card, "many", tma=False)[0] == f"{without} many"
    for size in ("few", "some"):
        assert tiles.shipped(card, size, tma=True)[0] == f"{without} {size}"


@pytest.mark.parametrize("arch", USABLE)
def test_every_tile_has_room_in_its_card(arch: str) -> None:
    """By arithmetic; that the arithmetic is right, test_ahead.py sees with the compiler."""
    card = CARDS[arch]
    choices = [(tiles.shipped(card, size, tma)[1], 2) for size in tiles.FLOAT32 for tma in (True, False)]
    for sizes, itemsize in (*choices, *((sizes, 4) for sizes in tiles.FLOAT32.values())):
        for name in PRODUCTS:
            tile = getattr(sizes, name)
            assert tile_model.shared_bytes(card, name, tile, sizes.rows, sizes.tma, itemsize) <= card.shared, name


# ---------------------------------------------------------------------------------------------- GPUs that are not here


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    """A machine whose GPUs are what is put into the list, as torch would describe them."""
    found: list[SimpleNamespace] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "HAS_TRITON", True)
    cached = (cards._card, cards._why_not, cards._why_not_precision, tiles.tuned)
    for function in cached:
        function.cache_clear()
    yield found
    for function in cached:
        function.cache_clear()


def gpu(name: str, major: int, minor: int, **has: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=40, **has)


def choice(device: str, dtype: torch.dtype, impl: str | None = None) -> str:
    """The implementation of the expert MLP for a tensor on a device."""
    with FakeTensorMode():
        x, w_in = torch.empty(4, 16, dtype=dtype, device=device), torch.empty(2, 2, 16, 16, dtype=dtype, device=device)
    return op._choose(impl, x, w_in, "swiglu", False)


def test_the_card_is_that_of_the_tensor_not_of_the_current_device(machine: list[SimpleNamespace]) -> None:
    machine += [
        gpu("Tesla T4", 7, 5, shared_memory_per_block_optin=65_536),
        gpu("NVIDIA L4", 8, 9, shared_memory_per_block_optin=101_376),
    ]
    assert cards.card(torch.device("cuda", 1)) == Card("sm_89", 101_376, 40, "NVIDIA L4")
    assert cards.card(torch.device("cuda")).name == "Tesla T4"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choice("cuda:1", dtype) == "triton"
        assert choice("cuda:0", dtype) == "reference"
        with pytest.raises(ValueError, match=r'impl = "triton": it needs compute capability 8\.0 .*Tesla T4 has 7\.5'):
            choice("cuda:0", dtype, "triton")


def test_the_other_ops_ask_the_card_too(machine: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    machine.append(gpu("Tesla V100", 7, 0, shared_memory_per_block_optin=98_304))
    monkeypatch.setattr(gate.reference, "topk_gate", lambda *_: "reference")
    monkeypatch.setattr(loss, "_linear_cross_entropy", lambda *arguments: arguments[-1:])
    with FakeTensorMode():
        x, targets = torch.empty(4, 8, device="cuda:0"), torch.zeros(4, dtype=torch.int64, device="cuda:0")
    assert ops.topk_gate(x, 2) == "reference"
    assert ops.linear_cross_entropy(x, x, targets) == "torch"
    for call in (lambda: ops.topk_gate(x, 2, impl="triton"), lambda: ops.linear_cross_entropy(x, x, targets, "triton")):
        with pytest.raises(ValueError, match=r'impl = "triton": it needs compute capability 8\.0 .*V100 has 7\.0'):
            call()


def test_a_torch_that_does_not_tell_the_shared_memory(machine: list[SimpleNamespace]) -> None:
    machine.append(gpu("NVIDIA A100", 8, 0))
    assert cards.card(torch.device("cuda", 0)).shared == 166_912


@pytest.mark.parametrize(("arch", "shared"), [("gfx942:sramecc+:xnack-", 65_536), ("gfx950:sramecc+", 163_840)])
def test_cards_of_amd(arch: str, shared: int, machine: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    machine += [gpu("MI", 9, 4, gcnArchName=arch), gpu("Radeon", 11, 0, gcnArchName="gfx1100")]
    assert cards.card(torch.device("cuda", 0)) == Card(arch.split(":")[0], shared, 40, "MI")
    assert choice("cuda:0", torch.bfloat16) == "triton"
    assert choice("cuda:1", torch.bfloat16) == "reference"
    with pytest.raises(ValueError, match=r"checked for gfx90a, gfx942, gfx950, not for gfx1100 \(Radeon\)"):
        choice("cuda:1", torch.bfloat16, "triton")


@pytest.mark.parametrize(
    ("arch", "there"), [("gfx90a", ["ieee"]), ("gfx942", ["ieee", "tf32"]), ("gfx950", ["ieee"]), ("sm_80", None)]
)
def test_float32_is_multiplied_as_the_card_can(
    arch: str, there: list[str] | None, machine: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is what the compiler takes. As torch is set, where it can; what a call asks for, or an error."""
    monkeypatch.setattr(torch.version, "hip", "7.0" if there else None)
    machine.append(gpu("GPU", 8, 0, gcnArchName=arch))
    monkeypatch.setattr(op, "_expert_mlp", lambda *arguments: arguments[-1:])

    def call(dtype: torch.dtype, precision: str) -> Any:
        with FakeTensorMode():
            x, w_in, w_out, weights = (
                torch.empty(s, dtype=dtype, device="cuda:0") for s in ((4, 8), (2, 2, 8, 8), (2, 8, 8), (4, 1))
            )
            ids = torch.zeros(4, 1, dtype=torch.int64, device="cuda:0")
            return ops.expert_mlp(x, w_in, w_out, weights, ids, impl="triton", precision=precision)

    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda:0")
    there = there or list(op.PRECISIONS)
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        assert float32_precision(None, x) == ("tf32" if "tf32" in there else "ieee")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for precision in op.PRECISIONS:
        if precision in there:
            assert call(torch.float32, precision) == precision
            continue
        with pytest.raises(ValueError, match=rf"precision = '{precision}'.*GPU \({arch}\) has {', '.join(there)}"):
            call(torch.float32, precision)
        assert call(torch.bfloat16, precision) == precision  # of which it says nothing


def test_a_device_that_is_not_there_may_be_traced_for(machine: list[SimpleNamespace]) -> None:
    assert choice("cuda:0", torch.bfloat16) == "triton"
    machine.append(gpu("Tesla T4", 7, 5))
    assert choice("cuda:3", torch.bfloat16) == "triton"


def test_compiling_takes_the_answer_as_a_constant() -> None:
    """Devices and their properties are not traced; nor is there a warning of a cache."""

    @torch.compile(fullgraph=True, backend="eager")
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if cards.why_not(x.device) is None else x - 1

    assert f(torch.zeros(2)).tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------------- tuned tiles


def test_tuned_tiles_are_those_of_the_card_they_were_measured_on(
    tmp_path: Any, machine: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPT4_MOE_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine += [
        gpu("NVIDIA L4", 8, 9, shared_memory_per_block_optin=101_376),
        gpu("NVIDIA A100", 8, 0, shared_memory_per_block_optin=166_912),
    ]

    def chosen(index: int) -> tiles.Tiles:
        return tiles.choose(torch.device("cuda", index), torch.bfloat16, 8192, 8, tma=False)

    assert chosen(1) == tiles.TABLE["sm_80"]["many"]
    second = cards.card(torch.device("cuda", 1))
    mine = tiles.TABLE["sm_80"]["few"]
    tiles.save(tiles.tuned_path(second), second, {"sm_80 many": mine})
    assert [p.name for p in (tmp_path / "gpt4-moe").iterdir()] == ["tiles-NVIDIA-A100.json"]
    tiles.tuned.cache_clear()  # as in a new process
    assert chosen(1) == mine
    assert chosen(0) == tiles.TABLE["sm_86"]["many"]


def test_a_tuned_file_that_does_not_fit_is_refused(tmp_path: Any) -> None:
    path, table = tmp_path / "cache" / "tiles.json", {"sm_90 tma many": tiles.TABLE["sm_90 tma"]["many"]}
    tiles.save(path, H100, table)
    assert tiles.load(path, H100) == tiles.load(path, H100._replace(name="NVIDIA H200", multiprocessors=100)) == table
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]
    for other in (CARDS["sm_120"], CARDS["sm_100"], H100._replace(shared=101_376)):
        with pytest.raises(ValueError, match=rf"H100 .*232,448 B.*this is .*{other.shared:,} B.*GPT4_MOE_TILES"):
            tiles.load(path, other)
    for damaged in ("", "{}", '{"sm_80 few": {"rows": 16}}', path.read_text()[:-40], json.dumps([1])):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"tiles.json: not a file of tile sizes .*delete it"):
            tiles.load(path, H100)


def test_a_file_is_written_complete_or_not_at_all(tmp_path: Any) -> None:
    path = tmp_path / "tiles.json"
    tiles.save(path, H100, {"sm_90 few": tiles.TABLE["sm_90"]["few"]})
    before = path.read_text()
    broken = tiles.replace(tiles.TABLE["sm_90"]["few"], rows=object())
    with pytest.raises(TypeError):
        tiles.save(path, H100, {"sm_90 few": broken})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
