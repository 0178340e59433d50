"""A model whose passes run in the C kernels of kernels/cpu: on a CPU, in float32, bfloat16 or float16.

Every weight is in memory once more, as the kernels read it fastest. A row's bits do not depend on what else is in its
pass, nor on the number of threads.

Shape suffixes: T tokens, N wanted positions, V vocabulary, L layers, K experts of a token.
"""

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe.config import Config
from moe.kernels import spans
from moe.kernels.cpu import library as compiled
from moe.kernels.cpu import weights
from moe.kernels.cpu.weights import KINDS, Weight
from moe.serve.pages import Pages, Segment

# Of a layer, as pass.c has them; before the first the embedding, behind the last the head.
PHASES = ("norm", "projections", "attention", "projections", "norm", "router", "permute", "up", "down", "combine")
MLP = {"router": None, "permute": None, "up": "mlp", "down": "mlp", "combine": None}


def why_not(model: Any, pages: Pages) -> str | None:
    """Why the kernels cannot run a model of plain modules; None if they can."""
    dtype = model.embedding.weight.dtype
    if pages.device.type != "cpu":
        return f"the model is on {pages.device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels for CPUs compute in float32, and the model is in {dtype}"
    return compiled.why_not()


class CpuModel:
    """Runs passes of a model of plain modules (`moe.serve.runner.fits`) over `pages`.

    Args:
        quantized: whether the experts' weights are in int8, one scale for each output.
    """

    def __init__(self, model: Any, pages: Pages, quantized: bool = False) -> None:
        cfg: Config = model.cfg
        self._library, self._pages, self.dtype = compiled.library(), pages, model.embedding.weight.dtype
        self._alive: list[Any] = []
        layers = [self._layer(block, quantized) for block in model.blocks]
        scales = pages.scales or [(None, None)] * len(layers)
        caches = [
            weights.Cache(*(None if x is None else x.data_ptr() for x in (*kept, *theirs)))
            for kept, theirs in zip(pages.layers, scales, strict=True)
        ]
        self._top_k = max((layer.chosen for layer in layers), default=0)
        self._has_experts = [i for i, layer in enumerate(layers) if layer.chosen]
        self._phases = self._named(layers)
        self._vocab_size = cfg.vocab_size
        a = cfg.attention
        embedding = self._kept(model.embedding.weight.detach().contiguous())
        self._alive += [layers, caches]
        self._model = weights.Model(
            layers=(weights.Layer * len(layers))(*layers), n_layers=len(layers), d_model=cfg.d_model,
            heads=a.n_heads, kv_heads=a.n_kv_heads, width=a.head_dim, vocabulary=cfg.vocab_size,
            embedding_VD=embedding, embedding_kind=KINDS[self.dtype], norm_D=self._norm(model.norm),
            head=self._weight(Weight.of(model.head.weight)), cos=self._kept(pages.rope[0].contiguous()),
            sin=self._kept(pages.rope[1].contiguous()), eps=cfg.norm_eps,
            caches=(weights.Cache * len(caches))(*caches), cache_kind=KINDS[pages.dtype],
            block_size=pages.block_size,
        )  # fmt: skip
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _layer(self, block: Any, quantized: bool) -> Any:
        a, moe = block.attention, block.moe
        layer = weights.Layer(
            attention_norm_D=self._norm(block.attention_norm),
            mlp_norm_D=self._norm(block.mlp_norm),
            qkv=self._weight(Weight.of(torch.cat([w.weight.detach() for w in (a.wq, a.wk, a.wv)]))),
            wo=self._weight(Weight.of(a.wo.weight)),
        )
        if moe is None:
            w_in, w_out = block.mlp.w_in.weight.detach(), block.mlp.w_out.weight.detach()
            gates = len(w_in) // w_out.shape[1]
            w_in, w_out, quantized = w_in.unflatten(0, (gates, -1)).unsqueeze(0), w_out.unsqueeze(0), False
            layer.experts, layer.chosen, activation = 1, 0, block.mlp.activation
        else:
            w_in, w_out, activation = moe.experts.w_in_EGFD, moe.experts.w_out_EDF, moe.experts.activation
            layer.router = self._weight(Weight.of(moe.router.weight.float()))
            layer.experts, layer.chosen = len(w_in), moe.router.top_k
            if moe.router.bias_E is not None:
                layer.bias_E = self._kept(moe.router.bias_E.detach().float().clone())
        layer.activation = weights.ACTIVATIONS[activation]
        layer.up = self._weight(Weight.up(w_in, quantized))
        layer.down = self._weight(Weight.down(w_out, quantized))
        return layer

    def _kept(self, x: Tensor) -> int:
        self._alive.append(x)
        return x.data_ptr()

    def _norm(self, norm: Any) -> int:
        return self._kept(norm.weight.detach().float().clone())

    def _weight(self, weight: Weight) -> Weight:
        # A structure within another is copied, and what it keeps alive is not.
        self._alive.append(weight)
        return weight

    @staticmethod
    def _named(layers: Sequence[Any]) -> list[str | None]:
        """The component of every phase; None: nothing is done."""
        found: list[str | None] = ["embedding"]
        for layer in layers:
            found += [name if layer.chosen else MLP.get(name, name) for name in PHASES]
        return [*found, "head"]

    def __call__(
        self, segments: Sequence[Segment], wanted: Sequence[int], record: bool
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The logits [N, V] after the wanted rows; with `record`, each routed layer's chosen experts and weights."""
        ids, blocks, rows = array("q"), array("i"), array("i")
        size = self._pages.block_size
        for s in segments:
            rows.extend((len(ids), len(s.token_ids), s.start, len(blocks)))
            ids.extend(s.token_ids)
            blocks.extend(s.blocks[: -(-s.end // size)])
        if not 0 <= min(ids) <= max(ids) < self._vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise ValueError(f"token id {wrong}: must be in [0, {self._vocab_size})")
        T, wanted_N = len(ids), array("q", wanted)
        logits_NV = torch.empty(len(wanted), self._vocab_size)
        chosen_LTK = weights_LTK = None
        if record:
            shape = (len(self._model.layers[: self._model.n_layers]), T, self._top_k)
            chosen_LTK, weights_LTK = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        one = weights.Pass(
            tokens=T, segments=len(segments), wanted=len(wanted), threads=torch.get_num_threads(),
            ids_T=ids.buffer_info()[0], blocks=blocks.buffer_info()[0], wanted_N=wanted_N.buffer_info()[0],
            segments_Q=ctypes.cast(rows.buffer_info()[0], ctypes.POINTER(weights.Segment)),
            logits_NV=logits_NV.data_ptr(),
            chosen_LTK=None if chosen_LTK is None else chosen_LTK.data_ptr(),
            weights_LTK=None if weights_LTK is None else weights_LTK.data_ptr(),
        )  # fmt: skip
        self._run(one)
        routing = (
            []
            if chosen_LTK is None or weights_LTK is None
            else [(chosen_LTK[i], weights_LTK[i]) for i in self._has_experts]
        )
        return logits_NV.to(self.dtype), routing

    def _run(self, one: Any) -> None:
        model, run = ctypes.addressof(self._model), self._library.run
        address = ctypes.addressof(one)
        needed = self._library.bytes_needed(model, address)
        if self._memory.numel() < needed:
            self._memory = torch.empty(needed + needed // 4, dtype=torch.uint8)
        one.memory = self._memory.data_ptr()
        if not spans.heard():
            run(model, address, 0, len(self._phases))
            return
        for i, component in enumerate(self._phases):
            if component is not None:
                with spans.span(component):
                    run(model, address, i, i + 1)
