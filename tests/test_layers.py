"""moe.layers: RMSNorm, rotary embedding and its scalings, attention, each against its formula in float64."""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.config import AttentionConfig, RopeConfig
from moe.layers import Attention, KVCache, RMSNorm, rope_frequencies, rope_tables, rotate
from tests.conftest import rel, tiny_config

CPU = torch.device("cpu")
F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def tables(start: int, length: int, head_dim: int, cfg: RopeConfig | None = None) -> tuple[Tensor, Tensor]:
    return rope_tables(start, length, head_dim, cfg or RopeConfig(), F64, CPU)


# ------------------------------------------------------------------------------------------------------------ RMSNorm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # 1e-3: where eps matters
def test_rms_norm(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    norm = RMSNorm(20, eps=1e-5)
    norm.weight.data = normal(20, seed=1)
    x = (normal(3, 4, 20) * scale).to(dtype)
    wide = x.double()
    want = wide / torch.sqrt((wide * wide).sum(-1, keepdim=True) / 20 + 1e-5) * norm.weight.double()
    got = norm(x)
    assert got.dtype == dtype
    assert rel(got, want) < tolerance


def test_rms_norm_computes_in_float32_under_autocast() -> None:
    """300^2 summed over 4096 elements is beyond what bfloat16 adds up rightly."""
    norm = RMSNorm(4096, eps=1e-5)
    norm.weight.data.fill_(1.0)
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x)
    assert torch.equal(got, torch.ones_like(got))


def test_rms_norm_gradcheck() -> None:
    norm = RMSNorm(6, eps=1e-5).double()
    norm.weight.data = normal(6, seed=1)
    assert torch.autograd.gradcheck(norm, normal(2, 6).requires_grad_())


# ------------------------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
def test_rotation_is_a_product_of_complex_numbers(head_dim: int) -> None:
    """Pair (x[i], x[i + C/2]) as x[i] + i x[i + C/2], times exp(i position theta^(-2i/C)).

    The frequencies are float32 numbers, those of transformers' formula, whatever the dtype of the rotation.
    """
    x, start = normal(2, 7, 3, head_dim), 5
    half = head_dim // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    frequencies = (1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))).tolist()
    assert frequencies == pytest.approx([1e4 ** (-2 * i / head_dim) for i in range(half)], rel=5e-7)
    for s in range(7):
        for i in range(half):
            pairs[:, s, :, i] *= cmath.exp(1j * (start + s) * frequencies[i])
    assert rel(rotate(x, *tables(start, 7, head_dim)), torch.cat([pairs.real, pairs.imag], -1)) < 1e-13


@given(first=st.integers(0, 5000), distance=st.integers(0, 3000), shift=st.integers(0, 5000))
def test_dot_products_depend_on_the_distance_only(first: int, distance: int, shift: int) -> None:
    q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)

    def dot(query_at: int, key_at: int) -> float:
        return float((rotate(q, *tables(query_at, 1, 16)) * rotate(k, *tables(key_at, 1, 16))).sum())

    scale = float(q.norm() * k.norm())
    assert abs(dot(first + distance, first) - dot(first + distance + shift, first + shift)) < 1e-11 * scale


def test_rotation_at_position_zero_and_lengths() -> None:
    x = normal(2, 9, 3, 16)
    turned = rotate(x, *tables(0, 9, 16))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert rel(turned.norm(dim=-1), x.norm(dim=-1)) < 1e-14
    assert rel(turned[:, 1:], x[:, 1:]) > 0.1


