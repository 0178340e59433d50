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
from shapes import ring_length
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
    """Hugging Face's own module, `MixtralExperts` with experts_implementation="grouped_mm", on the tensors given."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    made: dict[tuple[int, ...], Any] = {}

    def module(w_in: Tensor) -> Any:
        E, _, n_hidden, D = w_in.shape
        if w_in.shape not in made:
            config = MixtralConfig(hidden_size=D, intermediate_size=n_hidden, num_local_experts=E)
            config._experts_implementation = "grouped_mm"
            with torch.device("meta"):
                made[w_in.shape] = MixtralExperts(config)
            made[w_in.shape]._parameters.clear()  # plain tensors stand in for them, call by call
        return made[w_in.shape]

    def layer(x_TD: Tensor, w_in_EGFD: Tensor, w_out_EDF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        experts = module(w_in_EGFD)
        experts.__dict__.update(gate_up_proj=w_in_EGFD.flatten(1, 2), down_proj=w_out_EDF)
        try:
            return experts(x_TD, ids_TK, weights_TK)
        finally:
            del experts.__dict__["gate_up_proj"], experts.__dict__["down_proj"]

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
NEED_A_GPU = ("Liger", "ScatterMoE", "moe-ops", "vLLM")


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
        except Exception as error:  # made for another torch or Triton
            print(f"{name}: cannot be imported ({type(error).__name__}: {str(error)[:200]})")
    return found


class CublasLoop:
    """The rival that is given everything: rows sorted already, counts on the host; no gather, activation or combine.

    One product per expert and matrix through cuBLAS, `torch.mm` over the expert's rows, on operands of the right sizes.
    The weights' gradients go into a ring of buffers, as large as all that a cache could hold, and not into memory of
    the weights' size: the bytes written are the same. All that a product reads is random, for zeros take less power.
    """

    def __init__(self, w_in_EGFD: Tensor, w_out_EDF: Tensor, counts: list[int], backward: bool = True) -> None:
        E, G, n_hidden, D = w_in_EGFD.shape
        self.w_in, self.w_out = w_in_EGFD.flatten(1, 2), w_out_EDF
        ends = [sum(counts[: e + 1]) for e in range(E)]
        self.spans = [(e, end - n, end) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]
        rows, g = sum(counts), torch.Generator(w_in_EGFD.device).manual_seed(2)
        self.h = w_in_EGFD.new_empty(rows, G * n_hidden).normal_(generator=g)
        self.act = w_in_EGFD.new_empty(rows, n_hidden).normal_(generator=g)
        self.y = w_in_EGFD.new_empty(rows, D)  # and dx; nothing reads it
        expert_bytes = (self.w_in[0].numel() + w_out_EDF[0].numel()) * w_in_EGFD.element_size()
        self.ring = ring_length(expert_bytes, E) if backward else 0
        self.dw_in = self.w_in.new_empty(self.ring, *self.w_in.shape[1:])
        self.dw_out = self.w_out.new_empty(self.ring, *self.w_out.shape[1:])

    def forward(self, x_RD: Tensor) -> None:
        for e, start, end in self.spans:
            torch.mm(x_RD[start:end], self.w_in[e].t(), out=self.h[start:end])
        for e, start, end in self.spans:
            torch.mm(self.act[start:end], self.w_out[e].t(), out=self.y[start:end])

    def backward(self, dy_RD: Tensor) -> None:
        """The four products of a backward; the rows of dy stand for those of x too."""
        for e, start, end in self.spans:
            dy, h, act = dy_RD[start:end], self.h[start:end], self.act[start:end]
            torch.mm(dy, self.w_out[e], out=act)
            torch.mm(dy.t(), act, out=self.dw_out[e % self.ring])
            torch.mm(h.t(), dy, out=self.dw_in[e % self.ring])
            torch.mm(h, self.w_in[e], out=self.y[start:end])
