"""One pass of the model over a flat batch of tokens: logits where they are wanted.

Shape suffixes: T tokens, N wanted positions, D model width, H query heads, C head width, V vocabulary, K experts of a
token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from moe.errors import ConfigError
from moe.experts import Experts, MoE, Router
from moe.kernels import cards, ops
from moe.kernels.arguments import autocasts
from moe.kernels.spans import span
from moe.layers import MLP, Attention, Head, Linear, RMSNorm, at_least_fp32, cast, rotate, untouched
from moe.model import Block, Embedding, Transformer
from moe.serve import cpu
from moe.serve.graphs import DecodeGraphs
from moe.serve.pages import Pages, Pass, Segment
from moe.serve.tables import on_device

QUANTIZATIONS = (None, "int8", "fp8")
# Rows of every product where results must not depend on the batch. Few: most of them are padding where single tokens
# are decoded.
INVARIANT_ROWS = 8

Multiply = Callable[[Tensor], Tensor]

_KINDS = {Transformer, nn.ModuleList, Embedding, Block, RMSNorm, Attention, Linear, MoE, Router, Experts, MLP, Head}


def fits(model: Transformer) -> bool:
    """Whether every module is exactly ours and as the configuration says, and no autocast is on: what is not has to be
    called."""
    if autocasts(next(model.parameters()).device.type):
        return False
    if isinstance(model.embedding, Embedding) and model.embedding.max_norm is not None:
        return False
    if any(isinstance(m, RMSNorm) and m.eps != model.cfg.norm_eps for m in model.modules()):
        return False
    return all(type(m) in _KINDS and untouched(m, type(m)) for m in model.modules())


class Routed(NamedTuple):
    """What a layer's router chose, for each token of a pass."""

    ids_TK: Tensor
    weights_TK: Tensor


class Runner:
    """Runs a model over passes, with its keys and values in `pages`.

    A pass of few tokens computes little: the time goes into reading the weights and into starting operations, of which
    the modules of model.py need twice as many as are needed. So where every module is exactly ours and untouched, the
    same computation is done without them: on a CPU by C kernels on copies of the weights (cpu.py), in float32, bfloat16
    and float16; on CUDA by the ops of moe.kernels. Results agree with the modules' up to rounding. Else the modules
    run. The weights must not change while a runner is in use.

    `record`: whether `routing` shall hold, after a pass, the choices of each layer with experts, on the model's device.

    Args:
        quantization: the expert weights in eight bits, "int8" (on a CPU and on CUDA) or "fp8" (e4m3, on CUDA), one
            scale for each output channel; None: as they are.
        batch_invariant: a token's logits have the same bits whatever else is in its pass, and however the positions
            before it were computed. On one machine, and on CUDA as long as a library's product of one shape is always
            computed alike: there products are of a fixed number of rows.

    Raises:
        ConfigError: a setting that this model or device cannot have.
    """

    def __init__(
        self, model: Transformer, pages: Pages, *, quantization: str | None = None, batch_invariant: bool = False
    ) -> None:
        if quantization not in QUANTIZATIONS:
            raise ConfigError(f'quantization = {quantization!r}: must be "int8", "fp8" or None')
        if quantization == "fp8" and pages.device.type != "cuda":
            raise ConfigError(f'quantization = "fp8": {pages.device.type} multiplies no such numbers; take "int8"')
        if quantization == "fp8" and (reason := cards.why_not_e4m3(pages.device)):
            raise ConfigError(f'quantization = "fp8": {reason}; take "int8"')
        reason = _why_modules(model, pages)
        for name, value in (("quantization", quantization), ("batch_invariant", batch_invariant)):
            if value and reason:
                raise ConfigError(f"{name} = {value!r}: {reason}, or leave the setting out")
        self.model, self.pages, self.batch_invariant = model, pages, batch_invariant
        self.record = False
        self.routing: list[Routed] = []
        self._cpu = self._fused = self._graphs = None
        if reason is None and pages.device.type == "cpu":
            self._cpu = cpu.CpuModel(model, pages, quantization is not None)
        elif reason is None:
            self._fused = Fused(model, quantization, INVARIANT_ROWS if batch_invariant else 0)
            self._graphs = DecodeGraphs(pages, self._fused) if pages.device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        """Stores the tokens' keys and values; the logits [N, V] after the `wanted` rows of the pass."""
        if self._cpu is not None:
            logits_NV, chosen = self._cpu(segments, wanted, self.record)
            self.routing = [Routed(*both) for both in chosen]
            return logits_NV
        done = None if self._graphs is None else self._graphs(segments, wanted)
        if done is None:
            one = Pass(self.pages, segments, all_paged=self.batch_invariant)
            done = (self._fused or self._modules)(one, on_device(self.pages.device, [*wanted]))
        logits_NV, routing = done
        self.routing = routing if self.record else []
        return logits_NV

    def _modules(self, one: Pass, rows_N: Tensor) -> tuple[Tensor, list[Routed]]:
        """The output layer sees wanted rows only, but for a model that somebody has changed as a whole."""
        cache: Any = one
        if not untouched(self.model, Transformer):
            out = self.model(one.tokens_T.unsqueeze(0), cache=cache)
            return out.logits_BSV[0].index_select(0, rows_N), [Routed(r.ids_TK, r.weights_TK) for r in out.routing]
        x_1TD, T, routing = self.model.embedding(one.tokens_T.unsqueeze(0)), len(one.tokens_T), []
        blocks: Any = self.model.blocks
        for block, attend in zip(blocks, one.attends(T), strict=True):
            x_1TD, r = block(x_1TD, one.rope(T), attend)
            if r is not None:
                routing.append(Routed(r.ids_TK, r.weights_TK))
        return self.model.head(self.model.norm(x_1TD.index_select(1, rows_N)))[0], routing


