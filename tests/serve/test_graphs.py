"""Decoding steps in tensors that stay where they are: the same logits as passes of the batch, and nothing for padding.

On a CPU nothing is captured, and what a graph would replay is called.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe import Transformer
from moe.serve.graphs import DecodeGraphs, DecodePass, bucket
from moe.serve.pages import Pages, Segment
from moe.serve.runner import Runner
from tests.conftest import rel, tiny_config

CFG = tiny_config(n_kv_heads=2)


class Choice(NamedTuple):
    ids_TK: Tensor
    weights_TK: Tensor


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CFG, seed=3).double()


class Requests:
    """Some requests whose prompts are in the cache, in blocks in no order."""

    def __init__(self, model: Transformer, lengths: list[int], block_size: int, dtype: str = "auto") -> None:
        g = torch.Generator().manual_seed(0)
        counts = [-(-(n + 9) // block_size) for n in lengths]
        order = torch.randperm(sum(counts), generator=g).tolist()
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        self.blocks = [order[low:high] for low, high in pairwise(ends)]
        self.lengths, self.g = lengths, g
        self.pages = Pages(CFG, len(order), block_size, torch.float64, "cpu", dtype)
        self.runner = Runner(model, self.pages)
        for n, blocks in zip(lengths, self.blocks, strict=True):
            self.runner([Segment(self.tokens(n), 0, blocks)], [n - 1])

    def tokens(self, n: int) -> list[int]:
        return torch.randint(61, (n,), generator=self.g).tolist()

    def next(self, S: int) -> list[Segment]:
        return [Segment(self.tokens(S), n, b) for n, b in zip(self.lengths, self.blocks, strict=True)]

    def graphs(self, model: Transformer) -> DecodeGraphs:
        def run(one: Any, rows_N: Tensor) -> tuple[Tensor, list[Choice]]:
            out = model(one.tokens_T.unsqueeze(0), cache=one)
            choices = (one.leave_out_padding(r.weights_TK, r.ids_TK) for r in out.routing)
            return out.logits_BSV[0].index_select(0, rows_N), [Choice(ids, w) for w, ids in choices]

        return DecodeGraphs(self.pages, run)


def test_sizes_of_batches() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 512)] == [1, 2, 4, 4, 8, 8, 16, 16, 32, 48, 512]


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.parametrize(("lengths", "S", "block_size"), [([5], 1, 16), ([5, 17, 1], 1, 4), ([5, 17, 1, 9, 3], 4, 3)])
@torch.no_grad()
def test_logits_and_routing_are_those_of_a_pass(
    lengths: list[int], S: int, block_size: int, dtype: str, model: Transformer
) -> None:
    requests = Requests(model, lengths, block_size, dtype)
    graphs = requests.graphs(model)
    for wanted in (list(range(len(lengths) * S)), [0]):
        segments = requests.next(S)
        done = graphs(segments, wanted)
        assert done is not None
        logits_NV, routing = done
        requests.runner.record = True
        want_NV = requests.runner(segments, wanted)
        assert rel(logits_NV, want_NV) < (1e-12 if dtype == "auto" else 1e-5)
        assert [c.ids_TK.tolist() for c in routing] == [c.ids_TK.tolist() for c in requests.runner.routing]
        assert all(len(c.weights_TK) == len(lengths) * S for c in routing)


@torch.no_grad()
def test_one_graph_serves_batches_of_its_size(model: Transformer) -> None:
    requests = Requests(model, [5, 17, 1, 9, 3, 8], 4)
    graphs = requests.graphs(model)
    for _ in range(2):
        for some in (slice(0, 5), slice(1, 6), slice(0, 6)):
            segments = requests.next(1)[some]
            wanted = range(len(segments))
            assert rel(graphs(segments, wanted)[0], requests.runner(segments, wanted)) < 1e-12  # type: ignore[index]
    assert list(graphs._steps) == [(8, 1, 1024)]


@torch.no_grad()
def test_padding_writes_where_nobody_reads(model: Transformer) -> None:
    requests = Requests(model, [5, 17, 1], 4)
    pages, segments = requests.pages, requests.next(2)
    before = [t.clone() for layer in pages.layers for t in layer if t is not None]
    requests.graphs(model)(segments, [0])
    own = {s.blocks[p // 4] * 4 + p % 4 for s in segments for p in range(s.start, s.end)}
    unread = range(pages.n_blocks * 4, (pages.n_blocks + 1) * 4)
    for old, new in zip(before, (t for layer in pages.layers for t in layer if t is not None), strict=True):
        changed = set((old != new).flatten(1).any(1).nonzero().flatten().tolist())
        assert own <= changed <= own | set(unread)


def test_padding_touches_no_expert_and_has_no_weight(model: Transformer) -> None:
    requests = Requests(model, [5, 17, 1], 4)
    one = DecodePass(requests.pages, 4, 2, 1024)
    one.fill(requests.next(2))
    weights_TK, ids_TK = torch.rand(8, 2), torch.arange(16).view(8, 2)
    weights, ids = one.leave_out_padding(weights_TK, ids_TK)
    assert torch.equal(weights[:6], weights_TK[:6])
    assert torch.equal(ids[:6], ids_TK[:6])
    assert not weights[6:].any()
    assert torch.equal(ids[6:], ids_TK[:1].expand(2, 2))


def test_what_is_no_decoding_is_left_to_others(model: Transformer) -> None:
    requests = Requests(model, [5, 17], 4)
    graphs = requests.graphs(model)
    assert graphs([requests.next(1)[0], requests.next(2)[1]], [0]) is None
    assert graphs([Segment(requests.tokens(10), 5, requests.blocks[0])], [0]) is None
