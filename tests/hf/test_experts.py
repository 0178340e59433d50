"""Hugging Face's MoE models with our experts against the same models with their own, forward and backward."""

import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.hf.experts import OLDEST, register_experts
from moe.kernels import ops
from tests.conftest import rel
from tests.hf_models import MODELS, build

theirs = pytest.importorskip("transformers.integrations.moe")


def run(model: Any, experts: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the gradients of the language-model loss by name."""
    model.set_experts_implementation(experts)
    model.zero_grad()
    tokens = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("impl", [None, "reference", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_the_eager_experts(name: str, impl: str | None) -> None:
    model = build(name)
    logits, gradients = run(model, "eager")
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    register_experts(impl)
    ours, our_gradients = run(model, "gpt4_moe")
    assert rel(ours, logits) < 2e-6
    assert our_gradients.keys() == gradients.keys()
    total = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    for n, g in gradients.items():
        scale = max(g.norm().item(), 1e-6 * total)
        assert (our_gradients[n] - g).norm().item() / scale < 1e-5, n
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers


def test_it_is_our_op_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, op = [], ops.expert_mlp
    monkeypatch.setattr(ops, "expert_mlp", lambda *a, **k: calls.append(a[1].shape) or op(*a, **k))
    register_experts()
    run(build("GptOss"), "gpt4_moe")
    assert calls == [(6, 2, 48, 32)] * 2


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_weights_reach_the_op_as_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, op = build(name), [], ops.expert_mlp
    monkeypatch.setattr(ops, "expert_mlp", lambda *a, **k: seen.extend(a[1:3]) or op(*a, **k))
    register_experts()
    run(model, "gpt4_moe")
    stored = {p.data_ptr() for n, p in model.named_parameters() if n.endswith("_proj") and "experts" in n}
    assert {t.data_ptr() for t in seen} == stored


def test_models_that_do_not_fit_say_why() -> None:
    register_experts()
    with pytest.raises(ValueError, match=r"MixtralExperts has the activation gelu.* with a gate; use \"grouped_mm\""):
        run(build("Mixtral", hidden_act="gelu"), "gpt4_moe")
    model = build("Mixtral")
    model.model.layers[1].mlp.experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    with pytest.raises(ValueError, match=r"MixtralExperts has a gate function of its own; use \"grouped_mm\""):
        run(model, "gpt4_moe")
    model = build("GptOss")
    model.model.layers[0].mlp.experts.alpha = 1.0  # a key of the configuration in later releases
    with pytest.raises(ValueError, match=r"GptOssExperts has swiglu_alpha = 1.0, swiglu_limit = 7.0, not 1.702 and 7"):
        run(model, "gpt4_moe")


@pytest.mark.parametrize("impl", ["reference", "grouped", "triton"])
@pytest.mark.parametrize("said", [True, None])
def test_slots_of_other_ranks_count_nothing(said: bool | None, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under expert parallelism transformers marks them with an id past the last expert; older releases do not say when
    they do."""
    experts = build("Mixtral").model.layers[0].mlp.experts
    g = torch.Generator().manual_seed(3)
    x, weights = torch.randn(5, 32, generator=g), torch.rand(5, 2, generator=g)
    ids = torch.tensor([[0, 6], [6, 6], [1, 2], [5, 6], [3, 4]])
    elsewhere = ids == 6
    want = experts(x, ids.masked_fill(elsewhere, 0), weights.masked_fill(elsewhere, 0))
    register_experts(impl)
    experts.config._experts_implementation = "gpt4_moe"
    if said is None:
        monkeypatch.delattr(experts, "_is_expert_parallel", raising=False)
    else:
        experts._is_expert_parallel = said
    weights.requires_grad_()
    got = experts(x, ids, weights)
    assert rel(got, want) < 1e-6
    (gradient,) = torch.autograd.grad(got.square().sum(), weights)
    assert not gradient[elsewhere].any()
    assert gradient[~elsewhere].all()


def test_a_release_without_what_is_needed_says_which_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version("transformers")
    needs = rf"transformers has from {OLDEST} on, and {found} is installed: pip install \"transformers>={OLDEST}\""
    # As in 5.0: experts that do not say how their weights are stored.
    monkeypatch.setattr(theirs, "use_experts_implementation", lambda experts_class: experts_class)
    with pytest.raises(ImportError, match=needs):
        register_experts()
    monkeypatch.delattr(theirs, "ALL_EXPERTS_FUNCTIONS")
    with pytest.raises(ImportError, match=needs):
        register_experts()


def test_the_oldest_release_is_the_one_promised() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["hf"] == [f"transformers>={OLDEST}"]
