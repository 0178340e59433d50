"""The expert MLP on torch's grouped product over rows sorted by expert: forward and hand-written backward.

The group offsets stay on the device: there is no host sync. Saved for the backward: the pre-activations and the sort,
nothing else; where the pre-activations given to the backward are empty, it computes them again, to the same bits.

Shape suffixes as in reference.py; rows of R are sorted by expert, and within an expert by token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.experts import reference
from moe.kernels.spans import span

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

# Looked up once: the look-up takes as long as the product of one token.
_silu_out, _silu_backward_out = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input
_gelu_out, _gelu_backward_out = torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input


def sort_by_expert(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Returns order_R int64 (sorted row -> flat (token, slot)) and ends_E int32 (where each expert's rows end)."""
    ids_R = ids_TK.flatten()
    order_R = ids_R.sort(stable=True).indices
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=ids_R.device)
    counts_E.scatter_add_(0, ids_R, torch.ones_like(ids_R))
    return order_R, counts_E.cumsum(0).to(torch.int32)


def inverse(order_R: Tensor) -> Tensor:
    """Flat (token, slot) -> sorted row."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def combine(y_RD: Tensor, rows_R: Tensor, top_k: int, weights_TK: Tensor | None = None) -> Tensor:
    """Sum each token's `top_k` rows, in the order of its slots, weighted where weights are given -> [T, D].

    `rows_R`: flat (token, slot) -> row of `y_RD`, the `inverse` of the sort.
    """
    if y_RD.device.type == "cpu" and y_RD.dtype == torch.float32 and len(rows_R):
        # On CPU this gathers, weighs and sums in one pass.
        starts_T = torch.arange(0, len(rows_R), top_k)
        weights_R = None if weights_TK is None else weights_TK.flatten().to(y_RD.dtype)
        return torch.embedding_bag(y_RD, rows_R, starts_T, False, 0, False, weights_R)[0]
    y_TKD = y_RD[rows_R].unflatten(0, (-1, top_k)).to(torch.promote_types(y_RD.dtype, torch.float32))
    if weights_TK is not None:
        y_TKD = y_TKD * weights_TK.unsqueeze(-1)
    return y_TKD.sum(1).to(y_RD.dtype)


def _activate_into(h_RGF: Tensor, activation: str, out_RF: Tensor) -> Tensor:
    """act(h) written into `out_RF`."""
    if activation == "swiglu":
        _silu_out(h_RGF[:, 0], out=out_RF)
        return out_RF.mul_(h_RGF[:, 1])
    return _gelu_out(h_RGF[:, 0], approximate="tanh", out=out_RF)


def _activation_backward(
    h_RGF: Tensor, da_RF: Tensor, weights_R: Tensor, activation: str, dh_RGF: Tensor, act_RF: Tensor
) -> Tensor:
    """From the gradient `da_RF` of an expert's unweighted output rows: the pre-activation's and the routing weight's.

    Writes w * act(h) into `act_RF` (what w_out's gradient needs) and the gradient of h into `dh_RGF`, uses `da_RF` up,
    and returns the gradient of the routing weights: <dy, y> = <dy @ w_out, act(h)>, so y is never needed again.
    """
    w_R1 = weights_R.unsqueeze(1)
    if activation == "swiglu":
        gate, up = h_RGF[:, 0], h_RGF[:, 1]
        silu = _silu_out(gate, out=dh_RGF[:, 1])
        torch.mul(silu, up, out=act_RF)
        dweights_R = torch.linalg.vecdot(da_RF, act_RF)
        da_RF.mul_(w_R1)
        silu.mul_(da_RF)
        _silu_backward_out(da_RF.mul_(up), gate, grad_input=dh_RGF[:, 0])
    else:
        _gelu_out(h_RGF[:, 0], approximate="tanh", out=act_RF)
        dweights_R = torch.linalg.vecdot(da_RF, act_RF)
        da_RF.mul_(w_R1)
        _gelu_backward_out(da_RF, h_RGF[:, 0], approximate="tanh", grad_input=dh_RGF[:, 0])
    act_RF.mul_(w_R1)
    return dweights_R


def _flat(w_EGFD: Tensor) -> Tensor:
    return w_EGFD.flatten(1, 2)  # gate rows then up rows: [E, G*F, D]


def _operand(w_EMN: Tensor) -> Tensor:
    """The weights where they are, if torch's grouped product takes them there, else a copy.

    It wants one of the last two dimensions dense, and memory and the other's steps in multiples of 16 bytes.
    """
    (rows, columns), (M, N) = w_EMN.stride()[1:], w_EMN.shape[1:]
    dense = (columns == 1 and rows >= N) or (rows == 1 and columns >= M)
    aligned = max(rows, columns) * w_EMN.element_size() % 16 == 0 and w_EMN.data_ptr() % 16 == 0
    return w_EMN if dense and aligned else w_EMN.clone(memory_format=torch.contiguous_format)


def forward(
    x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y_TD, and for the backward the pre-activations h_RGF, order_R and ends_E."""
    top_k = ids_TK.shape[1]
    with span("permute"):
        order_R, ends_E = sort_by_expert(ids_TK, len(w_in_EGFD))
        x_RD = x_TD.index_select(0, order_R // top_k)
    with span("up"):
        h_RGF = _up(x_RD, w_in_EGFD, ends_E)
        act_RF = _activate_into(h_RGF, activation, torch.empty_like(h_RGF[:, 0]))
    with span("down"):
        y_RD = F.grouped_mm(act_RF, _operand(w_out_EDF).transpose(1, 2), offs=ends_E)
    with span("combine"):
        return combine(y_RD, inverse(order_R), top_k, weights_TK), h_RGF, order_R, ends_E


def _up(x_RD: Tensor, w_in_EGFD: Tensor, ends_E: Tensor) -> Tensor:
    w_EHD = _operand(_flat(w_in_EGFD))
    return F.grouped_mm(x_RD, w_EHD.transpose(1, 2), offs=ends_E).unflatten(1, w_in_EGFD.shape[1:3])


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EGFD: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor,
    h_RGF: Tensor,
    order_R: Tensor,
    ends_E: Tensor,
    activation: str,
) -> Gradients:
    """Returns the gradients of x, w_in, w_out and the routing weights; an expert without tokens gets zeros."""
    with span("permute", "backward"):
        token_R = order_R // weights_TK.shape[1]
        weights_R = weights_TK.flatten()[order_R].to(x_TD.dtype)
        x_RD, dy_RD = x_TD.index_select(0, token_R), dy_TD.index_select(0, token_R)
    if h_RGF.numel() == 0:
        with span("up", "recompute"):
            h_RGF = _up(x_RD, w_in_EGFD, ends_E)
    with span("down", "backward"):
        da_RF = F.grouped_mm(dy_RD, _operand(w_out_EDF), offs=ends_E)
        act_RF, dh_RGF = torch.empty_like(da_RF), torch.empty_like(h_RGF)
        dweights_R = _activation_backward(h_RGF, da_RF, weights_R, activation, dh_RGF, act_RF)
        dw_out_EDF = F.grouped_mm(dy_RD.t(), act_RF, offs=ends_E)
    with span("up", "backward"):
        dh_RH = dh_RGF.flatten(1)
        dx_RD = F.grouped_mm(dh_RH, _operand(_flat(w_in_EGFD)), offs=ends_E)
        dw_in_EGFD = F.grouped_mm(dh_RH.t(), x_RD, offs=ends_E).view_as(w_in_EGFD)
    with span("combine", "backward"):
        rows_R = inverse(order_R)
        dweights_TK = dweights_R[rows_R].view_as(weights_TK).to(weights_TK.dtype)
        return combine(dx_RD, rows_R, weights_TK.shape[1]), dw_in_EGFD, dw_out_EDF, dweights_TK


def takes_two(ids_12: Tensor, n_experts: int) -> bool:
    """Whether `one_token_top2` can take these ids: two different experts that there are."""
    first, second = ids_12[0].tolist()
    return first != second and min(first, second) >= 0 and max(first, second) < n_experts


def one_token_top2(
    x_1D: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_12: Tensor, ids_12: Tensor, activation: str
) -> Tensor:
    """The forward of a single token with two different experts, in any dtype -> y [1, D]. Keeps nothing for a backward.

    Any two experts are a slice with a step, so their weights are one strided batch without a copy, and the batched
    product gives each expert a thread.
    """
    first, second = ids_12[0].tolist()
    pair = slice(min(first, second), max(first, second) + 1, abs(first - second))
    with span("up"):
        h_21H = torch.bmm(x_1D.expand(2, 1, -1), _flat(w_in_EGFD[pair]).transpose(1, 2))
        act_2F = reference.activate(h_21H.view(2, *w_in_EGFD.shape[1:3]), activation)
    with span("down"):
        weights_21 = weights_12.t() if first < second else weights_12.t().flip(0)
        return torch.bmm((act_2F * weights_21).to(x_1D.dtype).unsqueeze(1), w_out_EDF[pair].transpose(1, 2)).sum(0)
