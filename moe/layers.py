"""The dense parts: products, RMSNorm, rotary position embedding and its scaling to 32k, multi-query attention, caches.

Shape suffixes: B batch, S sequence, P positions in the cache, D model width, H query heads, N key/value heads,
C head width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.config import AttentionConfig, Config, RopeConfig
from moe.kernels import ops
from moe.kernels.arguments import autocasts, can_read, transformed


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, rotations, routers and losses compute."""
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), but for free where x has it: in a step of generation the call would count."""
    return x if x.dtype == dtype else x.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off for a block of code; where it is off already, for free."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


# Marks a hook that takes whatever a module is called with and changes nothing, such as a clock's.
INDIFFERENT = "_indifferent_to_the_call"


def untouched(module: nn.Module, kind: type[nn.Module], *, called: bool = False) -> bool:
    """Whether a module is exactly ours, so that a fused path may stand in for it: the one rule for all of them.

    It is of the class `kind` itself; nothing in its instance takes the place of a method; no hook, of its own or of
    all modules, waits for its call or its backward; its parameters are plain tensors. Anything else (an adapter, a
    quantised weight, a patched forward, a shard) must be called as the module that it is.

    Args:
        called: the fused path still calls the module, only with other arguments: then FSDP, whose hooks gather the
            weights, and hooks marked `INDIFFERENT` are welcome.
    """
    sharded = called and any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    if type(module) is not kind and not (sharded and kind in type(module).__mro__):
        return False
    if _replaces_a_method(module, kind) or _global_hooks():
        return False
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        if any(not (called and _indifferent(hook)) for hook in hooks.values()):
            return False
    return sharded or all(type(p) is nn.Parameter for p in module.parameters(recurse=False))


# What every module has, `forward` among it.
_METHODS = tuple(name for name in dir(nn.Module) if callable(getattr(nn.Module, name)))


def _replaces_a_method(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether something in the instance takes the place of a method of its class."""
    if torch.compiler.is_compiling():  # Dynamo of torch 2.11 looks names up in an instance, but cannot go through it
        return any([name in module.__dict__ for name in _METHODS])
    return any(callable(getattr(kind, name, None)) for name in module.__dict__)


def _indifferent(hook: Any) -> bool:
    return hasattr(hook, INDIFFERENT) or str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def _global_hooks() -> bool:
    modules = torch.nn.modules.module
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return any(getattr(modules, f"_global_{name}") for name in names)


def made_by_init_weights(self: nn.Module) -> NoReturn:
    """The `reset_parameters` of every module, which knows neither its name nor the depth, on which values depend."""
    raise RuntimeError(
        f"{type(self).__name__} cannot make its own first values, which depend on its place in the model: call "
        "moe.model.init_weights(model, seed) on the whole, after model.to_empty(device=...)"
    )


def tie(one: nn.Module, other: nn.Module) -> None:
    """Makes the weight of `other` that of `one`, unless one of them is an adapter's, quantised, or of another shape."""
    weight, old = (module._parameters.get("weight") for module in (one, other))
    if weight is not None and old is not None and type(weight) is type(old) and weight.shape == old.shape:
        other.weight = weight


def complete_tied(state_dict: dict[str, Tensor], one: str, other: str, errors: list[str]) -> None:
    """A state dict may hold a tied weight under one of its names or both, and then it must be the same."""
    found = [state_dict[name] for name in (one, other) if name in state_dict]
    if len(found) == 1:
        state_dict |= {one: found[0], other: found[0]}
    elif len({type(t) for t in found}) == 1 and not found[0].is_meta and not torch.equal(*found):
        errors.append(f"{one} and {other} are tied, but differ: load them into a model with tie_embeddings = false")


# ------------------------------------------------------------------------------------------------- products and norms


