"""The decoder: Block, Transformer, the one place where weights are made, and the simple `generate`.

Shape suffixes: L layers, B batch, S sequence, T = B*S tokens, D model width, V vocabulary, E experts, P positions.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from moe.checkpointing import MODES, run_block
from moe.config import Config
from moe.decode import DecodeStep
from moe.experts import MoE, Routing
from moe.kernels import ops
from moe.kernels.reference import IGNORE_INDEX
from moe.layers import (
    Attention,
    Documents,
    KVCache,
    LayerCache,
    Linear,
    RMSNorm,
    document_mask,
    document_runs,
    rope_tables,
)


@dataclass
class Output:
    """What a forward pass gives.

    `loss` is the training objective: cross-entropy + the weighted balance and z losses. `losses` holds its parts,
    unweighted, as scalars: "lm" (mean over the targets, nats), "balance" and "z" (means over the layers); with a
    cache there are none.
    """

    logits_BSV: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    routing: list[Routing] = field(default_factory=list)


class Embedding(nn.Embedding):
    """An nn.Embedding that leaves its weight to `init_weights`."""

    def reset_parameters(self) -> None:
        pass


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg.d_model, cfg.attention)
        self.moe_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.moe = MoE(cfg.d_model, cfg.experts, cfg.router)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        start: int = 0,
        documents: Documents | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Routing]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, cache, start, documents)
        # A step of generation has no use for the balance losses.
        y_BSD, routing = self.moe(self.moe_norm(x_BSD), with_losses=cache is None, recompute=recompute)
        return x_BSD + y_BSD, routing


class Transformer(nn.Module):
    """The whole model. Built on the meta device it holds no weights, whatever its size; elsewhere it is initialised.

    Args:
        cfg: the shape.
        seed: of the weights; the same seed gives the same weights under any sharding (see `init_weights`).

    `activation_checkpointing`, "none" at first, may be set to "selective" or "full" (moe/checkpointing.py) at any time.
    """

    def __init__(self, cfg: Config, seed: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.activation_checkpointing = "none"
        self.embedding = Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = Linear(cfg.d_model, cfg.vocab_size)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight
        if not self.head.weight.is_meta:
            init_weights(self, seed)

    @property
    def activation_checkpointing(self) -> str:
        """What a training step keeps for its backward: "none", "selective" or "full" checkpointing."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"activation_checkpointing = {mode!r}: must be one of {', '.join(map(repr, MODES))}")
        self._activation_checkpointing = mode

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        *,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Output:
        """Logits of the next token at every position, or, with targets, the loss without ever holding the logits.

        Args:
            tokens_BS: int64 ids, S <= max_seq_len (with a cache: what is in it included).
            targets_BS: int64 ids of the same shape, -100 where there is none to predict.
            documents_BS: integers of the same shape, on any device, best on the CPU: attention stays inside each run
                of equal ones.
            cache: holds the earlier positions, and takes these; without targets and documents only.

        Raises:
            ValueError: more positions than the model or the cache has, targets or documents together with a cache,
                another batch size than the cache's, or (on CPU, where looking costs nothing) ids outside the
                vocabulary.
        """
        start = cache.length if cache is not None else 0
        self._check_input(tokens_BS, targets_BS, documents_BS, cache, start + tokens_BS.shape[1])
        documents: Documents | None = None
        if documents_BS is not None:
            compiling = torch.compiler.is_compiling()
            documents = document_mask(documents_BS.to(tokens_BS.device)) if compiling else document_runs(documents_BS)
        x_BSD = self.embedding(tokens_BS)
        rope = self._rope(start, tokens_BS.shape[1], x_BSD, cache)
        out = Output()
        for i, block in enumerate(self.blocks):
            if cache is None:
                x_BSD, routing = run_block(block, x_BSD, rope, documents, self.activation_checkpointing)
            else:
                x_BSD, routing = block(x_BSD, rope, cache.layers[i], start)
            out.routing.append(routing)
        if cache is not None:
            cache.length = start + tokens_BS.shape[1]
        x_BSD = self.norm(x_BSD)
        if cache is None:
            out.losses["balance"] = torch.stack([r.balance for r in out.routing]).mean()
            out.losses["z"] = torch.stack([r.z for r in out.routing]).mean()
        if targets_BS is None:
            out.logits_BSV = self.head(x_BSD)
            return out
        total = ops.linear_cross_entropy(x_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten())
        out.losses["lm"] = total / (targets_BS != IGNORE_INDEX).sum().clamp(min=1)
        router = self.cfg.router
        out.loss = out.losses["lm"] + router.balance_loss * out.losses["balance"] + router.z_loss * out.losses["z"]
        return out

    def generate(self, prompt_BS: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """The prompt and what follows it, int64 [B, S + n]; sampling settings as in `stream`."""
        new_tokens = list(stream(self, prompt_BS, max_new_tokens, **sampling))
        return torch.stack([*prompt_BS.unbind(1), *new_tokens], dim=1)

    def _rope(self, start: int, length: int, like: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None:
            cos, sin = cache.rope
            return cos[start : start + length], sin[start : start + length]
        attention = self.cfg.attention
        return rope_tables(start, length, attention.head_dim, attention.rope, like.dtype, like.device)

    def _check_input(
        self, tokens: Tensor, targets: Tensor | None, documents: Tensor | None, cache: KVCache | None, length: int
    ) -> None:
        if length > self.cfg.max_seq_len:
            raise ValueError(
                f"sequence of {length} tokens, but max_seq_len = {self.cfg.max_seq_len} ({self.cfg.name}); "
                "cut the input or use a configuration with a longer context"
            )
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets {list(targets.shape)} must have the shape of the tokens {list(tokens.shape)}")
        if documents is not None and documents.shape != tokens.shape:
            raise ValueError(
                f"documents {list(documents.shape)} must have the shape of the tokens {list(tokens.shape)}"
            )
        if cache is not None:
            if targets is not None or documents is not None:
                name = "targets" if targets is not None else "documents"
                raise ValueError(f"{name} and cache exclude each other: with a cache, take the logits")
            if length > cache.max_len:
                raise ValueError(f"sequence of {length} tokens, but the cache was made for {cache.max_len}")
            if len(tokens) != cache.batch:
                raise ValueError(f"batch of {len(tokens)}, but the cache was made for {cache.batch}")
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (bound.item() for bound in tokens.aminmax())
            if low < 0 or high >= self.cfg.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self.cfg.vocab_size} ids "
                    f"({self.cfg.name}): the text was encoded with another tokenizer"
                )


