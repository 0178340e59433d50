"""Attention over a paged cache: against torch's own attention in float64, on bits, and what is refused."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.kernels import cards, ops, tiles
from moe.kernels.attention import op
from moe.kernels.quantization import LARGEST
from tests.conftest import rel
from tests.kernels.calls import compiled, faked, on_meta

IMPLS = ["reference", "triton"]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
Request = tuple[int, int]  # rows, positions
MIXED: list[Request] = [(1, 7), (3, 70), (1, 1), (2, 33), (0, 4)]


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    pytest.importorskip("triton")


class Case:
    """Requests with random queries, keys and values, in blocks in a random order; all else in the cache is NaN."""

    def __init__(self, requests: list[Request], H: int, N: int, C: int, block_size: int, seed: int = 0) -> None:
        self.requests, self.block_size, self.H = requests, block_size, H
        draw = random.Random(seed)
        g = torch.Generator().manual_seed(seed)
        used = [-(-length // block_size) for _, length in requests]
        n_blocks = sum(used) + 2
        free = draw.sample(range(n_blocks), n_blocks)
        self.q_RHC, self.k, self.v, tables = [], [], [], []
        self.k_PNC, self.v_PNC = (torch.full((n_blocks * block_size, N, C), torch.nan) for _ in "kv")
        for (rows, length), count in zip(requests, used, strict=True):
            blocks = [free.pop() for _ in range(count)]
            q, k, v = (torch.randn(n, h, C, generator=g) for n, h in ((rows, H), (length, N), (length, N)))
            slots = torch.tensor([b * block_size + i for b in blocks for i in range(block_size)])[:length]
            self.k_PNC[slots], self.v_PNC[slots] = k, v
            self.q_RHC.append(q)
            self.k.append(k)
            self.v.append(v)
            # Behind a request's last block there may be anything.
            tables.append(blocks + [10**6] * (max(used) + 1 - count))
        self.blocks = torch.tensor(tables, dtype=torch.int32)

    def call(self, chosen: list[int] | None = None, impl: str = "triton", **changes: Any) -> Tensor:
        """The op on the chosen requests, in that order."""
        chosen = list(range(len(self.requests))) if chosen is None else chosen
        dtype, kept = changes.pop("dtype", torch.float32), changes.pop("kept", None)
        rows, lengths = zip(*(self.requests[i] for i in chosen), strict=True)
        k, v = self.k_PNC, self.v_PNC
        if kept is None:
            k, v = k.to(dtype), v.to(dtype)
        else:
            (k, k_scale), (v, v_scale) = ops.quantize(k, kept), ops.quantize(v, kept)
            changes |= {"k_scale_PN": k_scale.to(DEVICE), "v_scale_PN": v_scale.to(DEVICE)}
        starts = torch.tensor([0, *rows]).cumsum(0).int()
        tables = (self.blocks[chosen], starts, torch.tensor(lengths, dtype=torch.int32))
        given = (torch.cat([self.q_RHC[i] for i in chosen]).to(dtype), k, v, *tables)
        q, k, v, blocks, starts, ends = (t.to(DEVICE) for t in given)
        limits = {"max_query_len": max(rows), "max_seq_len": max(lengths), **changes}
        return ops.paged_attention(q, k, v, blocks, starts, ends, self.block_size, **limits, impl=impl).cpu()

    def wanted(self, kept: torch.dtype | None = None) -> Tensor:
        """Torch's own attention in float64, of the keys and values as they are kept."""
        out = []
        for q, k, v in zip(self.q_RHC, self.k, self.v, strict=True):
            if kept is not None:
                k, v = (data.double() * scale.unsqueeze(-1) for data, scale in (ops.quantize(x, kept) for x in (k, v)))
            S, A = len(q), len(k)
            mask = torch.ones(S, A, dtype=torch.bool).tril(A - S)
            q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
            out.append(F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(0, 1))
        return torch.cat(out)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("H", "N", "C"), [(21, 1, 24), (3, 3, 40)])
def test_against_torch(H: int, N: int, C: int, impl: str) -> None:
    case = Case(MIXED, H, N, C, 5)
    assert rel(case.call(impl=impl), case.wanted()) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kept", [None, *LARGEST], ids=str)
