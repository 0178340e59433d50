"""Our expert kernels inside Hugging Face's MoE models: one registered name, no copy of a weight.

transformers dispatches the experts of its MoE models through an interface; after `register_experts()`,
`experts_implementation="gpt4_moe"` runs `moe.kernels.ops.expert_mlp` there, forward and backward. What a release can do
is asked of its names and not of its number.
"""

import importlib.metadata
import inspect
from typing import Any

from torch import Tensor

from moe.kernels import ops

NAME = "gpt4_moe"
# The oldest transformers that the tests pass with; the extra `hf` of pyproject.toml promises the same.
OLDEST = "5.7"
# What a model's experts say of how their weights are stored.
_LAYOUT = ("is_concatenated", "is_transposed", "has_bias", "has_gate")


def register_experts(impl: str | None = None) -> None:
    """Add our op to transformers' ExpertsInterface under the name "gpt4_moe". Calling it again changes `impl`.

    Then `from_pretrained(..., experts_implementation="gpt4_moe")` or `model.set_experts_implementation("gpt4_moe")`
    runs Mixtral, Qwen3-MoE, OLMoE, gpt-oss and every other model whose experts have one of their layouts: gate and up
    in halves or in turns, stored as [out, in] or transposed, with or without biases.

    Args:
        impl: as in `moe.kernels.ops.expert_mlp`; None takes the fastest that is eligible.

    Raises:
        ImportError: transformers is missing, or its models do not say how their experts are stored.
    """
    try:
        from transformers.integrations import moe as theirs

        experts_functions = theirs.ALL_EXPERTS_FUNCTIONS
        told = inspect.signature(theirs.use_experts_implementation).parameters
    except (ImportError, AttributeError) as error:
        raise ImportError(_remedy()) from error
    if not told.keys() >= {*_LAYOUT}:
        raise ImportError(_remedy())

    def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, impl)

    experts_functions.register(NAME, forward)


def _remedy() -> str:
    try:
        found = f"{importlib.metadata.version('transformers')} is installed"
    except importlib.metadata.PackageNotFoundError:
        found = "none is installed"
    return (
        f"register_experts needs the interface for experts that transformers has from {OLDEST} on, and {found}: "
        f'pip install "transformers>={OLDEST}"'
    )


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, impl: str | None = None
) -> Tensor:
    """One layer of experts of a transformers model: hidden_states [T, D], ids and weights [T, K] -> [T, D].

    Raises:
        ValueError: an activation or a layout that our op does not know; the message names the module and it.
    """
    activation = _activation(module)
    w_in, b_in = (module.gate_up_proj, "gate_up_proj_bias") if module.has_gate else (module.up_proj, "up_proj_bias")
    w_out_EDF = module.down_proj.transpose(1, 2) if module.is_transposed else module.down_proj
    w_in_EJD = w_in.transpose(1, 2) if module.is_transposed else w_in
    b_in_EGF = b_out_ED = None
    if module.has_bias:
        b_in_EGF, b_out_ED = _gates(getattr(module, b_in), module).contiguous(), module.down_proj_bias
    # Ids past the last expert mark slots that another rank serves. A release whose modules do not say whether there are
    # other ranks may have such ids at any time.
    if getattr(module, "_is_expert_parallel", True):
        elsewhere_TK = top_k_index >= len(w_in)
        top_k_index = top_k_index.clamp(max=len(w_in) - 1)
        top_k_weights = top_k_weights.masked_fill(elsewhere_TK, 0)
    y_TD = ops.expert_mlp(
        hidden_states,
        _gates(w_in_EJD, module),
        w_out_EDF,
        top_k_weights,
        top_k_index,
        activation,
        impl,
        b_in_EGF=b_in_EGF,
        b_out_ED=b_out_ED,
    )
    return y_TD.to(hidden_states.dtype)


def _gates(t_EJ: Tensor, module: Any) -> Tensor:
    """[E, G*F, ...] -> a view [E, G, F, ...], from halves or from pairs."""
    if not module.has_gate:
        return t_EJ.unsqueeze(1)
    if module.is_concatenated:
        return t_EJ.unflatten(1, (2, -1))
    return t_EJ.unflatten(1, (-1, 2)).transpose(1, 2)


def _has_own_gate(module: Any) -> bool:
    """Whether it may do more than act(gate) * up. Asked as Dynamo of torch 2.11 can follow: not of a bound method."""
    return "_apply_gate" in module.__dict__ or type(module)._apply_gate.__name__ != "_default_apply_gate"


def _activation(module: Any) -> str:
    """Our name of the module's activation."""
    name, why = type(module).__name__, ""
    act = getattr(module, "act_fn", None)
    function = getattr(act, "__name__", type(act).__name__).lower()
    if getattr(module, "has_post_expert_norm", False):
        why = "a norm after each expert"
    elif hasattr(module, "alpha") and hasattr(module, "limit"):
        if (module.alpha, module.limit) == (1.702, 7.0):
            return "swiglu_oai"
        why = f"swiglu_alpha = {module.alpha}, swiglu_limit = {module.limit}, not 1.702 and 7"
    elif module.has_gate and _has_own_gate(module):
        why = "a gate function of its own"
    elif module.has_gate and function in ("silu", "siluactivation"):
        return "swiglu"
    elif not module.has_gate and function in ("gelutanh", "newgeluactivation"):
        return "gelu"
    else:
        why = f"the activation {function}" + (" with a gate" if module.has_gate else "")
    raise ValueError(f'experts_implementation = "{NAME}": {name} has {why}; use "grouped_mm" for this model')