# ---------------------------------------------------------------------------------------------------------- weights


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Give every parameter its first value, in place.

    | parameter | value |
    |---|---|
    | norms | 1 |
    | embedding | normal, std 1 |
    | output layer, tied embedding | normal, std 0.02 |
    | wq, wk, wv, w_in, router | normal, std 1 / sqrt(fan-in) / 2 |
    | wo, w_out (they write to the residual stream) | the same / sqrt(2 L) |

    Each parameter draws from a generator of its own, seeded by (seed, name), and each expert's slice from one seeded
    by (seed, name, expert): whichever slices a rank holds, it draws the values the whole model would have.
    """
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind.endswith("norm"):
            parameter.fill_(1.0)
        elif kind in ("embedding", "head"):
            std = 1.0 if kind == "embedding" and not model.cfg.tie_embeddings else 0.02
            parameter.normal_(0.0, std, generator=generator_for(parameter.device, seed, name))
        else:
            std = 0.5 / math.sqrt(parameter.shape[-1])
            if kind in ("wo", "w_out_EDF"):
                std /= math.sqrt(2 * model.cfg.n_layers)
            slices = parameter if kind in ("w_in_EGFD", "w_out_EDF") else [parameter]
            for e, part in enumerate(slices):
                part.normal_(0.0, std, generator=generator_for(parameter.device, seed, name, e))


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator of its own for each key: the same values wherever, and in whatever order, they are drawn."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


# ------------------------------------------------------------------------------------------------------- generation


def sample(
    logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row -> int64 [B]. Temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing off.

    top_p keeps the smallest set of tokens whose probabilities reach it, the token that crosses it included.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    probabilities_BV, ids_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= top_p, 0.0)
    choice_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
    return ids_BV.gather(1, choice_B1).squeeze(1)


@torch.no_grad()
def stream(
    model: Transformer,
    prompt_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 [B], `max_new_tokens` times, or until the context is full.

    Args:
        prompt_BS: int64 ids, at least one token.
        temperature: 0 for greedy. top_k: 0 for all. top_p: in (0, 1], 1 for all.

    Raises:
        ValueError: an empty or over-long prompt, or a sampling setting out of range.
    """
    for name, value, ok, rule in (
        ("prompt", list(prompt_BS.shape), prompt_BS.ndim == 2 and prompt_BS.shape[1] > 0, "must be [B, S] with S > 0"),
        ("temperature", temperature, temperature >= 0, "must be 0 or more"),
        ("top_k", top_k, top_k >= 0, "must be 0 (all) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "must be in (0, 1]"),
    ):
        if not ok:
            raise ValueError(f"{name} = {value}: {rule}")
    batch, length = prompt_BS.shape
    max_len = min(length + max_new_tokens, model.cfg.max_seq_len)
    weight = model.embedding.weight
    cache = KVCache(model.cfg, batch, max(max_len, length), weight.dtype, weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    step = DecodeStep(model, cache) if DecodeStep.fits(model) else None
    logits_BV = model(prompt_BS, cache=cache).logits_BSV[:, -1]
    for n in range(1, max_new_tokens + 1):
        next_B = sample(logits_BV, temperature, top_k, top_p, generator)
        yield next_B
        if n == max_new_tokens or cache.length == model.cfg.max_seq_len:
            return
        logits_BV = step(next_B) if step else model(next_B.unsqueeze(1), cache=cache).logits_BSV[:, -1]
