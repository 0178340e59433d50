"""Expert weights in eight bits: half the bytes of bfloat16 to read for a token, and to keep.

Shape suffixes as in reference.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.experts import reference
from moe.kernels.quantization import quantize


class QuantizedExperts(NamedTuple):
    """The weights of `ops.expert_mlp` in eight bits, one float32 scale for each output channel."""

    w_in_EGFD: Tensor  # int8 or float8_e4m3fn, contiguous
    s_in_EGF: Tensor
    w_out_EDF: Tensor
    s_out_ED: Tensor

    def of(self, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One expert's weights as they were, about: w_in [G, F, D] and w_out [D, F]."""
        w_in_GFD = self.w_in_EGFD[e].to(dtype) * self.s_in_EGF[e].to(dtype).unsqueeze(-1)
        return w_in_GFD, self.w_out_EDF[e].to(dtype) * self.s_out_ED[e].to(dtype).unsqueeze(-1)


def quantize_experts(w_in_EGFD: Tensor, w_out_EDF: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedExperts:
    """Round expert weights to eight bits, an expert at a time: what is needed besides is one expert in float32.

    Args:
        w_in_EGFD: [E, G, F, D] floating point.
        w_out_EDF: [E, D, F].
        dtype: torch.int8 or torch.float8_e4m3fn; see `quantize` for how far they are off.

    Raises:
        ValueError: another dtype, or weights that are not finite; the message names the expert.
    """
    made = QuantizedExperts(
        torch.empty(w_in_EGFD.shape, dtype=dtype, device=w_in_EGFD.device),
        w_in_EGFD.new_empty(w_in_EGFD.shape[:-1], dtype=torch.float32),
        torch.empty(w_out_EDF.shape, dtype=dtype, device=w_out_EDF.device),
        w_out_EDF.new_empty(w_out_EDF.shape[:-1], dtype=torch.float32),
    )
    for e in range(len(w_in_EGFD)):
        made.w_in_EGFD[e], made.s_in_EGF[e] = quantize(w_in_EGFD[e], dtype)
        made.w_out_EDF[e], made.s_out_ED[e] = quantize(w_out_EDF[e], dtype)
        if not (made.s_in_EGF[e].isfinite().all() and made.s_out_ED[e].isfinite().all()):
            raise ValueError(f"the weights of expert {e} are not all finite: they have no scale")
    return made


def expert_mlp(x_TD: Tensor, experts: QuantizedExperts, weights_TK: Tensor, ids_TK: Tensor, activation: str) -> Tensor:
    """As reference.expert_mlp, in at least float32 throughout; reads the experts that are chosen, one at a time."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=wide)
    for e in range(len(experts.w_in_EGFD)):
        token, slot = (ids_TK == e).nonzero(as_tuple=True)
        if len(token):
            w_in_GFD, w_out_DF = experts.of(e, wide)
            y = reference.expert_mlp(
                x_TD[token].to(wide), w_in_GFD[None], w_out_DF[None], weights_TK[token, slot, None].to(wide),
                torch.zeros_like(token).unsqueeze(1), activation,
            )  # fmt: skip
            y_TD.index_add_(0, token, y)
    return y_TD.to(x_TD.dtype)
