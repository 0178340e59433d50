"""Products with weights that stay as they are, in the form in which this device multiplies them fastest.

On a CPU a pass of few tokens is a matter of reading each weight once. torch's ordinary product of two to eight rows
reads it about twice (it is packed anew in every call), and its rows are too few for the blocks that it works in; oneDNN
packs a weight once, when it is told for how many rows. In int8 there is a quarter to read.

Shape suffixes: T tokens, I inputs, O outputs, D model width, E experts, K experts of a token, R = T*K routed rows, F
expert hidden width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.experts import Experts
from moe.kernels import ops
from moe.kernels.experts.grouped import combine, inverse

# Rows that a weight is packed for. From 1 to 256 rows a weight packed for 16 lost to one packed for the very number
# nowhere by more than a tenth, and one packed for 1 was up to twice as slow (float32, AVX2).
PACKED_ROWS = 16
# Up to so many rows int8 weights are multiplied as they are; of more, taking them to float32 first is faster.
INT8_ROWS = 12

Multiply = Callable[[Tensor], Tensor]


def product(w_OI: Tensor, tile: int = 0) -> Multiply:
    """x [T, I] -> x @ w.T [T, O], in x's dtype, which is w's.

    Holds a copy of the weight on a CPU (but in float64): what is done to the weight afterwards goes unseen.

    Args:
        tile: rows that are multiplied at a time, always as many: then a row's bits do not depend on the others. 0: all.
    """
    dtype, multiply = w_OI.dtype, None
    if w_OI.device.type == "cpu" and torch.backends.mkldnn.is_available():
        computed = _computed_in(dtype)
        if computed is not None:
            multiply = _packed(w_OI.to(computed), dtype)
    if multiply is None:
        w_IO = w_OI.t().contiguous() if w_OI.device.type == "cpu" else w_OI.t()

        def multiply(x_TI: Tensor) -> Tensor:
            return torch.mm(x_TI, w_IO)

    return _in_tiles(multiply, tile)


def int8_product(w_OI: Tensor, scale_O: Tensor, tile: int = 0) -> Multiply:
    """x [T, I] -> x @ (w * scale).T [T, O], on a CPU, in x's dtype; of few rows x is rounded to bfloat16.

    Args:
        w_OI: int8. scale_O: float32.
        tile: as `product`'s.
    """
    multiply_few, scale_bf16_O = torch.ops.aten._weight_int8pack_mm.default, scale_O.bfloat16()

    def multiply(x_TI: Tensor) -> Tensor:
        if tile or len(x_TI) <= INT8_ROWS:
            return multiply_few(x_TI.bfloat16(), w_OI, scale_bf16_O).to(x_TI.dtype)
        y_TO = torch.mm(x_TI.float(), w_OI.float().t())
        return y_TO.mul_(scale_O).to(x_TI.dtype)

    return _in_tiles(multiply, tile)


def _computed_in(dtype: torch.dtype) -> torch.dtype | None:
    """What oneDNN shall multiply on this processor; None where it cannot.

    Without units for narrow numbers float32 is several times faster, and more exact.
    """
    mkldnn = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return dtype if mkldnn._is_mkldnn_bf16_supported() else torch.float32
    if dtype == torch.float16:
        return dtype if mkldnn._is_mkldnn_fp16_supported() else torch.float32
    return dtype if dtype == torch.float32 else None


def _packed(w_OI: Tensor, dtype: torch.dtype) -> Multiply:
    packed = torch.ops.mkldnn._reorder_linear_weight.default(w_OI.detach().contiguous(), PACKED_ROWS)
    linear = torch.ops.mkldnn._linear_pointwise.default
    if w_OI.dtype == dtype:
        return lambda x_TI: linear(x_TI, packed, None, "none", [], "")
    return lambda x_TI: linear(x_TI.to(w_OI.dtype), packed, None, "none", [], "").to(dtype)


def _in_tiles(multiply: Multiply, tile: int) -> Multiply:
    if not tile:
        return multiply

    def tiled(x_TI: Tensor) -> Tensor:
        T = len(x_TI)
        rows = -(-T // tile) * tile
        # New memory, so that every tile begins where a new tensor does: libraries choose by alignment, too.
        padded_TI = x_TI.new_zeros(rows, x_TI.shape[1])
        padded_TI[:T] = x_TI
        return torch.cat([multiply(part.clone()) for part in padded_TI.split(tile)])[:T]

    return tiled


# ---------------------------------------------------------------------------------------------------------- experts


class CpuExperts:
    """The routed expert MLP of a layer on a CPU, without autograd: every expert that is chosen is read once.

    Args:
        quantization: "int8", or None for the weights as they are.
        tile: as `product`'s.
    """

    def __init__(self, experts: Experts, quantization: str | None = None, tile: int = 0) -> None:
        self.activation, self.tile = experts.activation, tile
        w_in_EGFD, w_out_EDF = experts.w_in_EGFD.detach(), experts.w_out_EDF.detach()
        self.gates = w_in_EGFD.shape[1]
        if quantization is None:
            self.up = [product(w.flatten(0, 1), tile) for w in w_in_EGFD]
            self.down = [product(w, tile) for w in w_out_EDF]
            return
        q = ops.quantize_experts(w_in_EGFD, w_out_EDF, torch.int8)
        self.up = [
            int8_product(w.flatten(0, 1), s.flatten(), tile) for w, s in zip(q.w_in_EGFD, q.s_in_EGF, strict=True)
        ]
        self.down = [int8_product(w, s, tile) for w, s in zip(q.w_out_EDF, q.s_out_ED, strict=True)]

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """-> y [T, D] in the dtype of x."""
        T, K = ids_TK.shape
        if T == 1 and not self.tile:
            ids = ids_TK[0].tolist()
            y_KD = self._mlps(ids, [x_TD] * K)
            return torch.mm(weights_TK.to(y_KD.dtype), y_KD)
        ids_R = ids_TK.flatten()
        order_R = ids_R.sort(stable=True).indices
        counts = torch.bincount(ids_R, minlength=len(self.up)).tolist()
        x_RD = x_TD.index_select(0, order_R // K)
        touched = [e for e, n in enumerate(counts) if n]
        y_RD = self._mlps(touched, x_RD.split([counts[e] for e in touched]))
        return combine(y_RD, inverse(order_R), K, weights_TK)

    def _mlps(self, experts: list[int], parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """Each expert of its part, one after the other."""
        if sum(map(len, parts)) > PACKED_ROWS * len(parts):
            # Of many rows an expert's pre-activations are best used while they are in the processor's cache.
            return torch.cat([self.down[e](self._activate(self.up[e](x))) for e, x in zip(experts, parts, strict=True)])
        act_RF = self._activate(torch.cat([self.up[e](x) for e, x in zip(experts, parts, strict=True)]))
        acts = act_RF.split([len(x) for x in parts])
        return torch.cat([self.down[e](a) for e, a in zip(experts, acts, strict=True)])

    def _activate(self, h_RH: Tensor) -> Tensor:
        h_RGF = h_RH.unflatten(1, (self.gates, -1))
        if self.activation != "swiglu":
            return ops.activate(h_RGF, self.activation)
        return F.silu(h_RGF[:, 0]).mul_(h_RGF[:, 1])
