"""The expert MLP without a backward: of few tokens or many, of weights as trained or in eight bits.

Shape suffixes as in reference.py.
"""

import torch
from torch import Tensor

from moe.kernels.arguments import check_ids, on_device_of
from moe.kernels.experts import quantized
from moe.kernels.experts.quantized import QuantizedExperts


def forward(
    x: Tensor,
    w_in: Tensor,
    s_in: Tensor | None,
    w_out: Tensor,
    s_out: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    impl: str,
    batch_invariant: bool,
) -> Tensor:
    """y [T, D]; `impl` is "triton", or "reference" for weights with scales."""
    if impl != "triton" or ids.device.type == "cpu":  # elsewhere its kernels assert as much
        check_ids(ids, len(w_in), "ids")
    if impl == "reference":
        assert s_in is not None
        assert s_out is not None
        return quantized.expert_mlp(x, QuantizedExperts(w_in, s_in, w_out, s_out), weights, ids, activation)
    from moe.kernels.experts import triton_few, triton_mlp
    from moe.kernels.experts.triton_pointer import Experts

    experts = Experts(w_in, w_out, s_in_EGF=s_in, s_out_ED=s_out)
    with on_device_of(x):
        if batch_invariant or triton_few.fits(experts, len(x)):
            return triton_few.forward(x, experts, weights, ids, activation, batch_invariant)
        return triton_mlp.forward(x, experts, weights, ids, activation, False)[0]


expert_mlp_inference = torch.library.custom_op("gpt4_moe::expert_mlp_inference", forward, mutates_args=())


@expert_mlp_inference.register_fake
def _(x, w_in, s_in, w_out, s_out, weights, ids, activation, impl, batch_invariant):
    return x.new_empty(x.shape)
