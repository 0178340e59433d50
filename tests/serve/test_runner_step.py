"""A pass without modules against the modules it goes around."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe.config import ExpertsConfig, RopeConfig, RouterConfig
from moe.generate import stream
from moe.layers import KVCache
from moe.serve.pages import Pages, Pass, Segment
from moe.serve.runner import Fused, Runner, fits
from tests.conftest import rel, tiny_config
from tests.test_model import lively


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


BLOCK = 4


class Without:
    """As on CUDA: the model as few operations, over pages for the kernel."""

    def __init__(self, model: Any, pages: Pages) -> None:
        pages.paged = True
        self.pages, self.fused = pages, Fused(model, None, 0)

    def __call__(self, segments: list[Segment], wanted: list[int]) -> torch.Tensor:
        return self.fused(Pass(self.pages, segments), torch.tensor(wanted))[0]


@torch.no_grad()
def both_ways(model: Any, batch: int, steps: int = 5, made: Callable[[Any, Pages], Any] = Runner) -> float:
    """The largest relative difference of logits, keys and values over some passes after a prompt of 7 tokens."""
    dtype = model.embedding.weight.dtype
    cache, pages = KVCache(model.cfg, batch, 7 + steps, dtype, "cpu"), Pages(model.cfg, 3 * batch, BLOCK, dtype, "cpu")
    runner, differences = made(model, pages), []
    new, start = tokens(batch, 7), 0
    for position in range(7, 7 + steps + 1):
        rows = new.tolist()
        segments = [Segment(row, start, range(3 * i, 3 * i + 3)) for i, row in enumerate(rows)]
        wanted = [len(rows[0]) * (i + 1) - 1 for i in range(batch)]
        got, expected = runner(segments, wanted), model(new, cache=cache).logits_BSV[:, -1]
        assert got.dtype == expected.dtype
        differences.append(rel(got, expected))
        new, start = tokens(batch, 1, seed=position), position
    for layer, own in zip(cache.layers, pages.layers, strict=True):
        for theirs_BNPC, ours_PNC in zip(layer, own, strict=True):
            ours_BPNC = ours_PNC[: 3 * batch * BLOCK].unflatten(0, (batch, -1))[:, : 7 + steps]
            differences.append(rel(ours_BPNC, theirs_BNPC.transpose(1, 2)))
    return max(differences)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 4},
        {"tie_embeddings": True},
        {"experts": ExpertsConfig(n_experts=5, top_k=1, d_ff=20)},
        {"experts": ExpertsConfig(n_experts=5, top_k=3, d_ff=20, activation="gelu")},
        {"experts": ExpertsConfig(n_experts=5, top_k=2, d_ff=20, activation="gelu")},
        {"router": RouterConfig(bias_update_rate=0.5)},
    ],
    ids=str,
)
def test_same_logits_and_cache_as_the_modules(changes: dict[str, Any], batch: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        model: Any = lively(tiny_config(**changes), dtype)
        for block in model.blocks:
            if block.moe.router.bias_E is not None:
                block.moe.router.bias_E.copy_(torch.tensor([0.9, -0.4, 0.1, -0.2, 0.5]))
        assert fits(model)
        assert both_ways(model, batch) < tolerance
        assert both_ways(model, batch, made=Without) < tolerance


def test_same_logits_with_scaled_positions() -> None:
    cfg = tiny_config()
    rope = RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=10)
    attention = cfg.attention.__class__(n_heads=4, n_kv_heads=1, head_dim=10, rope=rope)
    assert both_ways(lively(tiny_config(attention=attention), torch.float32), 2) < 2e-6
    assert both_ways(lively(tiny_config(attention=attention)), 2, made=Without) < 1e-13


def test_bfloat16_stays_bfloat16() -> None:
    """The two round at different places; they agree as far as bfloat16 goes."""
    assert both_ways(lively(tiny_config(), torch.bfloat16), 1, steps=1) < 0.03


class _Twice(nn.Module):
    """A module of the user's own in the place of a Linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def test_hooked_and_replaced_modules_are_called() -> None:
    model: Any = lively(tiny_config(), torch.float32)
    calls: list[int] = []
    hook = model.blocks[1].moe.router.register_forward_hook(lambda *_: calls.append(1))
    assert not fits(model)
    list(stream(model, tokens(1, 4), 6, temperature=0))
    assert len(calls) == 6
    hook.remove()
    assert fits(model)

    plain = model.generate(tokens(1, 4), 6, temperature=0)
    model.head = _Twice(model.head)
    assert not fits(model)
    assert torch.equal(model.generate(tokens(1, 4), 6, temperature=0), plain)  # twice the logits, the same argmax


def test_weights_changed_between_two_generations_are_seen() -> None:
    model: Any = lively(tiny_config(), torch.float32)
    before = model.generate(tokens(2, 4), 8, temperature=0)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.wq.weight.neg_()
            block.attention_norm.weight.mul_(3)
    after = model.generate(tokens(2, 4), 8, temperature=0)
    cache = KVCache(model.cfg, 2, 12, torch.float32, "cpu")
    with torch.no_grad():
        by_modules = [tokens(2, 4)]
        for _ in range(8):
            by_modules.append(model(by_modules[-1], cache=cache).logits_BSV[:, -1:].argmax(-1))
    assert torch.equal(after, torch.cat(by_modules, 1))
    assert not torch.equal(after, before)
