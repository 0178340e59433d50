"""The expert MLP in plain torch: the specification, the path for any device and dtype, the tests' oracle.

Nothing here is fast and nothing here is clever. Autograd differentiates all of it, in float64 too; that is what the
tests hold the other implementations, and the one backward written out here, against.

Shape suffixes: T tokens, D model width, E experts, K experts per token (top-k), R = T*K routed rows, G gate/up
(2 when gated, else 1), F expert hidden width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"swiglu": 2, "gelu": 1, "swiglu_oai": 2}  # name -> G, the number of F-wide input projections


def check_activation(activation: str) -> None:
    """Raises ValueError unless it is the name of one."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(ACTIVATIONS)}")


def activate(h_RGF: Tensor, activation: str) -> Tensor:
    """The expert's nonlinearity: silu(gate) * up for "swiglu" (G = 2), tanh-form GELU for "gelu" (G = 1); [..., G, F].

    "swiglu_oai" (G = 2) is gpt-oss's: both clamped at 7, sigmoid slope 1.702, and up + 1 (OpenAI 2025, gpt-oss model
    card, section 2).

    Raises:
        ValueError: another activation, or another G than it has.
    """
    check_activation(activation)
    if h_RGF.shape[-2] != ACTIVATIONS[activation]:
        raise ValueError(f"h has G = {h_RGF.shape[-2]}, but {activation} needs G = {ACTIVATIONS[activation]}")
    if activation == "swiglu":
        return F.silu(h_RGF[..., 0, :]) * h_RGF[..., 1, :]
    if activation == "swiglu_oai":
        gate_RF, up_RF = h_RGF[..., 0, :].clamp(max=7.0), h_RGF[..., 1, :].clamp(-7.0, 7.0)
        return gate_RF * torch.sigmoid(1.702 * gate_RF) * (up_RF + 1)
    return F.gelu(h_RGF[..., 0, :], approximate="tanh")


def expert_mlp(
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str,
    b_in_EGF: Tensor | None = None,
    b_out_ED: Tensor | None = None,
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * MLP_{ids[t, k]}(x[t]), accumulated in at least float32."""
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for e in range(len(w_in_EGFD)):
        token, slot = (ids_TK == e).nonzero(as_tuple=True)
        y = _mlp(e, x_TD[token], w_in_EGFD, w_out_EDF, activation, b_in_EGF, b_out_ED)
        y_TD = y_TD.index_add(0, token, (weights_TK[token, slot, None] * y).to(y_TD.dtype))
    return y_TD.to(x_TD.dtype)


def expert_mlp_everywhere(
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str,
    b_in_EGF: Tensor | None = None,
    b_out_ED: Tensor | None = None,
) -> Tensor:
    """As `expert_mlp`, every expert for every token: no shape depends on ids, as vmap and forward mode want it."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for e in range(len(w_in_EGFD)):
        y = _mlp(e, x_TD, w_in_EGFD, w_out_EDF, activation, b_in_EGF, b_out_ED)
        here_TK = ids_TK == e
        part = (weights_TK * here_TK).sum(1, keepdim=True) * y
        y_TD = y_TD + torch.where(here_TK.any(1, keepdim=True), part, 0.0).to(y_TD.dtype)
    return y_TD.to(x_TD.dtype)


def _mlp(
    e: int,
    x_RD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    activation: str,
    b_in_EGF: Tensor | None,
    b_out_ED: Tensor | None,
) -> Tensor:
    """Expert e of the rows it serves, [R, D]."""
    h_RGF = _pre_activations(x_RD, w_in_EGFD[e], None if b_in_EGF is None else b_in_EGF[e])
    return F.linear(activate(h_RGF, activation), w_out_EDF[e], None if b_out_ED is None else b_out_ED[e])


def _pre_activations(x_RD: Tensor, w_GFD: Tensor, b_GF: Tensor | None) -> Tensor:
    """One expert's h, [R, G, F]."""
    h_RGF = F.linear(x_RD, w_GFD.flatten(0, 1)).unflatten(-1, w_GFD.shape[:2])
    return h_RGF if b_GF is None else h_RGF + b_GF


def expert_mlp_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    activation: str,
    b_in_EGF: Tensor | None = None,
    b_out_ED: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, w_in, w_out, weights and the biases, written out (inside a custom op autograd is out of
    reach)."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    dx_TD = x_TD.new_zeros(x_TD.shape, dtype=wide)
    dw_in_EGFD, dw_out_EDF = w_in_EGFD.new_zeros(w_in_EGFD.shape), w_out_EDF.new_zeros(w_out_EDF.shape)
    dweights_TK = weights_TK.new_zeros(weights_TK.shape)
    db_in_EGF = None if b_in_EGF is None else torch.zeros_like(b_in_EGF)
    db_out_ED = None if b_out_ED is None else torch.zeros_like(b_out_ED)
    for e in range(len(w_in_EGFD)):
        token, slot = (ids_TK == e).nonzero(as_tuple=True)
        x, dy, w = x_TD[token], dy_TD[token], weights_TK[token, slot, None].to(x_TD.dtype)
        h = _pre_activations(x, w_in_EGFD[e], None if b_in_EGF is None else b_in_EGF[e])
        a = activate(h, activation)
        da = dy @ w_out_EDF[e]
        dw = (da * a).sum(-1)
        if b_out_ED is not None and db_out_ED is not None:
            dw = dw + dy @ b_out_ED[e]
            db_out_ED[e] = (w * dy).sum(0)
        dweights_TK[token, slot] = dw.to(weights_TK.dtype)
        dh_RGF = activate_backward(h, w * da, activation)
        if db_in_EGF is not None:
            db_in_EGF[e] = dh_RGF.sum(0)
        dh = dh_RGF.flatten(1)
        dw_out_EDF[e] = dy.t() @ (w * a)
        dw_in_EGFD[e] = (dh.t() @ x).view_as(dw_in_EGFD[e])
        dx_TD.index_add_(0, token, (dh @ w_in_EGFD[e].flatten(0, 1)).to(wide))
    return dx_TD.to(x_TD.dtype), dw_in_EGFD, dw_out_EDF, dweights_TK, db_in_EGF, db_out_ED


def activate_backward(h_RGF: Tensor, da_RF: Tensor, activation: str) -> Tensor:
    """The gradient of h, given that of activate(h)."""
    gate_RF = h_RGF[:, 0]
    if activation == "swiglu":
        s_RF = gate_RF.sigmoid()
        dgate_RF = da_RF * h_RGF[:, 1] * s_RF * (1 + gate_RF * (1 - s_RF))
        return torch.stack([dgate_RF, da_RF * gate_RF * s_RF], 1)
    if activation == "swiglu_oai":
        gate, up = gate_RF.clamp(max=7.0), h_RGF[:, 1].clamp(-7.0, 7.0)
        s_RF = torch.sigmoid(1.702 * gate)
        dgate_RF = da_RF * (up + 1) * s_RF * (1 + 1.702 * gate * (1 - s_RF))
        dup_RF = da_RF * gate * s_RF
        return torch.stack([dgate_RF * (gate_RF <= 7), dup_RF * (h_RGF[:, 1].abs() <= 7)], 1)
    c = math.sqrt(2 / math.pi)  # gelu(x) = x/2 (1 + tanh(c (x + 0.044715 x^3)))
    t_RF = torch.tanh(c * (gate_RF + 0.044715 * gate_RF**3))
    slope_RF = (1 + t_RF) / 2 + gate_RF / 2 * (1 - t_RF**2) * c * (1 + 3 * 0.044715 * gate_RF**2)
    return (da_RF * slope_RF).unsqueeze(1)