class Linear(nn.Linear):
    """A bias-free nn.Linear that leaves its weight to `init_weights`, the one place where weights are made."""

    reset_parameters = made_by_init_weights

    def __init__(self, d_in: int, d_out: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw values
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.register_parameter("bias", None)


class Head(Linear):
    """The output layer: logits, or with targets their loss without ever holding the logits."""

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [..., D] -> logits [..., V]; with targets [...] the sum of -log softmax(logits)[target], a scalar."""
        if targets_BS is None:
            return super().forward(x_BSD)
        return ops.linear_cross_entropy(x_BSD.flatten(0, -2), self.weight, targets_BS.flatten())

    if TYPE_CHECKING:
        # Of nn.Module it is Any.
        def __call__(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor: ...


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in at least float32."""

    reset_parameters = made_by_init_weights

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def extra_repr(self) -> str:
        """For repr: width and epsilon."""
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        x_wide, weight = cast(x, wide), cast(self.weight, wide)
        with without_autocast(x.device.type):
            if x.device.type != "cpu" or transformed():
                return cast(F.rms_norm(x_wide, weight.shape, weight, self.eps), x.dtype)
            if torch.is_grad_enabled():
                return cast(_CpuRMSNorm.apply(x_wide, weight, self.eps), x.dtype)
            return cast((x_wide * _inverse_rms(x_wide, self.eps)).mul_(weight), x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (torch.linalg.vecdot(x, x) / x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


class _CpuRMSNorm(torch.autograd.Function):
    """RMS norm for a CPU, where torch has no fused one: fewer passes over memory, fewer operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        scaled = x * scale
        if torch.compiler.is_compiling():  # Dynamo of torch 2.11 loses the gradients of what was changed in place
            return scaled * weight
        return scaled.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        # With s = 1 / rms(x): dx = s w dy - s^3 x mean(w dy x), dw = sum over rows of s x dy.
        x, weight, scale = ctx.saved_tensors
        product = dy * x
        mean = (product @ weight).unsqueeze(-1) / x.shape[-1]
        dx = (dy * weight).mul_(scale).addcmul_(x, mean * scale**3, value=-1)
        return dx, scale.flatten() @ product.flatten(0, -2), None


class MLP(nn.Module):
    """A plain MLP, gated or not: what a layer without experts has. Gate and up are one product, as an expert's are."""

    def __init__(self, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w_in = Linear(d_model, ops.ACTIVATIONS[activation] * d_ff)
        self.w_out = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        h = rearrange(self.w_in(x), "... (g f) -> ... g f", g=ops.ACTIVATIONS[self.activation])
        return self.w_out(ops.activate(h, self.activation))


# ----------------------------------------------------------------------------------------------------------- rotary


def rope_frequencies(head_dim: int, cfg: RopeConfig) -> tuple[list[float], float]:
    """The rotation frequency of each of the head_dim / 2 pairs (radians per position), and the attention temperature.

    YaRN (Peng et al. 2023, sections 3.2-3.4): pairs that turn often within the original context keep their frequency,
    pairs that turn seldom are slowed by `factor`, the ones between are blended; queries and keys are both multiplied
    by the temperature 0.1 ln(factor) + 1.
    """
    # In float32 step by step, as the libraries that trained models come from do it: with the exact frequencies the
    # angles, and from some hundred positions on the logits, of an imported model would differ by more than rounding.
    base = [_fp32(1 / _fp32(cfg.theta ** _fp32(2 * i / head_dim))) for i in range(head_dim // 2)]
    if cfg.scaling == "none":
        return base, 1.0
    if cfg.scaling == "linear":
        return [f / cfg.factor for f in base], 1.0

    def pair_with(rotations: float) -> float:  # the pair that makes this many turns within the original context
        turns = cfg.original_max_seq_len / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(cfg.theta))

    low = max(math.floor(pair_with(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_with(cfg.beta_slow)), head_dim - 1)
    frequencies = []
    for i, f in enumerate(base):
        kept = _fp32(1 - _fp32(min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)))
        frequencies.append(_fp32(f / cfg.factor * (1 - kept)) + _fp32(f * kept))
    return frequencies, 0.1 * math.log(cfg.factor) + 1.0 if cfg.factor > 1 else 1.0


def _fp32(x: float) -> float:
    """x rounded to float32's 24 bits (Veltkamp's splitting): arithmetic only, which torch.compile traces through."""
    c = x * (2.0**29 + 1)
    return c - (c - x)


def rope_tables(
    start: int, length: int, head_dim: int, cfg: RopeConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotate`, of positions start .. start + length - 1: two [length, 1, head_dim].

    At least float32. Both halves of a head hold the same cosines, and opposite sines.
    """
    wide = at_least_fp32(dtype)
    frequencies, temperature = rope_frequencies(head_dim, cfg)
    positions = torch.arange(start, start + length, device=device, dtype=wide)
    angles = torch.outer(positions, torch.tensor(frequencies, device=device, dtype=wide))
    cos, sin = angles.cos() * temperature, angles.sin() * temperature
    return torch.cat([cos, cos], -1).unsqueeze(1), torch.cat([-sin, sin], -1).unsqueeze(1)


def rotate(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + C/2]) by its position's angle: the rotate-half form, with tables of `rope_tables`."""
    x = cast(x_BSHC, cos.dtype)
    return cast(torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin), x_BSHC.dtype)


# -------------------------------------------------------------------------------------------------------- attention

# How queries [B, S, H, C] see the new keys and values [B, S, N, C], and what else there is -> [B, S, H, C]. The one
# seam of attention: whoever knows a cache, documents, a mask, pages or a ring of ranks brings a function of its own.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
    """Each position sees itself and those before it."""
    return _attention(q_BSHC, k_BSNC, v_BSNC, is_causal=True)


def _attention(q_BSHC: Tensor, k_BPNC: Tensor, v_BPNC: Tensor, **which: Any) -> Tensor:
    """Scaled dot-product attention of S queries to P keys -> [B, S, H, C]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BPNC, v_BPNC))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **which).transpose(1, 2)


class Attention(nn.Module):
    """Attention in which H query heads share N key/value heads: N = 1 is multi-query (Shazeer 2019)."""

    def __init__(self, d_model: int, cfg: AttentionConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.wq = Linear(d_model, cfg.n_heads * cfg.head_dim)
        self.wk = Linear(d_model, cfg.n_kv_heads * cfg.head_dim)
        self.wv = Linear(d_model, cfg.n_kv_heads * cfg.head_dim)
        self.wo = Linear(cfg.n_heads * cfg.head_dim, d_model)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend = causal) -> Tensor:
        """x_BSD -> [B, S, D]. `rope`: of its positions, for `rotate`; `attend`: who sees whom."""
        # Not the number of heads: under tensor parallelism a rank holds some of them.
        q, k, v = (
            rearrange(project(x_BSD), "b s (h c) -> b s h c", c=self.head_dim)
            for project in (self.wq, self.wk, self.wv)
        )
        y_BSHC = attend(rotate(q, *rope), rotate(k, *rope), v)
        return self.wo(rearrange(y_BSHC, "b s h c -> b s (h c)"))


# -------------------------------------------------------------------------------------------------------- documents


def within_documents(documents_BS: Tensor) -> Attend:
    """Each position sees itself and those before it in its document; runs of equal integers are documents.

    Memory is linear in S: documents are taken one after the other. Reads the integers: best kept on the CPU.
    """
    runs = document_runs(documents_BS)

    def attend(q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
        pieces, sizes = [], [n * length for n, length in runs]
        in_turn = (x.flatten(0, 1).split(sizes) for x in (q_BSHC, k_BSNC, v_BSNC))
        for (n, length), *parts in zip(runs, *in_turn, strict=True):
            equal = (part.unflatten(0, (n, length)) for part in parts)
            pieces.append(_attention(*equal, is_causal=True).flatten(0, 1))
        return torch.cat(pieces).unflatten(0, q_BSHC.shape[:2])

    return attend


def document_runs(documents_BS: Tensor) -> list[tuple[int, int]]:
    """The documents of a batch, one after the other: (n, length) for n of them that are equally long."""
    starts = [*_first(documents_BS).flatten().nonzero().flatten().tolist(), documents_BS.numel()]
    lengths = (end - start for start, end in pairwise(starts))
    return [(sum(1 for _ in equal), length) for length, equal in groupby(lengths)]


def within_documents_by_mask(documents_BS: Tensor) -> Attend:
    """As `within_documents`, but memory quadratic in S, and one graph for torch.compile however they divide a batch."""
    run_BS = _first(documents_BS).cumsum(1)
    sees_B1SS = (run_BS.unsqueeze(2) == run_BS.unsqueeze(1)).tril_().unsqueeze(1)

    def attend(q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
        return _attention(q_BSHC, k_BSNC, v_BSNC, attn_mask=sees_B1SS)

    return attend


def _first(documents_BS: Tensor) -> Tensor:
    """Whether each position is the first of its document."""
    first_S = torch.arange(documents_BS.shape[1], device=documents_BS.device) == 0
    return (documents_BS != documents_BS.roll(1, 1)) | first_S


# ---------------------------------------------------------------------------------------------------------- padding


class TextFirst:
    """The positions of a batch with each sequence's text at the front, in order, and its padding behind.

    There causal attention already ignores the padding, positions count text alone, and memory stays linear in S,
    wherever the padding was.
    """

    def __init__(self, text_BS: Tensor, device: torch.device) -> None:
        self._order_BS = text_BS.to(device).logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        self._place_BS = self._order_BS.argsort(1)

    def front(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] with text at the front."""
        return _taken(x_BS, self._order_BS)

    def back(self, x_BS: Tensor) -> Tensor:
        """Undoes `front`."""
        return _taken(x_BS, self._place_BS)

    def rope(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rotations [S, 1, C] or [B, S, 1, C] of the positions at the front, each where its token is."""
        cos, sin = (self.back(t.expand(self._place_BS.shape[0], *t.shape[-3:])) for t in tables)
        return cos, sin

    def attend(self, attend: Attend) -> Attend:
        """`attend` as it sees text at the front."""
        return lambda q, k, v: self.back(attend(self.front(q), self.front(k), self.front(v)))


def _taken(x_BS: Tensor, places_BS: Tensor) -> Tensor:
    return x_BS.gather(1, places_BS.view(*places_BS.shape, *[1] * (x_BS.ndim - 2)).expand(x_BS.shape))


def text_of(mask_BS: Tensor, shape: torch.Size) -> Tensor:
    """A mask as bool [B, S]: True at text.

    Raises:
        ValueError: of another shape, or floating point, such as one that is added to scores.
    """
    if mask_BS.shape != shape:
        raise ValueError(f"mask {list(mask_BS.shape)} must have the shape of the tokens {list(shape)}")
    if mask_BS.is_floating_point():
        raise ValueError(f"mask of {mask_BS.dtype}: must be bool, or integers with 0 where there is no text")
    return mask_BS.bool()


def text_first(text_BS: Tensor, device: torch.device) -> TextFirst | None:
    """For tensors on `device`; None where text is at the front already, which is seen in a mask on the CPU."""
    if can_read(text_BS) and not (text_BS[:, 1:] & ~text_BS[:, :-1]).any():
        return None
    return TextFirst(text_BS, device)


# ------------------------------------------------------------------------------------------------------------ cache


class LayerCache(NamedTuple):
    """One layer's keys and values of B sequences, [B, N, P, C] each."""

    k_BNPC: Tensor
    v_BNPC: Tensor


class KVCache:
    """Keys and values of all layers for `batch` sequences of up to `max_len` positions; it brings its own attention.

    `lengths`: how many positions of each sequence are filled.
    """

    def __init__(self, cfg: Config, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (batch, cfg.attention.n_kv_heads, max_len, cfg.attention.head_dim)
        self.layers = [
            LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(cfg.n_layers)
        ]
        # The rotations of all its positions, made once.
        self._rope = rope_tables(0, max_len, cfg.attention.head_dim, cfg.attention.rope, dtype, torch.device(device))
        self.max_len = max_len
        self.lengths = [0] * batch

    def __repr__(self) -> str:
        keys = self.layers[0].k_BNPC
        shape = f"{len(self.layers)} layers, lengths={self.lengths}, max_len={self.max_len}"
        return f"KVCache({shape}, n_kv_heads={keys.shape[1]}, head_dim={keys.shape[3]}, {keys.dtype}, {keys.device})"

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Filled positions of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all sequences are equally long."""
        return len(set(self.lengths)) <= 1

    def rope(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin, for `rotate`, of the next `n` positions of each sequence."""
        places = slice(self.length, self.length + n) if self.even else self._next(n)
        cos, sin = (table[places] for table in self._rope)
        return cos, sin

    def attends(self, n: int) -> list[Attend]:
        """For each layer: stores the next `n` keys and values; their queries see these and all before them."""
        if self.even:
            return [functools.partial(_extend_evenly, cache, self.length) for cache in self.layers]
        at_BS = self._next(n)
        return [functools.partial(_extend, cache, at_BS, self.length + n) for cache in self.layers]

    def advance(self, n: int | Sequence[int]) -> None:
        """The next `n` positions of each sequence are filled, in every layer; or of each as many as it says."""
        more = [n] * self.batch if isinstance(n, int) else n
        self.lengths = [length + m for length, m in zip(self.lengths, more, strict=True)]

    def _next(self, n: int) -> Tensor:
        """The next `n` positions of each sequence, int64 [B, n]."""
        device = self.layers[0].k_BNPC.device
        return torch.tensor(self.lengths, device=device).unsqueeze(1) + torch.arange(n, device=device)


def _extend_evenly(cache: LayerCache, start: int, q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
    """Attention of the positions from `start` on, of sequences that are equally long."""
    (B, S, H, C), N = q_BSHC.shape, k_BSNC.shape[2]
    end = start + S
    k_BNPC, v_BNPC = cache.k_BNPC[:, :, :end], cache.v_BNPC[:, :, :end]
    k_BNPC[:, :, start:] = k_BSNC.transpose(1, 2)
    v_BNPC[:, :, start:] = v_BSNC.transpose(1, 2)
    if S == 1:
        # One position sees everything, so the heads that share a key head can be rows of one query: a single product.
        return F.scaled_dot_product_attention(q_BSHC.reshape(B, N, H // N, C), k_BNPC, v_BNPC).reshape(B, 1, H, C)
    if start == 0:
        return causal(q_BSHC, k_BSNC, v_BSNC)
    sees_SP = torch.ones(S, end, dtype=torch.bool, device=q_BSHC.device).tril(start)
    return _attention(q_BSHC, k_BNPC.transpose(1, 2), v_BNPC.transpose(1, 2), attn_mask=sees_SP)


def _extend(cache: LayerCache, at_BS: Tensor, end: int, q_BSHC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor) -> Tensor:
    """Attention of the positions `at_BS` of sequences of different lengths, all of them before `end`."""
    rows_B1 = torch.arange(len(at_BS), device=at_BS.device).unsqueeze(1)
    cache.k_BNPC[rows_B1, :, at_BS] = k_BSNC
    cache.v_BNPC[rows_B1, :, at_BS] = v_BSNC
    sees_B1SP = (torch.arange(end, device=at_BS.device) <= at_BS.unsqueeze(2)).unsqueeze(1)
    k_BPNC, v_BPNC = (x[:, :, :end].transpose(1, 2) for x in cache)
    return _attention(q_BSHC, k_BPNC, v_BPNC, attn_mask=sees_B1SP)
