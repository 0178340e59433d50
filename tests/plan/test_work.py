"""What a step computes and moves: against torch's own FLOP counter on transformers' Mixtral, and by hand."""

from typing import Any

import pytest
import torch

from moe import plan
from moe.config import Config, load_config
from moe.plan.work import step_work

TINY = load_config("replica-tiny")


def work(cfg: Config, what: Any, batch: int = 4, seq_len: int = 32, **options: Any) -> dict:
    return step_work(cfg, batch, seq_len, what, activation_bytes=4, weight_bytes=4, **options)


def test_flops_are_those_that_torch_counts_in_a_mixtral_of_the_same_shape() -> None:
    pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import MixtralConfig, MixtralForCausalLM

    a, e = TINY.attention, TINY.experts
    config = MixtralConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.d_model,
        intermediate_size=e.d_ff,
        num_hidden_layers=TINY.n_layers,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_kv_heads,
        head_dim=a.head_dim,
        num_local_experts=e.n_experts,
        num_experts_per_tok=e.top_k,
    )
    model = MixtralForCausalLM(config).eval()
    model.set_attn_implementation("eager")  # whose products torch sees
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(TINY.vocab_size, (4, 32)))
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    mine = work(TINY, "forward")
    layer = "MixtralForCausalLM.model.layers.0."
    per_layer = {
        "projections": sum(counts[f"{layer}self_attn.{name}_proj"] for name in "qkvo"),
        # torch counts every score, not the causal half.
        "attention": (counts[f"{layer}self_attn"] - sum(counts[f"{layer}self_attn.{n}_proj"] for n in "qkvo")) / 2,
        "router": counts[f"{layer}mlp.gate"],
    }
    for component, flop in per_layer.items():
        assert mine[component, "forward"].flop == TINY.n_layers * flop, component
    assert mine["up", "forward"].flop + mine["down", "forward"].flop == TINY.n_layers * counts[f"{layer}mlp.experts"]
    assert mine["head", "forward"].flop == counts["MixtralForCausalLM.lm_head"]


@pytest.mark.parametrize("name", ["gpt4-8k", "gpt4-8k-gelu", "replica-nano"])
def test_all_components_together_are_the_planners_flops(name: str) -> None:
    cfg = load_config(name)
    tokens, each = 2 * 128, plan.flops_per_token(cfg, 128)
    assert sum(w.flop for w in work(cfg, "forward", 2, 128).values()) == tokens * each
    assert sum(w.flop for w in work(cfg, "backward", 2, 128).values()) == 3 * tokens * each


DENSE = ["n_layers=3", "dense.layers=1", "dense.d_ff=700"]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_layer_without_experts_is_counted_as_one(activation: str) -> None:
    """Its FLOP are those of the planner, and of its parts those by hand; nothing is routed in it."""
    cfg = TINY.with_overrides([*DENSE, f"experts.activation={activation}"])
    tokens, each = 2 * 128, plan.flops_per_token(cfg, 128)
    found = work(cfg, "backward", 2, 128)
    assert sum(w.flop for w in work(cfg, "forward", 2, 128).values()) == tokens * each
    assert sum(w.flop for w in found.values()) == 3 * tokens * each
    matrices = 3 if activation == "swiglu" else 2
    assert found["mlp", "forward"].flop == 2 * tokens * matrices * 192 * 700
    assert found["mlp", "forward"].bytes == 4 * (matrices * 192 * 700 + tokens * (2 * 192 + matrices * 700))
    two = work(TINY.with_overrides(["n_layers=2", f"experts.activation={activation}"]), "backward", 2, 128)
    for component in ("router", "up", "down", "combine", "permute"):
        assert found[component, "backward"] == two[component, "backward"]


def test_decoding_reads_the_experts_it_touches_and_the_cache() -> None:
    cfg = load_config("gpt4-8k")
    found = step_work(cfg, 8, 1, "decode", activation_bytes=2, weight_bytes=2, context=8191, experts=10.0)
    L, D, F = 120, 10752, 28672
    assert found["up", "forward"].bytes == pytest.approx(L * 10 * D * 2 * F * 2, rel=1e-3)
    assert found["down", "forward"].bytes == pytest.approx(L * 10 * F * D * 2, rel=1e-3)
    # Of each sequence: 8,191 cached positions and the new one, of one key and one value of 128; query and output.
    assert found["attention", "forward"].bytes == L * 8 * (8192 * 256 + 2 * 168 * 128) * 2
    # 168 heads look at 8192 positions: scores and values are 2 x 2 x 128 FLOP each.
    assert found["attention", "forward"].flop == L * 8 * 168 * 8192 * 512


def test_an_optimizer_moves_every_parameter_and_its_state() -> None:
    total = plan.params(TINY).total
    assert work(TINY, "train")["optimizer", "update"].bytes == 28 * total
    muon = TINY.with_overrides(["train.optimizer=muon"])
    found = work(muon, "train")["optimizer", "update"]
    assert 20 * total < found.bytes < 28 * total
    assert found.flop > 0


@pytest.mark.parametrize("changes", [[], DENSE], ids=["experts", "and dense"])
def test_muons_flops_are_those_that_torch_counts(changes: list[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from moe.model import Transformer
    from moe.train.optimizer import build

    cfg = TINY.with_overrides(["train.optimizer=muon", *changes])
    model = Transformer(cfg)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = build(model, cfg.train)
    with FlopCounterMode(display=False) as counter:
        optimizers.step()
    assert work(cfg, "train")["optimizer", "update"].flop == pytest.approx(counter.get_total_flops(), rel=0.01)
