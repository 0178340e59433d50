"""Leading dense layers: another model by formula, in training, generation, counts, checkpoints and adapters."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe import lora, plan, profile
from moe.config import Config, ConfigError, DenseConfig, ExpertsConfig, load_config
from moe.errors import HFError
from moe.generate import stream
from moe.layers import MLP
from moe.model import Transformer
from moe.serve.runner import fits
from moe.train import train
from moe.train.optimizer import build
from moe.weights import init_weights
from tests.conftest import rel, tiny_config


def mixed(**changes: Any) -> Config:
    return tiny_config(n_layers=3, dense=DenseConfig(layers=1, d_ff=44), **changes)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_an_mlp_is_its_formula(activation: str) -> None:
    mlp = MLP(6, 5, activation).double()
    for parameter in mlp.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = x @ mlp.w_in.weight.T
    if activation == "swiglu":
        a = h[..., :5] * torch.sigmoid(h[..., :5]) * h[..., 5:]
    else:
        a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert rel(mlp(x), a @ mlp.w_out.weight.T) < 1e-14


def test_one_expert_that_serves_all_is_the_same_layer() -> None:
    """A block with one expert, whose routing weight is 1, and a dense block of the same weights."""
    one = Transformer(tiny_config(experts=ExpertsConfig(n_experts=1, top_k=1, d_ff=20))).double()
    cfg = tiny_config(dense=DenseConfig(layers=1, d_ff=20), experts=one.cfg.experts)
    other = Transformer(cfg).double()
    state = one.state_dict()
    del state["blocks.0.moe.router.weight"]
    state["blocks.0.mlp.w_in.weight"] = state.pop("blocks.0.moe.experts.w_in_EGFD")[0].flatten(0, 1)
    state["blocks.0.mlp.w_out.weight"] = state.pop("blocks.0.moe.experts.w_out_EDF")[0]
    other.load_state_dict(state)
    assert rel(other(tokens()).logits_BSV, one(tokens()).logits_BSV) < 1e-13


def test_shape_names_and_first_values() -> None:
    cfg = mixed()
    assert cfg.layer_kinds == ("dense", "moe", "moe")
    model = Transformer(cfg)
    assert [block.moe is None for block in model.blocks] == [True, False, False]
    assert [block.mlp is None for block in model.blocks] == [False, True, True]
    assert len(model(tokens()).routing) == cfg.n_moe_layers == 2
    w_in, w_out = (model.get_parameter(f"blocks.0.mlp.{name}.weight") for name in ("w_in", "w_out"))
    assert w_in.std().item() == pytest.approx(0.5 / 24**0.5, rel=0.1)
    assert w_out.std().item() == pytest.approx(0.5 / 44**0.5 / 6**0.5, rel=0.1)
    with torch.device("meta"):
        later = Transformer(cfg)
    later.to_empty(device="cpu")
    init_weights(later, 0)
    assert all(torch.equal(value, later.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_planner_counts_what_the_model_has() -> None:
    cfg = mixed()
    model, counts = Transformer(cfg), plan.params(cfg)
    assert counts.total == sum(p.numel() for p in model.parameters())
    idle = 2 * (cfg.experts.n_experts - cfg.experts.top_k) * 3 * cfg.d_model * cfg.experts.d_ff
    assert counts.active["both"] == counts.total - idle
    plain = tiny_config(n_layers=2)
    dense_layer = 2 * 3 * cfg.d_model * 44 + 2 * (cfg.d_model * 40 * 2 + cfg.d_model * 10 * 2)
    scores = 4 * 4 * 10 * (12 + 1) / 2  # 2 products of C wide heads with half of the positions
    assert plan.flops_per_token(cfg, 12) - plan.flops_per_token(plain, 12) == pytest.approx(
        dense_layer + scores, rel=0.02
    )


def test_generation_is_that_of_whole_sequences() -> None:
    model = Transformer(mixed()).double()
    assert fits(model)
    prompt, want = tokens(), tokens()
    for _ in range(8):
        logits = model(want).logits_BSV
        assert logits is not None
        want = torch.cat([want, logits[:, -1:].argmax(-1)], 1)
    got = torch.stack([*prompt.unbind(1), *stream(model, prompt, 8, temperature=0)], 1)
    assert torch.equal(got, want)
    assert torch.equal(model.generate(prompt, 8, temperature=0), want)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_gives_the_same_gradients(mode: str) -> None:
    gradients = []
    for how in ("none", mode):
        model = Transformer(mixed()).double()
        model.activation_checkpointing = how
        model(tokens(), tokens(1)).loss.backward()
        gradients.append(dict(model.named_parameters()))
    for name, parameter in gradients[0].items():
        assert rel(gradients[1][name].grad, parameter.grad) < 1e-12, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_trains_and_is_resumed(cfg: Config, data_dir: Path, tmp_path: Path, optimizer: str) -> None:
    cfg = cfg.with_overrides(
        [
            "n_layers=2",
            "dense.layers=1",
            "dense.d_ff=64",
            f"train.optimizer={optimizer}",
            "router.bias_update_rate=0.01",
        ]
    )
    assert train(cfg, data_dir, tmp_path / "run").status == "complete"
    model = moe.load(tmp_path / "run" / "final")
    assert model.cfg.layer_kinds == ("dense", "moe")
    other = Transformer(cfg, cfg.train.seed).state_dict()["blocks.0.mlp.w_in.weight"]
    assert rel(model.state_dict()["blocks.0.mlp.w_in.weight"], other) > 1e-3


def test_saved_loaded_profiled(tmp_path: Path) -> None:
    model = Transformer(mixed())
    moe.save(model, tmp_path / "model")
    again = moe.load(tmp_path / "model")
    assert again.cfg == model.cfg
    assert torch.equal(again(tokens()).logits_BSV, model(tokens()).logits_BSV)
    with profile.routing(model) as p:
        model(tokens())
    assert p.counts_LE.shape == (2, 5)
    with pytest.raises(HFError, match=r"dense\.layers = 1: every layer of Mixtral has experts"):
        moe.hf.save(model, tmp_path / "hf")


def test_adapters_go_on_every_layer() -> None:
    model = Transformer(mixed())
    want = model(tokens()).logits_BSV
    lora.add(model, lora.LoraConfig(rank=2, targets=("experts",)))
    names = set(lora.adapters(model))
    assert {"blocks.0.mlp.w_in.lora_a_LI", "blocks.1.moe.experts.lora_a_in_ELD"} <= names
    assert torch.equal(model(tokens()).logits_BSV, want)
    optimizers = build(model, model.cfg.train)
    for _ in range(3):
        model(tokens(), tokens(1)).loss.backward()
        optimizers.step()
        optimizers.zero_grad()
    merged = lora.merged(model)
    assert rel(merged(tokens()).logits_BSV, model(tokens()).logits_BSV) < 1e-5
    assert rel(merged(tokens()).logits_BSV, want) > 1e-4


def test_the_section_is_read_written_scaled_and_checked(tmp_path: Path) -> None:
    cfg = mixed()
    file = tmp_path / "mixed.toml"
    file.write_text(cfg.to_toml())
    assert load_config(file) == cfg
    assert "[dense]" not in tiny_config().to_toml()
    small = cfg.scaled(d_model=96, n_layers=4)
    assert (small.dense, small.experts.d_ff) == (DenseConfig(1, round(44 * 256 / 20)), 256)
    assert cfg.with_overrides(["dense.d_ff=50"]).dense == DenseConfig(1, 50)
    for assignments, message in (
        (["dense.layers=3"], "dense.layers = 3: must leave a layer with experts: less than n_layers = 3"),
        (["dense.layers=0"], "dense.layers = 0: must be greater than 0"),
        (["dense.dff=3"], "unknown key 'dense.dff'; did you mean 'dense.d_ff'"),
        (["dense=3"], r"dense = 3: is a section: write \\[dense\\]"),
    ):
        with pytest.raises(ConfigError, match=message.replace("\\\\", "\\")):
            cfg.with_overrides(assignments)
    with pytest.raises(ConfigError, match=r"dense\.d_ff is missing: the section \[dense\] needs it"):
        tiny_config().with_overrides(["dense.layers=1"])