def test_dtypes(dtype: torch.dtype, kept: torch.dtype | None, impl: str) -> None:
    case = Case(MIXED, 6, 2, 24, 16)
    assert rel(case.call(impl=impl, dtype=dtype, kept=kept), case.wanted(kept)) < TOLERANCE[dtype]


def test_bfloat16_and_float64_in_plain_torch() -> None:
    case = Case(MIXED, 6, 2, 24, 16)
    assert rel(case.call(impl="reference", dtype=torch.bfloat16), case.wanted()) < TOLERANCE[torch.bfloat16]
    assert rel(case.call(impl="reference", dtype=torch.float64), case.wanted()) < 1e-12


@given(
    requests=st.lists(
        st.integers(0, 4).flatmap(lambda n: st.tuples(st.just(n), st.integers(max(n, 1), 80))), min_size=1
    ),
    N=st.integers(1, 3),
    shared=st.integers(1, 10),
    C=st.integers(1, 40),
    block_size=st.integers(1, 64),
    seed=st.integers(0, 100),
)
@settings(max_examples=5)
def test_any_shape(requests: list[Request], N: int, shared: int, C: int, block_size: int, seed: int) -> None:
    if sum(rows for rows, _ in requests) == 0:
        requests = [*requests, (1, 1)]
    case = Case(requests, N * shared, N, C, block_size, seed)
    assert rel(case.call(), case.wanted()) < 1e-6


def test_no_rows() -> None:
    assert Case([(0, 3), (0, 20)], 4, 2, 16, 4).call().shape == (0, 4, 16)


# ------------------------------------------------------------------------------------------------------------- on bits


def differences(case: Case, dtype: torch.dtype, kept: torch.dtype | None) -> list[str]:
    """Where a row's bits depend on what is computed with it."""
    whole, found = case.call(dtype=dtype, kept=kept), []
    starts = torch.tensor([0, *(n for n, _ in case.requests)]).cumsum(0).tolist()
    for i, (low, high) in enumerate(pairwise(starts)):
        if low < high and not torch.equal(case.call([i], dtype=dtype, kept=kept), whole[low:high]):
            found.append(f"request {i} alone")
        # The limits are upper bounds: of a graph that was captured they are larger than all there is.
        if i == 1 and not torch.equal(
            case.call([i], dtype=dtype, kept=kept, max_query_len=9, max_seq_len=333), whole[low:high]
        ):
            found.append(f"request {i} under larger limits")
    return found


@pytest.mark.usefixtures("_even_products")
@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, None), (torch.float16, torch.int8)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, kept: torch.dtype | None) -> None:
    assert differences(Case(MIXED, 6, 2, 24, 16), dtype, kept) == []


@pytest.mark.usefixtures("_even_products")
def test_a_row_has_the_same_bits_alone_and_among_drafts() -> None:
    """Four rows of a request are the rows that four steps of one would have had."""
    case = Case([(4, 66)], 12, 1, 24, 8)
    rows = case.call()
    for s in range(4):
        one = Case([(4, 66)], 12, 1, 24, 8)
        one.requests, one.q_RHC = [(1, 63 + s)], [case.q_RHC[0][s : s + 1]]
        assert torch.equal(one.call(), rows[s : s + 1])


def test_a_row_has_the_same_bits_wherever_its_blocks_are() -> None:
    case = Case(MIXED, 6, 2, 24, 16)
    for block_size in (1, 64):
        other = Case(MIXED, 6, 2, 24, block_size, seed=1)
        for i, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
            other.q_RHC[i] = case.q_RHC[i]
            slots = [b * block_size + j for b in other.blocks[i].tolist() for j in range(block_size)][: len(k)]
            other.k_PNC[slots], other.v_PNC[slots] = k, v
        assert torch.equal(other.call(), case.call())


