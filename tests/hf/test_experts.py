"""Hugging Face's MoE models with our experts against the same models with their own, forward and backward."""

from typing import Any

import pytest
import torch

from tests.conftest import rel
from tests.hf_models import MODELS, build

pytest.importorskip("transformers", minversion="5.0")

from moe.hf.experts import register_experts
from moe.kernels import ops


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
    with pytest.raises(ValueError, match=r"GptOssExperts has swiglu_alpha = 1.0, swiglu_limit = 7.0, not 1.702 and 7"):
        run(build("GptOss", swiglu_alpha=1.0), "gpt4_moe")


def test_slots_of_other_ranks_count_nothing() -> None:
    """Under expert parallelism transformers marks them with an id past the last expert."""
    model = build("Mixtral")
    experts = model.model.layers[0].mlp.experts
    g = torch.Generator().manual_seed(3)
    x, weights = torch.randn(5, 32, generator=g), torch.rand(5, 2, generator=g)
    ids = torch.tensor([[0, 6], [6, 6], [1, 2], [5, 6], [3, 4]])
    want = experts(x, ids, weights)
    register_experts()
    model.set_experts_implementation("gpt4_moe")
    experts._is_expert_parallel = True
    assert rel(experts(x, ids, weights), want) < 1e-6