def test_tables_from_the_middle_are_the_rows_of_the_whole() -> None:
    whole = tables(0, 50, 16)
    for part, full in zip(tables(30, 20, 16), whole, strict=True):
        assert torch.equal(part, full[30:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tables_are_float32_for_narrow_inputs(dtype: torch.dtype) -> None:
    """In bfloat16 the positions themselves would be rounded from 256 on."""
    cos, _ = rope_tables(8000, 8, 16, RopeConfig(), dtype, CPU)
    assert cos.dtype == torch.float32
    assert rel(cos, tables(8000, 8, 16)[0]) < 1e-3
    assert rotate(normal(1, 8, 2, 16, dtype=dtype), cos, cos).dtype == dtype


def test_linear_scaling_divides_positions() -> None:
    scaled = tables(0, 33, 16, RopeConfig(scaling="linear", factor=4.0))
    for stretched, plain in zip(scaled, tables(0, 9, 16), strict=True):
        assert rel(stretched[::4], plain) < 1e-14


def test_theta() -> None:
    frequencies, temperature = rope_frequencies(8, RopeConfig(theta=16.0))
    assert frequencies == pytest.approx([1.0, 0.5, 0.25, 0.125])
    assert temperature == 1.0


def test_yarn_against_the_formula_by_hand() -> None:
    """Peng et al. 2023 with theta = 16, C = 16 and an original context of 2 pi x 64: then pair i turns 64 / 2^(i/2)
    times within it. It makes 32 turns at i = 2 and 4 turns at i = 8 (beyond the last), so the ramp runs over i - 2.
    """
    cfg = RopeConfig(
        theta=16.0, scaling="yarn", factor=4.0, original_max_seq_len=402, beta_fast=32 * 0.98, beta_slow=4 * 1.1
    )
    # 402 / (2 pi) = 63.98: the crossings lie at 2.06 and 7.72, hence low = floor = 2, high = ceil = 8.
    base = [2.0 ** (-i / 2) for i in range(8)]
    want = []
    for i, f in enumerate(base):
        keep = 1 - min(max((i - 2) / 6, 0), 1)
        want.append(keep * f + (1 - keep) * f / 4)
    frequencies, temperature = rope_frequencies(16, cfg)
    assert frequencies == pytest.approx(want, rel=2e-7)  # float32 steps
    assert temperature == pytest.approx(1 + 0.1 * math.log(4), rel=1e-12)


def test_yarn_at_the_extremes_of_the_32k_shape() -> None:
    cfg = RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=8192)
    plain, _ = rope_frequencies(128, RopeConfig())
    yarn, _ = rope_frequencies(128, cfg)
    for f, g in zip(plain, yarn, strict=True):
        turns = 8192 * f / (2 * math.pi)
        if turns > 33:  # a little beyond beta, because the paper rounds the ramp's ends outwards to whole pairs
            assert g == f
        elif turns < 0.8:
            assert g == pytest.approx(f / 4, rel=1e-12)
        assert f / 4 <= g * (1 + 1e-12)
        assert g <= f
    assert yarn == sorted(yarn, reverse=True)


def test_yarn_temperature_multiplies_queries_and_keys() -> None:
    cfg = RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=8192)
    x = normal(1, 5, 1, 16)
    assert rel(rotate(x, *tables(3, 5, 16, cfg)).norm(dim=-1), x.norm(dim=-1) * (0.1 * math.log(4) + 1)) < 1e-14


def test_yarn_with_factor_one_changes_nothing() -> None:
    frequencies, temperature = rope_frequencies(64, RopeConfig(scaling="yarn", factor=1.0))
    assert frequencies == pytest.approx(rope_frequencies(64, RopeConfig())[0], rel=2e-7)
    assert temperature == 1.0


# ---------------------------------------------------------------------------------------------------------- attention


def attention(n_heads: int, n_kv_heads: int, d_model: int = 12, head_dim: int = 6) -> Attention:
    module = Attention(d_model, AttentionConfig(n_heads, n_kv_heads, head_dim)).double()
    for i, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=10 + i) / parameter.shape[1] ** 0.5
    return module


