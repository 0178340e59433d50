"""LoRA on a whole model: against peft, merged against unmerged, what stays frozen, and adapters on disk."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe import Config, checkpoint, lora
from moe.errors import CheckpointError, ConfigError
from moe.layers import Linear
from moe.lora import LoraConfig, LoraLinear
from moe.model import Transformer
from moe.train.optimizer import build
from tests.conftest import rel


@pytest.fixture
def model(cfg: Config) -> Transformer:
    """Two layers, so that a mix-up of layers would show."""
    return Transformer(cfg.with_overrides(["n_layers=2", "vocab_size=50"]), seed=1)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(seed))


def trained(model: Transformer, cfg: LoraConfig, steps: int = 5) -> list[float]:
    """A few steps of AdamW on one batch through the adapters; the losses."""
    lora.add(model, cfg, seed=2)
    optimizers = build(model, model.cfg.train)
    losses = []
    for _ in range(steps):
        loss = model(tokens(), tokens(1)).loss
        assert loss is not None
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_linear_with_adapters_is_peft_s() -> None:
    peft = pytest.importorskip("peft")
    cfg = LoraConfig(rank=3, alpha=5.0)
    linear = Linear(7, 5)
    torch.nn.init.normal_(linear.weight)
    ours = LoraLinear(torch.nn.Parameter(linear.weight), cfg)
    for parameter in (ours.lora_a_LI, ours.lora_b_OL):
        torch.nn.init.normal_(parameter)
    inner = torch.nn.Linear(7, 5, bias=False)
    inner.weight.data.copy_(linear.weight)
    module = torch.nn.Sequential(inner)
    theirs: Any = peft.get_peft_model(module, peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=["0"]))
    parts = {n.split(".default")[0].rpartition(".")[2]: p for n, p in theirs.named_parameters() if "lora" in n}
    parts["lora_A"].data.copy_(ours.lora_a_LI)
    parts["lora_B"].data.copy_(ours.lora_b_OL)
    x = torch.randn(4, 7)
    got, want = ours(x), theirs(x)
    assert rel(got, want) < 1e-6
    got.square().sum().backward()
    want.square().sum().backward()
    for mine, other in ((ours.lora_a_LI, parts["lora_A"]), (ours.lora_b_OL, parts["lora_B"])):
        assert mine.grad is not None
        assert rel(mine.grad, other.grad) < 1e-6
    assert ours.weight.grad is None
    assert rel(ours.merged(), theirs.merge_and_unload()[0].weight) < 1e-6


@pytest.mark.parametrize("targets", [("attention",), ("experts",), ("attention", "experts")])
def test_adapters_start_at_the_model_itself_and_alone_are_trained(model: Transformer, targets: tuple[str, ...]) -> None:
    before = model(tokens()).logits_BSV
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = trained(model, LoraConfig(rank=2, targets=targets))
    assert losses[-1] < losses[0]
    names = set(lora.adapters(model))
    per_layer = 4 * 2 * ("attention" in targets) + 4 * ("experts" in targets)
    assert len(names) == 2 * per_layer
    for name, parameter in model.named_parameters():
        if name in names:
            assert parameter.requires_grad
            assert parameter.any()
        else:
            assert torch.equal(parameter, weights[name])
    assert set(weights) == {name for name, _ in model.named_parameters()} - names
    fresh = Transformer(model.cfg, seed=1)
    lora.add(fresh, LoraConfig(targets=targets))
    assert before is not None
    assert rel(fresh(tokens()).logits_BSV, before) < 1e-6


def test_only_adapters_are_in_the_optimizer(model: Transformer) -> None:
    lora.add(model, LoraConfig(rank=2))
    optimizers = build(model, model.cfg.with_overrides(["train.optimizer=muon"]).train)
    held = {id(p) for part in optimizers.parts for group in part.param_groups for p in group["params"]}
    assert held == {id(p) for p in lora.adapters(model).values()}


@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_a_plain_model_with_the_same_logits(model: Transformer, tied: bool, tmp_path: Path) -> None:
    model = Transformer(model.cfg.with_overrides([f"tie_embeddings={str(tied).lower()}"]), seed=1)
    untrained = model(tokens(5)).logits_BSV
    trained(model, LoraConfig(rank=2))
    plain = lora.merged(model)
    want = model(tokens(5)).logits_BSV
    assert rel(plain(tokens(5)).logits_BSV, want) < 1e-5
    assert rel(untrained, want) > 1e-3
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in Transformer(model.cfg).named_parameters()]
    assert plain.norm.weight is not None
    checkpoint.save(plain, tmp_path / "merged")
    assert rel(moe.load(tmp_path / "merged")(tokens(5)).logits_BSV, want) < 1e-5
    assert torch.equal(model(tokens(5)).logits_BSV, want), "merging changed the model it was given"
    generated = plain.generate(tokens()[:1, :4], 6, temperature=0)
    assert torch.equal(generated, model.generate(tokens()[:1, :4], 6, temperature=0))


def test_a_bias_of_the_router_stays_frozen(cfg: Config) -> None:
    model = Transformer(cfg.with_overrides(["vocab_size=50", "router.bias_update_rate=0.1"]), seed=1)
    lora.add(model, LoraConfig())
    blocks: Any = model.blocks
    router = blocks[0].moe.router
    before = router.bias_E.clone()
    router.update_bias(torch.tensor([9, 0, 0, 0]))
    assert torch.equal(router.bias_E, before)
    plain: Any = lora.merged(model).blocks
    assert torch.equal(plain[0].moe.router.bias_E, before)


def test_first_values_depend_on_seed_and_name_alone(model: Transformer) -> None:
    one, other = model, Transformer(model.cfg, seed=1)
    lora.add(one, LoraConfig(targets=("attention", "experts")), seed=3)
    lora.add(other, LoraConfig(targets=("experts",)), seed=3)
    a = lora.adapters(one)["blocks.1.moe.experts.lora_a_in_ELD"]
    assert torch.equal(a, lora.adapters(other)["blocks.1.moe.experts.lora_a_in_ELD"])
    assert not torch.equal(a[0], a[1])
    # Uniform in +- 1 / sqrt(fan-in), as peft's (kaiming_uniform_ with a = sqrt(5)): standard deviation 1 / sqrt(3 D).
    assert a.abs().max() <= 64**-0.5
    assert rel(a.std(), torch.tensor((3 * 64) ** -0.5)) < 0.05


def test_training_goes_on_from_files(model: Transformer, tmp_path: Path) -> None:
    """As a run resumes: base and adapters in one checkpoint, loaded into a model on the meta device."""
    trained(model, LoraConfig(rank=2))
    checkpoint.write_files(model, tmp_path)
    with torch.device("meta"):
        again = Transformer(model.cfg)
    lora.add(again, LoraConfig(rank=2))
    checkpoint.load_weights(again, tmp_path)
    assert torch.equal(again(tokens(5)).logits_BSV, model(tokens(5)).logits_BSV)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(lora.adapters(model))
    with pytest.raises(CheckpointError, match="LoRA saved this to go on from: load what it left in final/"):
        moe.load(tmp_path)


# ------------------------------------------------------------------------------------------------ adapters on disk


def test_adapters_load_on_top_of_their_base(model: Transformer, tmp_path: Path) -> None:
    cfg = LoraConfig(rank=2, alpha=3.0, targets=("experts",))
    checkpoint.save(model, tmp_path / "base")
    trained(model, cfg)
    lora.save_adapter(model, cfg, tmp_path / "adapter.safetensors")
    assert (tmp_path / "adapter.safetensors").stat().st_size < 0.3 * sum(4 * p.numel() for p in model.parameters())
    again = moe.load(tmp_path / "base")
    assert lora.load_adapter(again, tmp_path) == cfg
    assert torch.equal(again(tokens(5)).logits_BSV, model(tokens(5)).logits_BSV)
    coarse = moe.load(tmp_path / "base", dtype=torch.bfloat16)
    lora.load_adapter(coarse, tmp_path / "adapter.safetensors")
    assert rel(coarse(tokens(5)).logits_BSV, model(tokens(5)).logits_BSV) < 5e-2


def test_adapters_of_the_first_version_are_read(model: Transformer, tmp_path: Path) -> None:
    """The adapters of the experts were once those of the MoE."""
    base, file = copy.deepcopy(model), tmp_path / "adapter.safetensors"
    trained(model, LoraConfig(rank=2))
    lora.save_adapter(model, LoraConfig(rank=2), file)
    with safe_open(file, framework="pt") as source:
        metadata = source.metadata()
    old = {name.replace(".moe.experts.", ".moe."): tensor for name, tensor in load_file(file).items()}
    assert any(".moe.lora_a_in_ELD" in name for name in old)
    save_file(old, file, metadata)
    lora.load_adapter(base, file)
    for name, adapter in lora.adapters(model).items():
        assert torch.equal(adapter, lora.adapters(base)[name])


def test_adapters_of_another_model_are_refused(model: Transformer, tmp_path: Path) -> None:
    cfg, file = LoraConfig(rank=2), tmp_path / "adapter.safetensors"
    base = Transformer(model.cfg, seed=1)
    trained(model, cfg)
    lora.save_adapter(model, cfg, file)
    for other in (Transformer(model.cfg, seed=9), lora.merged(model)):
        with pytest.raises(CheckpointError, match="trained on other weights than these"):
            lora.load_adapter(other, file)
        assert not lora.is_added(other)
    shallow = Transformer(model.cfg.with_overrides(["n_layers=1"]))
    with pytest.raises(CheckpointError, match="not part of the model"):
        lora.load_adapter(shallow, file)
    lora.load_adapter(base, file)
    with pytest.raises(CheckpointError, match="has adapters already"):
        lora.load_adapter(base, file)


def test_what_holds_no_adapters_is_refused(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        lora.load_adapter(model, tmp_path / "nowhere")
    checkpoint.save(model, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        lora.load_adapter(model, tmp_path / "plain" / "model.safetensors")
    with pytest.raises(CheckpointError, match="no adapters to save"):
        lora.save_adapter(model, LoraConfig(), tmp_path / "x")
    trained(model, LoraConfig(), steps=1)
    lora.save_adapter(model, LoraConfig(), tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        lora.load_adapter(Transformer(model.cfg, seed=1), tmp_path / "cut")
    with pytest.raises(ValueError, match="has adapters already"):
        lora.add(model, LoraConfig())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"rank": 0}, r"lora.rank = 0"), ({"alpha": 0.0}, r"lora.alpha = 0"), ({"targets": ("mlp",)}, r"lora.targets")],
)
def test_settings_that_cannot_be(settings: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        LoraConfig(**settings)
