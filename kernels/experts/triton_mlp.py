"""The expert MLP in Triton: gather -> product -> activation -> product -> weighted sum, and its whole backward.

The products themselves are in triton_pointer.py (any strides, any GPU) and triton_tma.py (Hopper, large shapes), two
modules with the same functions. Everything of size R stays in the order of the experts between the first product and
the last sum. Saved for the backward: the input, the routing, and the pre-activations h (or not even those: then the
backward computes them again). Nothing waits for the device: grids are sized by what R rows of E experts can need.

Shape suffixes as in triton_routes.py; J = G*F pre-activations of a row.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.experts import triton_pointer, triton_routes, triton_tma
from moe.kernels.experts.triton_pointer import Experts
from moe.kernels.experts.triton_routes import Routes
from moe.kernels.experts.triton_rows import bias_gradient, combine
from moe.kernels.spans import span
from moe.kernels.tiles import Tiles


class Gradients(NamedTuple):
    dx_TD: Tensor
    dw_in_EGFD: Tensor
    dw_out_EDF: Tensor
    dweights_TK: Tensor
    db_in_EGF: Tensor | None
    db_out_ED: Tensor | None


def forward(
    x_TD: Tensor, experts: Experts, weights_TK: Tensor, ids_TK: Tensor, activation: str, keep_h: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y_TD, h_RJ (empty unless `keep_h`), and of the routes the order with its inverse [2, R] and the offsets.

    An id outside [0, E) ends in an assertion on the device.
    """
    K = ids_TK.shape[1]
    products, sizes = _choose(x_TD, experts, ids_TK.numel())
    with span("permute"):
        routes, order = triton_routes.route(ids_TK, experts.w_in_EGFD.shape[0], sizes.rows)
        x_rows = products.rows(x_TD, routes, K)
    with span("up"):
        h_RJ, act_RF = products.up(x_rows, experts, routes, K, activation, sizes, keep_h, True)
    with span("down"):
        y_RD = products.down(act_RF, experts, routes, sizes)
    del x_rows, act_RF
    with span("combine"):
        return combine(y_RD, weights_TK.contiguous(), routes, ids_TK.shape), h_RJ, order, routes.offsets


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    experts: Experts,
    weights_TK: Tensor,
    h_RJ: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
) -> Gradients:
    """All gradients; those of experts without tokens are zeros. An empty `h_RJ` is computed again."""
    (E, G, F, D), (T, K) = experts.w_in_EGFD.shape, weights_TK.shape
    weights_TK = weights_TK.contiguous()
    products, sizes = _choose(x_TD, experts, T * K)
    pairs = triton_pointer.in_pairs(experts.w_in_EGFD)  # the order of the columns of dh
    with span("permute", "backward"):
        routes = triton_routes.cut(order, offsets, sizes.rows)
        x_rows, dy_rows = products.rows(x_TD, routes, K), products.rows(dy_TD, routes, K)
    if h_RJ.numel() == 0:
        with span("up", "recompute"):
            h_RJ, _ = products.up(x_rows, experts, routes, K, activation, sizes, True, False)
    with span("down", "backward"):
        dh_RJ, act_RF, dweights_TK = products.down_backward(
            dy_rows, experts, weights_TK, h_RJ, routes, activation, sizes
        )
        dw_out_EDF = products.weight_gradient(dy_rows, act_RF, routes, K, E, sizes, "a", precision=experts.precision)
    del dy_rows, act_RF
    with span("up", "backward"):
        dw_in_EJD = products.weight_gradient(
            dh_RJ, x_rows, routes, K, E, sizes, "b", pairs=pairs, precision=experts.precision
        )
    del x_rows
    db_in_EGF = db_out_ED = None
    if experts.b_in_EGF is not None:
        db_in_EGF = bias_gradient(dh_RJ, None, experts.b_in_EGF, routes, K)
        if pairs:
            db_in_EGF = db_in_EGF.view(E, F, G).transpose(1, 2).contiguous()
    if experts.b_out_ED is not None:
        db_out_ED = bias_gradient(dy_TD.contiguous(), weights_TK, experts.b_out_ED, routes, K)
        # <dy, y> has a share of the bias, which `down_backward` does not see: one number per token and expert.
        shares_TE = dy_TD.float() @ experts.b_out_ED.float().t()
        dweights_TK += shares_TE.gather(1, _ids(routes, T, K))
    with span("up", "backward"):
        dx_RD = products.dx(dh_RJ, experts, routes, sizes)
    del dh_RJ
    with span("combine", "backward"):
        dx_TD = combine(dx_RD, None, routes, weights_TK.shape)
    dw_in_EGFD, dweights_TK = dw_in_EJD.view(E, G, F, D), dweights_TK.to(weights_TK.dtype)
    return Gradients(dx_TD, dw_in_EGFD, dw_out_EDF, dweights_TK, db_in_EGF, db_out_ED)


def copies_rows(x_TD: Tensor, experts: Experts, n_rows: int) -> bool:
    """Whether rows are copied into the order of the experts first, rather than gathered inside the products."""
    return _choose(x_TD, experts, n_rows)[1].tma


def _choose(x_TD: Tensor, experts: Experts, n_rows: int) -> tuple[ModuleType, Tiles]:
    E = experts.w_in_EGFD.shape[0]
    sizes = tiles.choose(x_TD.device, x_TD.dtype, n_rows, E, True)
    if sizes.tma and not triton_tma.fits(x_TD, experts):  # which is asked where it matters: it takes a while
        sizes = tiles.choose(x_TD.device, x_TD.dtype, n_rows, E, False)
    if sizes.tma and tiles.GLUON:
        from moe.kernels.experts import triton_gluon  # which no one else needs to import

        if triton_gluon.fits(sizes, x_TD.device):
            return triton_gluon, sizes
    return (triton_tma if sizes.tma else triton_pointer), sizes


def _ids(routes: Routes, T: int, K: int) -> Tensor:
    """The experts' ids [T, K] int64 from the routes, without a host sync: how many experts end before a row."""
    ends_E = routes.offsets[1:].contiguous()
    return torch.searchsorted(ends_E, routes.inverse_R, right=True).view(T, K)
