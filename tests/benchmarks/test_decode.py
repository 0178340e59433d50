"""The floors of decoding, against tensors that were really made and figures computed by hand."""

import pytest
import torch

import moe
from benchmarks import decode
from benchmarks.shapes import SHAPES, Shape
from moe.kernels import ops
from moe.serve.pages import Pages
from tests.conftest import tiny_config


def held(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_bytes_of_experts(dtype: torch.dtype) -> None:
    shape = Shape(24, 40, 5, 2, (1,))
    w_in, w_out = (torch.zeros(s, dtype=torch.bfloat16) for s in ((5, 2, 40, 24), (5, 24, 40)))
    kept = (w_in, w_out) if dtype == torch.bfloat16 else ops.quantize_experts(w_in, w_out, dtype)
    assert decode.expert_bytes(shape, 5, dtype.itemsize) == held(*kept)
    assert decode.expert_bytes(shape, 2, dtype.itemsize) * 5 == held(*kept) * 2


def test_experts_at_full_width() -> None:
    """One token reads two experts, 3.7 GB or 0.77 ms at 4.8 TB/s; all sixteen are 29.6 GB."""
    shape = SHAPES["gpt4 few"]
    assert decode.expert_bytes(shape, 2, 2) == pytest.approx(3.7e9, rel=1e-2)
    assert decode.expert_bytes(shape, 2, 2) / 4.8e12 == pytest.approx(0.77e-3, rel=1e-2)
    assert decode.expert_bytes(shape, 16, 2) == pytest.approx(29.6e9, rel=1e-2)
    assert [round(decode.expected_touched(16, 2, T), 2) for T in (1, 2, 64)] == [2.0, 3.75, 16.0]


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_bytes_of_a_cache(kept: str) -> None:
    cfg = tiny_config(n_kv_heads=2)
    pages = Pages(cfg, 6, 4, torch.bfloat16, "cpu", kept)
    heads = decode.Heads(cfg.attention.n_heads, 2, cfg.attention.head_dim, {})
    # Of the blocks that requests have; one more is nobody's.
    want = held(*(t for kept in (*pages.layers, *(pages.scales or ())) for t in kept or ())) * 6 // 7
    assert cfg.n_layers * decode.cache_bytes(heads, 3, 8, 1 if kept == "int8" else 2) == want


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step(tied: bool) -> None:
    cfg = tiny_config(n_kv_heads=2, tie_embeddings=tied)
    with torch.device("meta"):
        model = moe.Transformer(cfg).to(torch.bfloat16)
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    embedding = () if tied else (model.embedding.weight,)
    cache = cfg.n_layers * 3 * 8 * 2 * 2 * cfg.attention.head_dim * 2
    read_always = held(*model.parameters()) - held(*experts) - held(*embedding)
    every = cfg.n_layers * cfg.experts.n_experts
    assert decode.step_bytes(cfg, 0, 3, 8) == read_always + cache
    assert decode.step_bytes(cfg, every, 3, 8) == read_always + held(*experts) + cache


def test_floors_are_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    decode.print_floors(4800.0)
    printed = capsys.readouterr().out
    assert "gpt4 few     bfloat16  T 1: 2.0, 3.7, 0.771" in printed
    assert "gpt4           8192 bfloat16  Q 1: 4.19, 0.874, 168" in printed
