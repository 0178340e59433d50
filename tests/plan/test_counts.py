"""The analytic counts of moe.plan against the real parameters, torch's FLOP counter and the published figures."""

import subprocess
import sys
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe import plan
from moe.config import AttentionConfig, Config, ExpertsConfig, load_config, shipped
from moe.kernels import ops
from moe.kernels.experts import reference
from moe.model import Transformer
from tests.conftest import tiny_config

VARIANTS = {
    "multi-query": tiny_config(),
    "grouped": tiny_config(n_kv_heads=2),
    "multi-head, tied": tiny_config(n_kv_heads=4, tie_embeddings=True),
    "gelu": tiny_config(experts=ExpertsConfig(n_experts=3, top_k=3, d_ff=20, activation="gelu")),
}


def on_meta(cfg: Config) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg)


def count(model: Transformer, *endings: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(endings))


def assert_counts_match(cfg: Config) -> None:
    model, counts = on_meta(cfg), plan.params(cfg)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.embedding == count(model, "embedding.weight")
    assert counts.head == count(model, "head.weight")
    assert counts.attention == count(model, "wq.weight", "wk.weight", "wv.weight", "wo.weight")
    assert counts.experts == count(model, "w_in_EGFD", "w_out_EDF")
    assert counts.expert * cfg.experts.n_experts == counts.experts
    assert counts.router == count(model, "router.weight")
    assert counts.norms == count(model, "norm.weight")
    unused = (cfg.experts.n_experts - cfg.experts.top_k) * counts.expert
    assert counts.active["both"] == counts.total - unused
    # Tied: one matrix is both embeddings, and it is multiplied with.
    assert counts.active["output"] == counts.active["both"] - (0 if cfg.tie_embeddings else counts.embedding)
    assert counts.active["none"] == counts.active["both"] - counts.embedding - counts.head


@pytest.mark.parametrize("name", shipped())
def test_counts_equal_the_built_model_for_every_shipped_shape(name: str) -> None:
    assert_counts_match(load_config(name))


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_counts_equal_the_built_model_for_every_kind_of_model(cfg: Config) -> None:
    assert_counts_match(cfg)


@pytest.mark.parametrize("name", ["gpt4-8k", "gpt4-32k", "gpt4-8k-gelu"])
def test_full_shape_hits_the_published_figures_within_two_percent(name: str) -> None:
    cfg = load_config(name)
    counts = plan.params(cfg)
    assert counts.total == pytest.approx(1.8e12, rel=0.02)
    assert counts.expert == pytest.approx(111e9, rel=0.02)
    assert counts.attention == pytest.approx(55e9, rel=0.02)
    assert counts.active["output"] == pytest.approx(280e9, rel=0.02)
    assert plan.flops_per_token(cfg) == pytest.approx(560e9, rel=0.02)
    assert plan.dense_flops_per_token(cfg) == pytest.approx(3700e9, rel=0.02)


def test_published_mixture_of_experts() -> None:
    mixtral_8x7b = tiny_config(  # from its config.json
        d_model=4096,
        n_layers=32,
        vocab_size=32_000,
        attention=AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128),
        experts=ExpertsConfig(n_experts=8, top_k=2, d_ff=14_336),
    )
    counts = plan.params(mixtral_8x7b)
    assert counts.total == 46_702_792_704  # the sum over the checkpoint's tensors
    assert counts.active["both"] == pytest.approx(12.9e9, rel=0.002)


def test_full_shape_builds_on_meta_in_seconds() -> None:
    start = time.perf_counter()
    model = on_meta(load_config("gpt4-8k"))
    assert time.perf_counter() - start < 10
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_flops_equal_those_of_the_torch_counter(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter sees into torch's own products only, so the custom ops are replaced by their reference in torch."""

    def expert_mlp(x, w_in, w_out, weights, ids, activation, recompute):
        return reference.expert_mlp(x, w_in, w_out, weights, ids, activation)

    monkeypatch.setattr(ops, "expert_mlp", expert_mlp)
    model = Transformer(cfg)
    tokens = torch.randint(cfg.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    # The math backend computes all S x S scores, those of the future included: the convention causal=False.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens)
    assert counter.get_total_flops() == tokens.numel() * plan.flops_per_token(cfg, context=16, causal=False)


def test_flops_conventions() -> None:
    cfg = tiny_config()
    q = cfg.attention.n_heads * cfg.attention.head_dim
    without = plan.flops_per_token(cfg)
    assert plan.flops_per_token(cfg, context=7, causal=False) - without == 4 * q * 7 * cfg.n_layers
    # Causal: position i sees i of the s positions, on average half of them.
    assert plan.flops_per_token(cfg, context=7) - without == 2 * q * 7 * cfg.n_layers
    dense = tiny_config(experts=ExpertsConfig(n_experts=5, top_k=5, d_ff=20))
    assert plan.dense_flops_per_token(cfg, context=7) == plan.flops_per_token(dense, context=7)


def test_planner_never_loads_torch() -> None:
    code = "import sys, moe; moe.plan.params(moe.load_config('gpt4-8k')); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
