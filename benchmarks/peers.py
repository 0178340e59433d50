"""Other libraries' MoE layers as functions of the same tensors: (x, w_in, w_out, weights, ids) -> y, with autograd.

A peer that cannot be imported is left out and said so. Their code is not in this repository; put a wheel or a source
tree on PYTHONPATH (the GPU run looks in `.peers/`, which git ignores).
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
PEERS_FOLDER = Path(__file__).parent.parent / ".peers"


def ours(impl: str | None = None, recompute: bool = False) -> Layer:
    from moe.kernels import ops

    def layer(x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        activation = "swiglu" if w_in_EGFD.shape[1] == 2 else "gelu"
        return ops.expert_mlp(x_TD, w_in_EGFD, w_out_EDF, weights_TK, ids_TK, activation, impl, recompute=recompute)

    return layer


def transformers_grouped_mm() -> Layer:
    """Hugging Face's experts of Mixtral with their grouped_mm implementation."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    class Experts:
        has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
        _is_expert_parallel = has_post_expert_norm = False

        def __init__(self, w_in: Tensor, w_out: Tensor) -> None:
            self.gate_up_proj, self.down_proj, self.num_experts = w_in.flatten(1, 2), w_out, len(w_in)

        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate) * up

    def layer(x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return grouped_mm_experts_forward(Experts(w_in_EGFD, w_out_EDF), x_TD, ids_TK, weights_TK)  # type: ignore[arg-type]

    return layer


def liger() -> Layer:
    """Liger's fused MoE."""
    function: Any = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def layer(x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return function.apply(x_TD, w_in_EGFD.flatten(1, 2), w_out_EDF, ids_TK.int(), weights_TK)

    return layer


def scattermoe() -> Layer:
    """ScatterMoE's two parallel linears with the activation between, as its GLUMLP has them."""
    module: Any = importlib.import_module("scattermoe.parallel_experts")

    def layer(x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        order = module.flatten_sort_count(ids_TK, num_experts=len(w_in_EGFD))
        h = module.parallel_linear(
            x_TD, w_in_EGFD.flatten(1, 2).permute(0, 2, 1), ids_TK.shape[1], *order, grouped_out=True
        )
        gate, up = h.chunk(2, dim=-1)
        return module.parallel_linear(
            F.silu(gate) * up, w_out_EDF.permute(0, 2, 1), 1, *order, gates=weights_TK.to(x_TD.dtype), grouped_in=True
        )

    return layer


def moe_ops() -> Layer:
    """moe-ops' permute, grouped product and unpermute."""
    module: Any = importlib.import_module("moe_ops")

    def layer(x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        rows_RD, places, ends = module.permute(x_TD, ids_TK.int(), E=len(w_in_EGFD))
        gate, up = module.grouped_gemm(rows_RD, w_in_EGFD.flatten(1, 2), ends).chunk(2, dim=-1)
        y_RD = module.grouped_gemm(F.silu(gate) * up, w_out_EDF, ends)
        return module.unpermute(y_RD, places, weights_TK, num_tokens=len(x_TD), num_topK=ids_TK.shape[1])

    return layer


PEERS: dict[str, Callable[[], Layer]] = {
    "transformers grouped_mm": transformers_grouped_mm,
    "torch grouped_mm (our `grouped`)": lambda: ours("grouped"),
    "Liger": liger,
    "ScatterMoE": scattermoe,
    "moe-ops": moe_ops,
}
NEED_A_GPU = ("Liger", "ScatterMoE", "moe-ops")


def importable(device: str) -> dict[str, Layer]:
    """The expert layers of the peers that are here; says which are not."""
    return available(PEERS, device)


def available(makers: Mapping[str, Callable[[], Any]], device: str) -> dict[str, Any]:
    """What each maker gives, by name, and says which of them are not here. Peers in Triton need a GPU."""
    if PEERS_FOLDER.is_dir():
        sys.path[:0] = [str(PEERS_FOLDER), *(str(p) for p in sorted(PEERS_FOLDER.iterdir()) if p.is_dir())]
    found = {}
    for name, make in makers.items():
        if device == "cpu" and name.startswith(NEED_A_GPU):
            print(f"{name}: needs a GPU")
            continue
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: not here ({error})")
    return found


def cublas_loop(w_in_EGFD: Tensor, w_out_EDF: Tensor, counts: list[int]) -> tuple[Callable, Callable]:
    """The rival that is given everything: rows sorted already, counts on the host; no gather, activation or combine.

    One product per expert and matrix through cuBLAS. Returns forward(x_RD) and backward(x_RD): the two products of a
    forward, and the four of a backward on operands of the right sizes.
    """
    E, G, n_hidden, D = w_in_EGFD.shape
    w_in, ends = w_in_EGFD.flatten(1, 2), [sum(counts[: e + 1]) for e in range(E)]
    spans = [(e, end - n, end) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]
    rows = ends[-1]
    h = w_in.new_empty(rows, G * n_hidden)
    act, y, dx = h[:, :n_hidden].contiguous(), w_in.new_empty(rows, D), w_in.new_empty(rows, D)
    dw_in, dw_out = None, None

    def forward(x_RD: Tensor) -> None:
        for e, start, end in spans:
            torch.mm(x_RD[start:end], w_in[e].t(), out=h[start:end])
        for e, start, end in spans:
            torch.mm(act[start:end], w_out_EDF[e].t(), out=y[start:end])

    def backward(x_RD: Tensor) -> None:
        nonlocal dw_in, dw_out
        if dw_in is None or dw_out is None:
            dw_in, dw_out = torch.zeros_like(w_in), torch.zeros_like(w_out_EDF)
        for e, start, end in spans:
            torch.mm(x_RD[start:end], w_out_EDF[e], out=act[start:end])  # dy @ w_out
            torch.mm(x_RD[start:end].t(), act[start:end], out=dw_out[e])
            torch.mm(h[start:end].t(), x_RD[start:end], out=dw_in[e])
            torch.mm(h[start:end], w_in[e], out=dx[start:end])

    return forward, backward