@pytest.mark.usefixtures("_even_products")
def test_splits_by_the_size_of_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serving elsewhere does, to fill the device: the test above must see it."""
    real, case = tiles.choose_paged, Case(MIXED, 6, 2, 24, 16)
    whole = [True]

    def variant(*given: Any) -> tiles.PagedTile:
        tile = real(*given)
        return tile if whole[0] else replace(tile, split=16)

    call = case.call

    def counted(chosen: list[int] | None = None, **changes: Any) -> Tensor:
        whole[0] = chosen is None
        return call(chosen, **changes)

    monkeypatch.setattr(tiles, "choose_paged", variant)
    monkeypatch.setattr(case, "call", counted)
    assert differences(case, torch.float32, None)


def test_twice_the_same_bits() -> None:
    case = Case(MIXED, 6, 2, 24, 16)
    assert torch.equal(case.call(), case.call())


@pytest.mark.parametrize(("shared", "rows", "split"), [(1, 16, 512), (8, 16, 512), (24, 32, 512), (168, 64, 2048)])
def test_the_shipped_tiles(shared: int, rows: int, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(cards, "card", lambda device: cards.CARDS["sm_90"])
    tile = tiles.choose_paged(torch.device("cuda"), torch.bfloat16, torch.bfloat16, shared, 128)
    assert (tile.rows, tile.split) == (rows, split)
    assert (
        8 * shared <= tile.split * 2 * 2 / 5
    )  # the parts of a split, a number of each head, against its keys and values


# --------------------------------------------------------------------------------------------------------- as torch op


def tensors() -> dict[str, Any]:
    case = Case([(2, 9), (1, 5)], 4, 2, 16, 4)
    return {
        "q_RHC": torch.cat(case.q_RHC),
        "k_PNC": case.k_PNC.nan_to_num(),
        "v_PNC": case.v_PNC.nan_to_num(),
        "blocks_QB": case.blocks,
        "starts": torch.tensor([0, 2, 3], dtype=torch.int32),
        "lengths_Q": torch.tensor([9, 5], dtype=torch.int32),
    }


def attention(**changes: Any) -> Tensor:
    return ops.paged_attention(**{**tensors(), "block_size": 4, "max_query_len": 2, "max_seq_len": 9, **changes})


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str) -> None:
    scales: dict[str, Any] = {"k_scale": None, "v_scale": None}
    torch.library.opcheck(op._paged_attention, (*tensors().values(), 4, 2, 9, *scales.values(), impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_and_without_values(impl: str) -> None:
    def call(*given: Tensor) -> Tensor:
        return ops.paged_attention(*given, 4, max_query_len=2, max_seq_len=9, impl=impl)  # type: ignore[misc]

    given = tuple(tensors().values())
    assert torch.equal(compiled(call, *given), attention(impl=impl))
    assert faked(call, *given).shape == (3, 4, 16)
    if impl == "reference":
        assert on_meta(call, *given).shape == (3, 4, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "flash"}, 'impl = \'flash\': must be "reference" or "triton"'),
        ({"q_RHC": torch.zeros(3, 5, 16)}, "5 query heads cannot share 2 key heads"),
        ({"q_RHC": torch.zeros(3, 4, 8)}, r"wants q \[R, H, C\] and k, v"),
        ({"q_RHC": torch.zeros(3, 4, 16).half()}, "k and v must both be of the dtype of q"),
        ({"k_scale_PN": torch.ones(32, 2)}, "k_scale is given, and keys and values are torch.float32"),
        ({"starts": torch.tensor([0, 2, 3])}, "must be int32"),
        (
            {"starts": torch.tensor([0, 2, 4], dtype=torch.int32)},
            r"starts = \[0, 2, 4\]: must rise from 0 to the 3 rows",
        ),
        (
            {"lengths_Q": torch.tensor([9, 0], dtype=torch.int32)},
            "request 1 has 0 positions: must be at least its 1 rows",
        ),
        ({"max_seq_len": 8}, "request 0 has 2 rows and 9 positions, more than max_query_len = 2 or max_seq_len = 8"),
        ({"block_size": 5}, "block_size = 5: must divide the"),
        (
            {"blocks_QB": torch.full((2, 4), 99, dtype=torch.int32)},
            r"blocks of request 0 = \[99, 99, 99\]: the cache has",
        ),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**changes)


def test_eight_bits_need_scales_of_their_shape() -> None:
    narrow = {name: tensors()[name].to(torch.int8) for name in ("k_PNC", "v_PNC")}
    with pytest.raises(ValueError, match=r"k_scale is missing, and keys and values are torch.int8"):
        attention(**narrow)
    scale = torch.ones(len(narrow["k_PNC"]), 1)
    with pytest.raises(ValueError, match=r"k_scale must be float32 \[\d+, 2\]; got torch.float32 \[\d+, 1\]: quantize"):
        attention(**narrow, k_scale_PN=scale, v_scale_PN=scale)