def _why_modules(model: Transformer, pages: Pages) -> str | None:
    """Why a model's own modules have to run, and what to do about it; None if nothing needs them."""
    if not fits(model):
        return (
            "needs a model of plain modules, and this one has others in their place (adapters, hooks, imported parts) "
            "or runs under autocast; merge them"
        )
    if pages.device.type == "cpu" and (reason := cpu.why_not(model, pages)):
        return f"needs the kernels for CPUs, and {reason}; make them possible"
    return None


# ------------------------------------------------------------------------------------------------- without modules


class _Layer(NamedTuple):
    attention_norm_D: Tensor
    wqkv: Multiply
    wo: Multiply
    mlp_norm_D: Tensor
    router: Multiply | None
    choose: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    mlp: Callable[..., Tensor]


class Fused:
    """A model of plain modules as few operations. It holds copies of the norms and of the query, key and value weights.

    Args:
        tile: rows of a product, always as many: then a row's bits do not depend on the others. 0: all there are.
    """

    def __init__(self, model: Transformer, quantization: str | None, tile: int) -> None:
        self.embedding = model.embedding.weight
        self.dtype = self.embedding.dtype
        self.wide = at_least_fp32(self.dtype)
        self.n_heads, self.head_dim = model.cfg.attention.n_heads, model.cfg.attention.head_dim
        self.eps = model.cfg.norm_eps
        self.layers = []
        blocks: Any = model.blocks
        for block in blocks:
            self.layers.append(self._layer(block, quantization, tile))
        self.norm_D = self._wide(model.norm.weight)
        self.head = _product(model.head.weight, tile)

    def _layer(self, block: Any, quantization: str | None, tile: int) -> _Layer:
        a, moe = block.attention, block.moe
        wqkv = _product(torch.cat([w.weight for w in (a.wq, a.wk, a.wv)]), tile)
        router = choose = None
        if moe is None:
            mlp = _dense(block.mlp, tile)
        else:
            router, choose = _product(self._wide(moe.router.weight), tile), moe.router.choose
            mlp = self._experts(moe.experts, quantization, tile)
        norms = self._wide(block.attention_norm.weight), self._wide(block.mlp_norm.weight)
        return _Layer(norms[0], wqkv, _product(a.wo.weight, tile), norms[1], router, choose, mlp)

    def _experts(self, experts: Experts, quantization: str | None, tile: int) -> Callable[..., Tensor]:
        w_in, w_out, activation = experts.w_in_EGFD, experts.w_out_EDF, experts.activation
        if quantization is None:
            run = functools.partial(ops.expert_mlp_inference, activation=activation, batch_invariant=tile > 0)
            return lambda x, weights, ids: run(x, w_in, w_out, weights, ids)
        small = ops.quantize_experts(w_in, w_out, torch.int8 if quantization == "int8" else torch.float8_e4m3fn)
        run = functools.partial(ops.expert_mlp_quantized, activation=activation, batch_invariant=tile > 0)
        return lambda x, weights, ids: run(x, small, weights, ids)

    def __call__(self, one: Pass, rows_N: Tensor) -> tuple[Tensor, list[Routed]]:
        T, H, C, routing = len(one.tokens_T), self.n_heads, self.head_dim, []
        cos, sin = one.rope(T)
        with span("embedding"):
            x_TD = F.embedding(one.tokens_T, self.embedding)
        for layer, attend in zip(self.layers, one.attends(T), strict=True):
            n_TD = self._norm(x_TD, layer.attention_norm_D)
            with span("projections"):
                qkv_TAC = layer.wqkv(n_TD).view(T, -1, C)
            n_kv = (qkv_TAC.shape[1] - H) // 2
            with span("attention"):
                qk_TAC = rotate(qkv_TAC[:, : H + n_kv], cos, sin)
                y_1THC = attend(qk_TAC[None, :, :H], qk_TAC[None, :, H:], qkv_TAC[None, :, H + n_kv :])
            with span("projections"):
                x_TD = layer.wo(y_1THC.reshape(T, H * C)).add_(x_TD)
            n_TD = self._norm(x_TD, layer.mlp_norm_D)
            if layer.router is None or layer.choose is None:
                x_TD = layer.mlp(n_TD).add_(x_TD)
                continue
            with span("router"):
                weights_TK, ids_TK = one.leave_out_padding(*layer.choose(layer.router(cast(n_TD, self.wide))))
                routing.append(Routed(ids_TK, weights_TK))
            x_TD = layer.mlp(n_TD, weights_TK, ids_TK).add_(x_TD)
        n_ND = self._norm(x_TD.index_select(0, rows_N), self.norm_D)
        with span("head"):
            return self.head(n_ND), routing

    def _wide(self, weight: Tensor) -> Tensor:
        return cast(weight.detach(), self.wide)

    def _norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        with span("norm"):
            return cast(F.rms_norm(cast(x_TD, self.wide), weight_D.shape, weight_D, self.eps), self.dtype)


def _dense(mlp: MLP, tile: int) -> Multiply:
    up, down = _product(mlp.w_in.weight, tile), _product(mlp.w_out.weight, tile)
    gates = ops.ACTIVATIONS[mlp.activation]
    return lambda x_TD: down(ops.activate(up(x_TD).unflatten(1, (gates, -1)), mlp.activation))


def _product(w_OI: Tensor, tile: int) -> Multiply:
    """x [T, I] -> x @ w.T [T, O], `tile` rows at a time."""
    w_IO = w_OI.detach().t()
    if not tile:
        return lambda x_TI: torch.mm(x_TI, w_IO)

    def tiled(x_TI: Tensor) -> Tensor:
        T, width = x_TI.shape
        padded_TI = x_TI.new_zeros(-(-T // tile) * tile, width)
        padded_TI[:T] = x_TI
        # Every tile begins where a new tensor does: libraries choose by alignment, too.
        copied = tile * width * x_TI.itemsize % 64 != 0
        parts = [part.clone() if copied else part for part in padded_TI.split(tile)]
        return torch.cat([torch.mm(part, w_IO) for part in parts])[:T]

    return tiled
