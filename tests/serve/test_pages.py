"""Keys and values in blocks: attention over them against float64, whoever attends with whom, and kept in what."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.config import AttentionConfig, Config
from moe.errors import ConfigError
from moe.serve import pages as module
from moe.serve.pages import KV_CACHE_DTYPES, Pages, Pass, Segment
from tests.conftest import rel, tiny_config

SIZE = 4


def config(n_kv_heads: int) -> Config:
    attention = AttentionConfig(n_heads=4, n_kv_heads=n_kv_heads, head_dim=10)
    return dataclasses.replace(tiny_config(), attention=attention, n_layers=1, max_seq_len=80)


def attended(
    pages: Pages, requests: list[tuple[int, int]], seed: int, all_paged: bool = False
) -> tuple[Tensor, Tensor]:
    """Of a pass over requests (positions before it, tokens in it), in blocks in disorder: what attention gave, and
    what float64 gives."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, kv, width = 4, pages.layers[0][0].shape[1], 10
    free = [*range(pages.n_blocks)]
    rng.shuffle(free)
    segments, rows, want = [], [], []
    for start, n in requests:
        end = start + n
        blocks = [free.pop() for _ in range(-(-end // SIZE))]
        q, k, v = (torch.randn(end, h, width, generator=g, dtype=torch.float64) for h in (heads, kv, kv))
        slots = torch.tensor([blocks[p // SIZE] * SIZE + p % SIZE for p in range(end)])
        dtype = pages.rope[0].dtype
        if start:
            pages.store(0, slots[:start], k[:start].to(dtype), v[:start].to(dtype))
        segments.append(Segment([0] * n, start, blocks))
        rows.append(tuple(x[start:].to(dtype) for x in (q, k, v)))
        shared = heads // kv
        scores = torch.einsum("snmc,anc->nmsa", q[start:].unflatten(1, (kv, shared)), k) / width**0.5
        hidden = torch.ones(n, end, dtype=torch.bool).tril(start).logical_not()
        want.append(torch.einsum("nmsa,anc->snmc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1, 2))
    one = Pass(pages, segments, all_paged)
    q, k, v = (torch.cat(parts).unsqueeze(0) for parts in zip(*rows, strict=True))
    return one.attends(len(q[0]))[0](q, k, v)[0], torch.cat(want)


requests = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.just(3), st.integers(1, 30))), min_size=1, max_size=8
)


@given(requests=requests, n_kv_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99), how=st.integers(0, 2))
def test_attention_is_that_of_float64(requests: list[tuple[int, int]], n_kv_heads: int, seed: int, how: int) -> None:
    pages = Pages(config(n_kv_heads), 200, SIZE, torch.float64, "cpu")
    pages.paged = how > 0  # as on CUDA, where the kernel has the requests of few tokens, or all
    got, want = attended(pages, requests, seed, all_paged=how == 2)
    assert rel(got, want) < 1e-13


@pytest.mark.parametrize("limits", [(16, 1024), (16, 24), (0, 0)])
def test_who_attends_together_does_not_matter(limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in zip(("TOGETHER_TOKENS", "TOGETHER_POSITIONS"), limits, strict=True):
        monkeypatch.setattr(module, name, limit)
    pages = Pages(config(1), 200, SIZE, torch.float64, "cpu")
    got, want = attended(pages, [(20, 1), (23, 1), (30, 1), (9, 2), (11, 2), (0, 25), (6, 20), (0, 1)], 0)
    assert rel(got, want) < 1e-13


def test_blocks_that_follow_each_other_are_read_where_they_are() -> None:
    pages = Pages(config(1), 8, SIZE, torch.float64, "cpu")
    k, _ = pages.load(0, slice(2, 5), torch.float64)
    assert k.data_ptr() == pages.layers[0][0][2 * SIZE :].data_ptr()
    assert k.shape[0] == 3 * SIZE


# What is lost: half a unit of the last of 8 and 11 bits; of int8, uniform errors of largest / 127; of e4m3, of 4 bits.
LOST = {"float32": 1e-6, "bfloat16": 3e-3, "float16": 4e-4, "int8": 8e-3, "fp8": 4e-2}


@pytest.mark.parametrize("kept", LOST)
@pytest.mark.parametrize("paged", [False, True])
def test_attention_over_rounded_keys_and_values(kept: str, paged: bool) -> None:
    pages = Pages(config(2), 200, SIZE, torch.float32, "cpu", kept)
    pages.paged = paged
    got, want = attended(pages, [(37, 1), (21, 1), (5, 3), (0, 20), (12, 25)], 3)
    assert got.dtype == torch.float32
    assert LOST[kept] / 30 < rel(got, want) < LOST[kept]


@pytest.mark.parametrize("kept", KV_CACHE_DTYPES)
def test_a_block_takes_what_is_said(kept: str) -> None:
    cfg = tiny_config(n_kv_heads=2)
    pages = Pages(cfg, 6, SIZE, torch.bfloat16, "cpu", kept)
    tensors = [t for layers in (pages.layers, pages.scales or []) for pair in layers for t in pair]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held == 7 * Pages.block_bytes(cfg, SIZE, torch.bfloat16, kept)


def test_another_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype = 'int4'.*'fp8'"):
        Pages(tiny_config(), 1, SIZE, torch.float32, "cpu", "int4")
