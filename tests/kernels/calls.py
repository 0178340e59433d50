"""Arguments of the ops and ways to call them, for the tests of both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.kernels import ops
from moe.kernels.experts import lora

T, E, K, D, F, V = 5, 4, 2, 8, 16, 11
GATES, EXPERTS, LOSSES = ["reference", "triton"], ["reference", "grouped", "triton"], ["torch", "triton"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(tokens: int = T, top_k: int = K, **changes: Any) -> dict[str, Any]:
    ids = torch.rand(tokens, E, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :top_k]
    w_in, w_out = normal(E, 2, F, D, seed=2) / 3, normal(E, D, F, seed=3) / 4
    given = {"x_TD": normal(tokens, D), "w_in_EGFD": w_in, "w_out_EDF": w_out}
    return {**given, "weights_TK": normal(tokens, top_k, seed=4).softmax(-1), "ids_TK": ids, **changes}


def loss(tokens: int = T, **changes: Any) -> dict[str, Any]:
    targets = torch.randint(V, (tokens,), generator=torch.Generator().manual_seed(5))
    return {"x_TD": normal(tokens, D), "w_VD": normal(V, D, seed=6), "targets_T": targets, **changes}


def adapters(E: int = E) -> lora.Adapters:
    shapes = ((E, 3, D), (E, 2, F, 3), (E, 3, F), (E, D, 3))
    return lora.Adapters(*(normal(*shape, seed=7) / 3 for shape in shapes))


def with_adapters(**given: Any) -> Tensor:
    weights = given["w_in_EGFD"], given["w_out_EDF"]
    given_to = given.get("adapters") or adapters()
    return lora.expert_mlp(given["x_TD"], *weights, given_to, 0.5, given["weights_TK"], given["ids_TK"], "swiglu")


def inference(**given: Any) -> Tensor:
    return ops.expert_mlp_inference(**given, activation="swiglu")


# All that compute the routed expert MLP.
MLPS: dict[str, Callable[..., Tensor]] = {
    **{impl: lambda impl=impl, **given: ops.expert_mlp(**given, impl=impl) for impl in EXPERTS},
    "adapters": with_adapters,
    "inference": inference,
    "forward": lambda **given: ops.expert_mlp_forward(**given, activation="swiglu")[0],
}


def eager(call: Callable[..., Any], *tensors: Tensor) -> Any:
    return call(*tensors)


def compiled(call: Callable[..., Any], *tensors: Tensor) -> Any:
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)


def faked(call: Callable[..., Any], *tensors: Tensor) -> Any:
    with FakeTensorMode() as mode:
        return call(*(mode.from_tensor(t) for t in tensors))


def on_meta(call: Callable[..., Any], *tensors: Tensor) -> Any:
    return call(*(t.to("meta") for t in tensors))


WITHOUT_VALUES = [faked, on_meta]
