"""Our experts in transformers' models as they are used: compiled, checkpointed, in bfloat16, in every family."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.hf.experts import register_experts
from moe.kernels import ops
from tests.conftest import rel
from tests.hf_models import build

transformers = pytest.importorskip("transformers")


FAMILIES = ("Mixtral", "Qwen3Moe", "GptOss")


def experts_of(name: str) -> Any:
    return build(name).model.layers[0].mlp.experts


def inputs(experts: Any, tokens: int = 9, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D], ids [T, K] without an expert twice, and weights [T, K]."""
    g = torch.Generator().manual_seed(4)
    n, width = experts.down_proj.shape[0], experts.down_proj.shape[2 if experts.is_transposed else 1]
    ids = torch.stack([torch.randperm(n, generator=g)[:top_k] for _ in range(tokens)])
    return torch.randn(tokens, width, generator=g), ids, torch.rand(tokens, top_k, generator=g)


def outputs(experts: Any, implementation: str, *given: torch.Tensor, call: Any = None) -> list[torch.Tensor]:
    """y, and the gradients of x, the routing weights and every parameter."""
    experts.config._experts_implementation = implementation
    x, ids, weights = given
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = (experts if call is None else call)(x, ids, weights)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, weights, *experts.parameters()], dy)]


@pytest.mark.parametrize("name", FAMILIES)
def test_in_one_compiled_graph(name: str) -> None:
    experts = experts_of(name)
    want = outputs(experts, "eager", *inputs(experts))
    register_experts()
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    got = outputs(experts, "gpt4_moe", *inputs(experts), call=compiled)
    assert max(rel(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed(name: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, op = build(name), [], ops.expert_mlp
    tokens = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(2))

    def gradients(experts: str) -> dict[str, torch.Tensor]:
        model.set_experts_implementation(experts)
        model.zero_grad()
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients("eager")
    register_experts()
    monkeypatch.setattr(ops, "expert_mlp", lambda *a, **k: calls.append(1) or op(*a, **k))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients("gpt4_moe")
    assert len(calls) == 4  # two layers, each run twice
    total = torch.stack([g.norm() for g in want.values()]).norm()
    assert got.keys() == want.keys()
    assert all((got[n] - g).norm() < 1e-5 * max(g.norm(), 1e-6 * total) for n, g in want.items())


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_with_either_kind_of_routing_weights(name: str, weights_dtype: torch.dtype) -> None:
    """Mixtral and Qwen3-MoE weigh in float32, gpt-oss in the model's dtype. Against the same numbers in float64."""
    experts = experts_of(name).bfloat16()
    x, ids, weights = inputs(experts)
    x, weights = x.bfloat16(), weights.to(weights_dtype)
    register_experts()
    got = outputs(experts, "gpt4_moe", x, ids, weights)
    assert [t.dtype for t in got[:3]] == [torch.bfloat16, torch.bfloat16, weights_dtype]
    want = outputs(experts.double(), "eager", x.double(), ids, weights.double())
    assert max(rel(a.double(), b) for a, b in zip(got, want, strict=True)) < 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_under_autocast(name: str) -> None:
    """Weights in float32, products in bfloat16."""
    experts = experts_of(name)
    given = inputs(experts)
    want = outputs(experts, "eager", *given)
    register_experts()
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(experts, "gpt4_moe", *given)
    assert got[0].dtype == torch.float32
    assert max(rel(a, b) for a, b in zip(got, want, strict=True)) < 2e-2


# ------------------------------------------------------------------------------------------------- every architecture


class Anything:
    """A configuration in which every size is small, and every activation SiLU."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        words = {"act": "silu", "alpha": 1.702, "limit": 7.0, "per_tok": 2, "experts": 4, "size": 16, "eps": 1e-5}
        return next((value for word, value in words.items() if word in name), 16)


def experts_classes() -> Iterator[type]:
    """Of every model in this release that dispatches its experts."""
    models = Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        if "@use_experts_implementation" in file.read_text(encoding="utf-8"):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            own = [kind for kind in vars(module).values() if getattr(kind, "__module__", "") == module.__name__]
            yield from (kind for kind in own if hasattr(kind, "_apply_gate"))


@pytest.mark.slow
def test_every_model_is_equal_or_refused() -> None:
    """A gate that computes something else under the names of one that we know would be a wrong result."""
    register_experts()
    equal, refused, not_built = [], [], []
    for kind in experts_classes():
        try:
            experts: Any = kind(Anything())
        except Exception as error:
            not_built.append(f"{kind.__name__}: {error}")
            continue
        g = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for p in experts.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        want = outputs(experts, "eager", *inputs(experts))
        try:
            got = outputs(experts, "gpt4_moe", *inputs(experts))
        except ValueError as error:
            refused.append(f"{kind.__name__}: {error}")
            continue
        assert max(rel(a, b) for a, b in zip(got, want, strict=True)) < 1e-5, kind.__name__
        equal.append(kind.__name__)
    print(f"equal: {equal}\nrefused: {refused}\nnot built: {not_built}")
    assert len(equal) >= 20
    assert {"MixtralExperts", "Qwen3MoeExperts", "OlmoeExperts", "GptOssExperts"} <= {*equal}
    assert len(not_built) <= 3