def by_hand(module: Attention, x: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Head by head: a full softmax over what a position may see; query head h reads key head h // (H / N)."""
    C, S = module.head_dim, x.shape[1]
    cos, sin = (t.squeeze(1)[:, C // 2 :] for t in tables(0, S, C))

    def head(weight: Tensor, h: int, turn: bool) -> Tensor:
        y = x @ weight[h * C : (h + 1) * C].T
        if turn:
            a, b = y[..., : C // 2], y[..., C // 2 :]
            y = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return y

    outputs = []
    for h in range(n_heads):
        n = h // (n_heads // n_kv_heads)
        q, k, v = head(module.wq.weight, h, True), head(module.wk.weight, n, True), head(module.wv.weight, n, False)
        scores = q @ k.transpose(1, 2) / math.sqrt(C)
        scores = scores.masked_fill(torch.arange(S)[:, None] < torch.arange(S)[None, :], -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(weights @ v)
    return torch.cat(outputs, -1) @ module.wo.weight.T


HEADS = [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)]  # query heads, key/value heads


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("S", [1, 2, 9])
def test_attention_is_a_softmax_over_the_past(n_heads: int, n_kv_heads: int, S: int) -> None:
    module, x = attention(n_heads, n_kv_heads), normal(2, S, 12)
    rope = tables(0, S, 6)
    want = by_hand(module, x, n_heads, n_kv_heads)
    assert rel(module(x, rope), want) < 1e-13
    got = torch.autograd.grad(module(x, rope).square().sum(), list(module.parameters()))
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), list(module.parameters())), strict=True):
        # Over one position the softmax is 1 whatever the scores, so queries and keys get no gradient but rounding.
        assert rel(a, b) < 1e-12 or (S == 1 and a.norm() < 1e-12 and b.norm() < 1e-12)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5], [3, 1, 4, 1]])
def test_attention_over_a_cache(n_heads: int, n_kv_heads: int, chunks: list[int]) -> None:
    module, x = attention(n_heads, n_kv_heads), normal(2, 9, 12)
    cache, outputs, start = kv_cache(2, 11, n_heads, n_kv_heads), [], 0
    for chunk in chunks:
        outputs.append(extend(module, x[:, start : start + chunk], cache))
        start += chunk
    assert rel(torch.cat(outputs, 1), by_hand(module, x, n_heads, n_kv_heads)) < 1e-13
    assert cache.layers[0].k_BNPC[:, :, 9:].isnan().all()


def kv_cache(batch: int, max_len: int, n_heads: int, n_kv_heads: int) -> KVCache:
    """Of one layer; what nobody has written is not a number."""
    heads = AttentionConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=6)
    cache = KVCache(tiny_config(n_layers=1, attention=heads), batch, max_len, F64, "cpu")
    for tensor in cache.layers[0]:
        tensor.fill_(math.nan)
    return cache


def extend(module: Attention, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
    y = module(x, cache.rope(x.shape[1]), cache.attends(x.shape[1])[0])
    cache.advance(x.shape[1])
    return y


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_attention_over_a_cache_of_unequal_sequences(n_heads: int, n_kv_heads: int) -> None:
    """Each has positions of its own: two chunks more are to it what they would be alone."""
    module, prompts = attention(n_heads, n_kv_heads), [normal(1, n, 12, seed=n) for n in (5, 1, 3)]
    alone = [kv_cache(1, 12, n_heads, n_kv_heads) for _ in prompts]
    for prompt, one in zip(prompts, alone, strict=True):
        extend(module, prompt, one)
    together = kv_cache(3, 12, n_heads, n_kv_heads)
    for tensor, parts in zip(together.layers[0], zip(*(one.layers[0] for one in alone), strict=True), strict=True):
        tensor.copy_(torch.cat(parts).nan_to_num())
    together.lengths = [5, 1, 3]
    for n in (4, 1):
        x = normal(3, n, 12, seed=10 + n)
        want = torch.cat([extend(module, x[i : i + 1], one) for i, one in enumerate(alone)])
        assert rel(extend(module, x, together), want) < 1e-13


def test_attention_sees_no_later_token() -> None:
    module, x = attention(6, 2), normal(2, 9, 12)
    changed = x.clone()
    changed[:, 5:] = normal(2, 4, 12, seed=3)
    before, after = module(x, tables(0, 9, 6)), module(changed, tables(0, 9, 6))
    assert rel(after[:, :5], before[:, :5]) < 1e-14
    assert ((after[:, 5:] - before[:, 5:]).norm(dim=-1) > 0.1).all()


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 1), (4, 2), (4, 4)])
def test_attention_gradcheck(n_heads: int, n_kv_heads: int) -> None:
    module, rope = attention(n_heads, n_kv_heads, d_model=5, head_dim=4), tables(0, 4, 4)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, rope))

    inputs = (normal(1, 4, 5).requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
