"""What the C kernels read: weights in panels, and the structures that name them (products.h, attention.h, pass.c).

Shape suffixes: E experts, O outputs, I inputs, P panels, R outputs of a panel, W = R/2 floats of a vector, G gate/up, F
expert hidden width, D model width.
"""

import ctypes
from ctypes import POINTER, c_double, c_int32, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.cpu.library import library
from moe.kernels.quantization import quantize

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
ACTIVATIONS = {"swiglu": 2, "gelu": 3}
# Units for bfloat16 take so many inputs at a time, and no panel has more outputs.
_UNIT = 32


class Weight(ctypes.Structure):
    """Panels of a weight, or of one of each expert; it keeps them alive."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("kind", c_int64),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("panels", c_int64),
    )

    @classmethod
    def of(cls, w_OI: Tensor) -> "Weight":
        """Of a product x @ w.T; a copy. Or [E, O, I]."""
        w_EOI = w_OI.detach().unsqueeze(0) if w_OI.ndim == 2 else w_OI.detach()
        return cls._made(_pad(w_EOI, 1, library().panel), w_EOI.shape[1], None)

    @classmethod
    def up(cls, w_EGFD: Tensor, quantized: bool) -> "Weight":
        """The first product of an MLP; of a gated one, a panel has W gates and then what they are multiplied with."""
        w_EGFD, scale_EGF = _quantized(w_EGFD.detach(), quantized)
        # The outputs are the second product's inputs, padding and all.
        w_EGFD = _pad(w_EGFD, 2, _UNIT)
        scale_EO = None if scale_EGF is None else _interleaved(_pad(scale_EGF, 2, _UNIT))
        return cls._made(_interleaved(w_EGFD), w_EGFD.shape[1] * w_EGFD.shape[2], scale_EO)

    @classmethod
    def down(cls, w_EDF: Tensor, quantized: bool) -> "Weight":
        """The second product of an MLP."""
        w_EDF, scale_ED = _quantized(w_EDF.detach(), quantized)
        D, width = w_EDF.shape[1], library().panel
        return cls._made(_pad(w_EDF, 1, width), D, None if scale_ED is None else _pad(scale_ED, 1, width))

    @classmethod
    def _made(cls, w_EOI: Tensor, outputs: int, scale_EO: Tensor | None) -> "Weight":
        (E, rows, inputs), R = w_EOI.shape, library().panel
        panels = rows // R
        if w_EOI.dtype == torch.bfloat16:
            data = _pad(w_EOI, 2, _UNIT).view(E, panels, R, -1, 2).permute(0, 1, 3, 2, 4).contiguous()
        else:
            data = w_EOI.view(E, panels, R, inputs).transpose(2, 3).contiguous()
        scale = None if scale_EO is None else scale_EO.float().contiguous()
        made = cls(
            data.data_ptr(), None if scale is None else scale.data_ptr(), KINDS[data.dtype], outputs, inputs, panels
        )
        made.alive = data, scale
        return made


def _pad(x: Tensor, dim: int, to: int) -> Tensor:
    missing = -x.shape[dim] % to
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x


def _quantized(w: Tensor, quantized: bool) -> tuple[Tensor, Tensor | None]:
    return quantize(w) if quantized else (w, None)


def _interleaved(w_EGF: Tensor) -> Tensor:
    """[E, G, F, ...] -> [E, G*F, ...], of two gates W of the one after W of the other."""
    E, G, F_ = w_EGF.shape[:3]
    W = library().panel // 2
    return w_EGF.reshape(E, G, F_ // W, W, -1).transpose(1, 2).reshape(E, G * F_, *w_EGF.shape[3:])


def structure(name: str, fields: dict[str, Any]) -> type[ctypes.Structure]:
    """A C structure by its fields, in order."""
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


Segment: Any = structure("Segment", {name: c_int32 for name in ("row", "rows", "start", "block")})
Cache: Any = structure("Cache", {name: c_void_p for name in ("keys", "values", "key_scales", "value_scales")})
Layer: Any = structure(
    "Layer",
    {name: c_void_p for name in ("attention_norm_D", "mlp_norm_D", "bias_E")}
    | {name: Weight for name in ("qkv", "wo", "router", "up", "down")}
    | {name: c_int64 for name in ("experts", "chosen", "activation")},
)
Model: Any = structure(
    "Model",
    {"layers": POINTER(Layer)}
    | {name: c_int64 for name in ("n_layers", "d_model", "heads", "kv_heads", "width", "vocabulary")}
    | {"embedding_VD": c_void_p, "embedding_kind": c_int64, "norm_D": c_void_p, "head": Weight}
    | {"cos": c_void_p, "sin": c_void_p, "eps": c_double, "caches": POINTER(Cache)}
    | {"cache_kind": c_int64, "block_size": c_int64},
)
Pass: Any = structure(
    "Pass",
    {name: c_int64 for name in ("tokens", "segments", "wanted", "threads")}
    | {"ids_T": c_void_p, "segments_Q": POINTER(Segment)}
    | {name: c_void_p for name in ("blocks", "wanted_N", "logits_NV", "chosen_LTK", "weights_LTK", "memory")},
)
