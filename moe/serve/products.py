"""Products with weights that stay as they are, in the form in which this device multiplies them fastest.

On a CPU a pass of few tokens is a matter of reading each weight once. torch's ordinary product of two to eight rows
reads it about twice (it is packed anew in every call), and its rows are too few for the blocks that it works in; oneDNN
packs a weight once, when it is told for how many rows. In int8 there is a quarter to read.

Shape suffixes: T tokens, I inputs, O outputs, D model width, E experts, K experts of a token, R = T*K routed rows, F
expert hidden width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.experts import Experts
from moe.kernels import ops
from moe.kernels.experts.grouped import combine, inverse
from moe.kernels.spans import span
from moe.layers import cast

# Rows that a weight is packed for. From 1 to 256 rows a weight packed for 16 lost to one packed for the very number
# nowhere by more than a tenth, and one packed for 1 was up to twice as slow (float32, AVX2).
PACKED_ROWS = 16
# Weights of up to so many bytes are not packed: they are in the processor's cache, and oneDNN takes longer to start.
SMALL = 2**19
# So many products of several rows a weight waits before it is packed.
PATIENCE = 4
# Up to so many rows a product with an expert's weight on the left, which reads it once where it is, is faster than with
# one that is packed: of weights of at most a MiB, and of larger ones (float32, AVX2).
FEW_ROWS, FEW_ROWS_LARGE = 5, 3
# Up to so many rows int8 weights are multiplied as they are; of more, taking them to float32 first is faster.
INT8_ROWS = 12
# Up to so many rows Python sorts them sooner than four operations of torch are started.
SORTED_IN_PYTHON = 256

Multiply = Callable[[Tensor], Tensor]


def product(w_OI: Tensor, tile: int = 0) -> Multiply:
    """x [T, I] -> x @ w.T [T, O], in x's dtype, which is w's.

    On a CPU it holds a copy of the weight: what is done to the weight afterwards goes unseen.

    Args:
        tile: rows that are multiplied at a time, always as many: then a row's bits do not depend on the others. 0: all.
    """
    if w_OI.device.type != "cpu":
        w_IO = w_OI.detach().t()
        return _in_tiles(lambda x_TI: torch.mm(x_TI, w_IO), tile)
    if tile:
        return _in_tiles(packed(w_OI) or _transposed(w_OI), tile)
    return _Patient(w_OI)


class _Patient:
    """Packs its weight once it is sure to be used often: packing takes as long as some products."""

    def __init__(self, w_OI: Tensor) -> None:
        self._w_OI, self._multiply = w_OI.detach(), _transposed(w_OI)
        self._left = PATIENCE

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self._left and len(x_TI) > 1:  # a product of one row gains little
            self._left -= 1
            if not self._left and self._w_OI.nbytes > SMALL:
                self._multiply = packed(self._w_OI) or self._multiply
        return self._multiply(x_TI)


class _OfFew:
    """A product that mostly has few rows; the weight is packed when more come."""

    def __init__(self, w_OI: Tensor) -> None:
        few = FEW_ROWS if w_OI.nbytes <= 2**20 else FEW_ROWS_LARGE
        self._w_OI, self._few = w_OI, few if w_OI.dtype in (torch.float32, torch.float64) else 0
        self._packed: Multiply | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        if len(x_TI) <= self._few:
            if len(x_TI) == 1:  # which is computed twice: a matrix times a vector is slower, and has one thread
                return torch.mm(self._w_OI, torch.cat((x_TI, x_TI)).t())[:, :1].t()
            return torch.mm(self._w_OI, x_TI.t()).t()
        if self._packed is None:
            self._packed = packed(self._w_OI) or _transposed(self._w_OI)
        return self._packed(x_TI)


def _transposed(w_OI: Tensor) -> Multiply:
    w_IO = w_OI.detach().t().contiguous()
    return lambda x_TI: torch.mm(x_TI, w_IO)


def packed(w_OI: Tensor) -> Multiply | None:
    """The product with a weight on a CPU, packed for few rows; None where oneDNN is missing or cannot."""
    computed = _computed_in(w_OI.dtype) if torch.backends.mkldnn.is_available() else None
    return None if computed is None else _packed(w_OI.detach().to(computed), w_OI.dtype)


def int8_product(w_OI: Tensor, scale_O: Tensor, tile: int = 0) -> Multiply:
    """x [T, I] -> x @ (w * scale).T [T, O], on a CPU, in x's dtype; of few rows x is rounded to bfloat16.

    Args:
        w_OI: int8. scale_O: float32.
        tile: as `product`'s.
    """
    multiply_few, scale_bf16_O = torch.ops.aten._weight_int8pack_mm.default, scale_O.bfloat16()
    # Of the last inputs the kernel reads 16, whether they are there or not.
    missing = -w_OI.shape[1] % 16
    w_OI = F.pad(w_OI, (0, missing))

    def multiply(x_TI: Tensor) -> Tensor:
        if missing:
            x_TI = F.pad(x_TI, (0, missing))
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
    w = torch.ops.mkldnn._reorder_linear_weight.default(w_OI.contiguous(), PACKED_ROWS)
    linear = torch.ops.mkldnn._linear_pointwise.default
    if w_OI.dtype == dtype:
        return lambda x_TI: linear(x_TI, w, None, "none", [], "")
    return lambda x_TI: linear(x_TI.to(w_OI.dtype), w, None, "none", [], "").to(dtype)


def _in_tiles(multiply: Multiply, tile: int) -> Multiply:
    if not tile:
        return multiply

    def tiled(x_TI: Tensor) -> Tensor:
        T, width = x_TI.shape
        rows = -(-T // tile) * tile
        padded_TI = x_TI.new_zeros(rows, width)
        padded_TI[:T] = x_TI
        if rows == tile:
            return multiply(padded_TI)[:T]
        parts = padded_TI.split(tile)
        if tile * width * x_TI.itemsize % 64:
            # Every tile begins where a new tensor does: libraries choose by alignment, too.
            parts = [part.clone() for part in parts]
        return torch.cat([multiply(part) for part in parts])[:T]

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
        self.weights = experts.w_in_EGFD.detach(), experts.w_out_EDF.detach()
        self.n_experts, self.gates = self.weights[0].shape[:2]
        self.up: dict[int, Multiply] = {}
        self.down: dict[int, Multiply] = {}
        self.patience = PATIENCE
        if tile or quantization:
            self.patience = 0
        if quantization is not None:
            data = ops.quantize_experts(*self.weights, torch.int8)
            for e in range(self.n_experts):
                up = data.w_in_EGFD[e].flatten(0, 1), data.s_in_EGF[e].flatten()
                self.up[e] = int8_product(*up, tile)
                self.down[e] = int8_product(data.w_out_EDF[e], data.s_out_ED[e], tile)

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """-> y [T, D] in the dtype of x."""
        T, K = ids_TK.shape
        if self.patience:
            # One token has each expert's weights to read once in any way.
            self.patience -= T > 1
            return ops.expert_mlp_inference(x_TD, *self.weights, weights_TK, ids_TK, self.activation)
        if T == 1 and not self.tile:
            y_KD = self._mlps(ids_TK[0].tolist(), [x_TD] * K)
            with span("combine"):
                wide = torch.promote_types(weights_TK.dtype, y_KD.dtype)
                return cast(torch.mm(cast(weights_TK, wide), cast(y_KD, wide)), x_TD.dtype)
        with span("permute"):
            order_R, rows_R, counts = _by_expert(ids_TK, self.n_experts)
            touched = [e for e, n in enumerate(counts) if n]
            parts = x_TD.index_select(0, order_R // K).split([counts[e] for e in touched])
        y_RD = self._mlps(touched, parts)
        with span("combine"):
            return combine(y_RD, rows_R, K, weights_TK)

    def _mlps(self, experts: list[int], parts: Sequence[Tensor]) -> Tensor:
        """Each expert of its part, one after the other."""
        for e in experts:
            if e not in self.up:
                self.up[e], self.down[e] = self._made(e)
        if sum(map(len, parts)) > PACKED_ROWS * len(parts):
            # Of many rows an expert's pre-activations are best used while they are in the processor's cache.
            with span("up"):
                return torch.cat(
                    [self.down[e](self._activate(self.up[e](x))) for e, x in zip(experts, parts, strict=True)]
                )
        with span("up"):
            act_RF = self._activate(torch.cat([self.up[e](x) for e, x in zip(experts, parts, strict=True)]))
            acts = act_RF.split([len(x) for x in parts])
        with span("down"):
            return torch.cat([self.down[e](a) for e, a in zip(experts, acts, strict=True)])

    def _made(self, e: int) -> tuple[Multiply, Multiply]:
        up, down = self.weights[0][e].flatten(0, 1), self.weights[1][e]
        return (product(up, self.tile), product(down, self.tile)) if self.tile else (_OfFew(up), _OfFew(down))

    def _activate(self, h_RH: Tensor) -> Tensor:
        h_RGF = h_RH.unflatten(1, (self.gates, -1))
        if self.activation != "swiglu":
            return ops.activate(h_RGF, self.activation)
        return F.silu(h_RGF[:, 0]).mul_(h_RGF[:, 1])


def _by_expert(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sorted row -> flat (token, slot), its inverse, and the rows of each expert."""
    ids_R = ids_TK.flatten()
    if len(ids_R) > SORTED_IN_PYTHON:
        order_R = ids_R.sort(stable=True).indices
        return order_R, inverse(order_R), torch.bincount(ids_R, minlength=n_experts).tolist()
    ids, counts = ids_R.tolist(), [0] * n_experts
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rows = [0] * len(ids)
    for row, at in enumerate(order):
        counts[ids[at]] += 1
        rows[at] = row
    order_R, rows_R = torch.tensor([order, rows])
    return order_R, rows_R, counts
