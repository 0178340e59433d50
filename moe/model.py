"""The decoder: Block, Transformer, its objective, and the simple `generate`.

Shape suffixes: L layers, B batch, S sequence, T = B*S tokens, D model width, V vocabulary, E experts, P positions.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from moe.config import Config, RouterConfig
from moe.experts import Experts, MoE, Routing, router_sums
from moe.kernels.arguments import can_read
from moe.kernels.loss import IGNORE_INDEX
from moe.layers import (
    MLP,
    Attend,
    Attention,
    Head,
    KVCache,
    RMSNorm,
    at_least_fp32,
    attend_within,
    causal,
    rope_tables,
    text_first,
    text_of,
    untouched,
)
from moe.recompute import MODES, run_block
from moe.weights import complete_tied, init_weights, made_by_init_weights, tie

# -------------------------------------------------------------------------------------------------------- objective


class Sums(NamedTuple):
    """The parts of the objective, summed over a forward pass: parts of a batch, wherever they ran, add up."""

    lm: Tensor | None  # cross-entropy in nats, over the targets; None without any
    balance: Tensor  # of Routing.balance_B, over the sequences; the mean over the layers
    z: Tensor  # of Routing.z_T, over the tokens; the mean over the layers


class Counts(NamedTuple):
    """What the sums are divided by."""

    targets: Tensor | int
    sequences: Tensor | int  # that have text
    tokens: Tensor | int  # of text


def objective(router: RouterConfig, sums: Sums, counts: Counts) -> Tensor:
    """The training objective, a scalar: mean cross-entropy + the weighted means of the router's two losses.

    The one place where it is put together. For one part of a larger batch, take the `counts` of all of it: then the
    objectives, and the gradients, of the parts add up to those of the whole.
    """
    means = losses(sums, counts)
    return means["lm"] + router.balance_loss * means["balance"] + router.z_loss * means["z"]


def losses(sums: Sums, counts: Counts) -> dict[str, Tensor]:
    """The means of the sums, by name; of nothing, such as targets that are all -100, a mean is 0."""
    means = {"balance": _mean(sums.balance, counts.sequences), "z": _mean(sums.z, counts.tokens)}
    if sums.lm is not None:
        means["lm"] = _mean(sums.lm, counts.targets)
    return means


def _mean(total: Tensor, n: Tensor | int) -> Tensor:
    return total / (n.to(total.device).clamp(min=1) if isinstance(n, Tensor) else max(n, 1))


@dataclass
class Output:
    """What a forward pass gives: logits, or with targets the sums of its losses; of a part of a model without an output
    layer (a pipeline stage) the hidden states that it passes on. With a cache there are no sums.
    """

    router: RouterConfig
    logits_BSV: Tensor | None = None
    hidden_BSD: Tensor | None = None
    sums: Sums | None = None
    counts: Counts | None = None
    routing: list[Routing] = field(default_factory=list)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The means of the sums, unweighted scalars: "balance", "z", and with targets "lm" (nats)."""
        return {} if self.sums is None or self.counts is None else losses(self.sums, self.counts)

    @property
    def loss(self) -> Tensor | None:
        """The objective of this pass alone; None without targets."""
        if self.sums is None or self.counts is None or self.sums.lm is None:
            return None
        return objective(self.router, self.sums, self.counts)


# A tree of tensors: so DistributedDataParallel, FSDP and torch.export see what they have to handle.
_PARTS = ("logits_BSV", "hidden_BSD", "sums", "counts", "routing")


def _flatten(out: Any) -> tuple[list[Any], RouterConfig]:
    return [getattr(out, name) for name in _PARTS], out.router


def _flatten_with_keys(out: Any) -> tuple[list[tuple[Any, Any]], RouterConfig]:
    return [(pytree.GetAttrKey(name), getattr(out, name)) for name in _PARTS], out.router


pytree.register_pytree_node(
    Output,
    _flatten,
    lambda parts, router: Output(router, *parts),
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="moe.Output",
    to_dumpable_context=asdict,
    from_dumpable_context=lambda content: RouterConfig(**content),
)
for _part in (Sums, Counts, Routing):
    pytree._register_namedtuple(_part, serialized_type_name=f"moe.{_part.__name__}")


if TYPE_CHECKING:  # what is surely there, for type checkers; `sums` and `counts` unless there is a cache

    class OutputWithLogits(Output):
        logits_BSV: Tensor
        sums: Sums
        counts: Counts

    class OutputWithLoss(Output):
        loss: Tensor
        sums: Sums
        counts: Counts

    class _How(TypedDict, total=False):
        documents_BS: Tensor | None
        mask_BS: Tensor | None
        cache: KVCache | None


# ------------------------------------------------------------------------------------------------------------ model


class Embedding(nn.Embedding):
    """An nn.Embedding that leaves its weight to `init_weights`."""

    reset_parameters = made_by_init_weights

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(vocab_size, d_model, _weight=torch.empty(vocab_size, d_model))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + experts(norm(x)), or a plain MLP in their place.

    `kind`: one of `Config.layer_kinds`. `moe` is None in a dense block, `mlp` in one with experts.
    """

    def __init__(self, cfg: Config, kind: str = "moe") -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg.d_model, cfg.attention)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.moe = MoE(cfg.d_model, cfg.experts, cfg.router) if kind == "moe" else None
        self.mlp = MLP(cfg.d_model, cfg.dense.d_ff, cfg.experts.activation) if kind == "dense" and cfg.dense else None

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend = causal
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, attend)
        n_BSD = self.mlp_norm(x_BSD)
        if self.mlp is not None:
            return x_BSD + self.mlp(n_BSD), None
        y_BSD, routing = self.moe(n_BSD)  # type: ignore[misc]
        return x_BSD + y_BSD, routing


class Transformer(nn.Module):
    """The whole model. Built on the meta device it holds no weights, whatever its size; elsewhere it is initialised.

    A part of it, such as a pipeline stage, is the same model with what it lacks set to None: `embedding` (it then takes
    hidden states [B, S, D] for tokens), any of `blocks`, `norm` and `head` (it then gives `hidden_BSD`). Names stay.

    Args:
        cfg: the shape.
        seed: of the weights; the same seed gives the same weights under any sharding (see `init_weights`).

    `activation_checkpointing`, "none" at first, may be set to "selective" or "full" (moe/recompute.py) at any time.
    """

    def __init__(self, cfg: Config, seed: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, kind) for kind in cfg.layer_kinds)
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = Head(cfg.d_model, cfg.vocab_size)
        self.activation_checkpointing = "none"
        self.register_load_state_dict_post_hook(_tie_again)
        self.tie_weights()
        if not self.head.weight.is_meta:
            init_weights(self, seed)

    def tie_weights(self) -> None:
        """Makes the output layer's weight the embedding's, where the configuration ties them and both are ours."""
        if self._ties():
            tie(self.embedding, self.head)

    def _ties(self) -> bool:
        return self.cfg.tie_embeddings and isinstance(self.embedding, Embedding) and isinstance(self.head, Head)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        super()._apply(fn, recurse)  # off the meta device it makes a parameter for each name
        self.tie_weights()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._ties():
            complete_tied(state_dict, f"{prefix}embedding.weight", f"{prefix}head.weight", errors=args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def activation_checkpointing(self) -> str:
        """What a training step keeps for its backward: "none", "selective" or "full" checkpointing."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"activation_checkpointing = {mode!r}: must be one of {', '.join(map(repr, MODES))}")
        self._activation_checkpointing = mode
        for module in self.modules():
            if isinstance(module, Experts):
                module.recompute = mode == "selective"

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        *,
        documents_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Output:
        """Logits of the next token at every position, or, with targets, the loss without ever holding the logits.

        Args:
            tokens_BS: int64 ids, S <= max_seq_len (with a cache: what is in it included).
            targets_BS: int64 ids of the same shape, -100 where there is none to predict.
            documents_BS: integers of the same shape, on any device, best on the CPU: attention stays inside each run
                of equal ones.
            mask_BS: False, or 0, at padding: tokens of the same shape that are no text, anywhere in a sequence; on any
                device, best on the CPU. Text is treated as if they were not there: by attention, positions, targets,
                losses and counts. What comes out at padding means nothing.
            cache: holds the earlier positions, and takes these; without targets and documents only.

        Raises:
            ValueError: more positions than the model or the cache has, targets or documents together with a cache,
                another batch size than the cache's, or (on CPU, where looking costs nothing) ids outside the
                vocabulary.
        """
        self._check_input(tokens_BS, targets_BS, documents_BS, cache)
        B, S = tokens_BS.shape[:2]
        text_BS = None if mask_BS is None else text_of(mask_BS, tokens_BS.shape[:2])
        x_BSD = tokens_BS if self.embedding is None else self.embedding(tokens_BS)
        moved = None if text_BS is None else text_first(text_BS, x_BSD.device)
        if cache is not None:
            rope, attends = cache.rope(S), cache.attends(S)
        else:
            attention = self.cfg.attention
            rope = rope_tables(0, S, attention.head_dim, attention.rope, x_BSD.dtype, x_BSD.device)
            if documents_BS is not None and moved is not None:
                documents_BS = moved.front(documents_BS.to(x_BSD.device))
            attends = [attend_within(documents_BS, x_BSD.device)] * len(self.blocks)
        if moved is not None:
            rope, attends = moved.rope(rope), [moved.attend(attend) for attend in attends]
        if text_BS is not None:
            text_BS = text_BS.to(x_BSD.device)
        out = Output(self.cfg.router)
        mode = self.activation_checkpointing if cache is None else "none"
        for block, attend in zip(self.blocks, attends, strict=True):
            if block is not None:
                x_BSD, routing = run_block(block, x_BSD, rope, attend, mode)
                if routing is not None:
                    out.routing.append(routing if text_BS is None else routing._replace(text_BS=text_BS))
        if cache is not None:
            cache.advance(S if text_BS is None else text_BS.sum(1).tolist())
        if self.norm is not None:
            x_BSD = self.norm(x_BSD)
        lm, n_targets = None, 0
        if self.head is None:
            out.hidden_BSD = x_BSD
        elif targets_BS is None:
            out.logits_BSV = self.head(x_BSD)
        else:
            if text_BS is not None:
                targets_BS = targets_BS.masked_fill(~text_BS, IGNORE_INDEX)
            lm, n_targets = _cross_entropy(self.head, x_BSD, targets_BS), (targets_BS != IGNORE_INDEX).sum()
        if cache is None:
            # Sums and counts only: what is made of them is made outside of a compiled graph, whose scalar outputs that
            # depend on each other torch 2.13's compiler differentiates wrongly.
            sequences, tokens = (B, B * S) if text_BS is None else (text_BS.any(1).sum(), text_BS.sum())
            out.sums = Sums(lm, *router_sums(out.routing, x_BSD))
            out.counts = Counts(n_targets, sequences, tokens)
        return out

    if TYPE_CHECKING:
        # Of nn.Module it is Any.
        @overload
        def __call__(self, tokens_BS: Tensor, targets_BS: None = None, **how: Unpack[_How]) -> OutputWithLogits: ...
        @overload
        def __call__(self, tokens_BS: Tensor, targets_BS: Tensor, **how: Unpack[_How]) -> OutputWithLoss: ...
        def __call__(self, *args: Any, **how: Any) -> Any: ...

    @torch.no_grad()
    def generate(
        self,
        prompt_BS: Tensor,
        max_new_tokens: int,
        *,
        mask_BS: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_id: int | Collection[int] | None = None,
    ) -> Tensor:
        """The prompt and what follows it, int64 [B, S + n], until the context is full or every sequence has ended:
        simply, module by module.

        `moe.generate.stream` is the fast way to the same tokens; settings, and what they raise, as there.
        """
        check_sampling(prompt_BS, temperature, top_k, top_p, mask_BS, max_new_tokens)
        (B, S), weight = prompt_BS.shape, self.embedding.weight
        n = min(max_new_tokens, max(1, self.cfg.max_seq_len + 1 - S))
        cache = KVCache(self.cfg, B, S + max(0, n - 1), weight.dtype, weight.device)
        generator, ends = torch.Generator(weight.device).manual_seed(seed), Ends(eos_id, self.cfg.vocab_size)
        tokens_BS, new_BS = prompt_BS, prompt_BS
        for _ in range(n):
            if ends.all():
                break
            logits_BV = last_of_text(self(new_BS, mask_BS=mask_BS, cache=cache).logits_BSV, mask_BS)
            new_BS = ends.hold(sample(logits_BV, temperature, top_k, top_p, generator)).unsqueeze(1)
            mask_BS = None
            tokens_BS = torch.cat([tokens_BS, new_BS], 1)
        return tokens_BS

    def _check_input(
        self, tokens: Tensor, targets: Tensor | None, documents: Tensor | None, cache: KVCache | None
    ) -> None:
        if self.embedding is not None and (tokens.dim() != 2 or tokens.is_floating_point()):
            given = f"{list(tokens.shape)} in {str(tokens.dtype).removeprefix('torch.')}"
            raise ValueError(f"tokens {given}: must be int64 ids [batch, sequence]; one text is tokens.unsqueeze(0)")
        batch, length = tokens.shape[0], tokens.shape[1] + (cache.length if cache is not None else 0)
        if length > self.cfg.max_seq_len:
            raise ValueError(
                f"sequence of {length} tokens, but max_seq_len = {self.cfg.max_seq_len} ({self.cfg.name}); "
                "cut the input or use a configuration with a longer context"
            )
        for name, other in (("targets", targets), ("documents", documents)):
            if other is None:
                continue
            if other.shape != tokens.shape[:2]:
                raise ValueError(
                    f"{name} {list(other.shape)} must have the shape of the tokens {list(tokens.shape[:2])}"
                )
            if cache is not None:
                raise ValueError(f"{name} and cache exclude each other: with a cache, take the logits")
        if cache is not None:
            if length > cache.max_len:
                raise ValueError(f"sequence of {length} tokens, but the cache was made for {cache.max_len}")
            if batch != cache.batch:
                raise ValueError(f"batch of {batch}, but the cache was made for {cache.batch}")
        if self.embedding is not None:
            _check_ids("token", tokens, self.cfg)
        if targets is not None and self.head is not None:
            _check_ids("target", targets, self.cfg, unless=IGNORE_INDEX)


def _check_ids(what: str, ids: Tensor, cfg: Config, unless: int | None = None) -> None:
    """Raises ValueError for ids outside the vocabulary, where looking costs nothing."""
    if not can_read(ids) or not ids.numel():
        return
    low, high = (bound.item() for bound in (ids if unless is None else ids.masked_fill(ids == unless, 0)).aminmax())
    if low < 0 or high >= cfg.vocab_size:
        raise ValueError(
            f"{what} id {low if low < 0 else high} is outside the vocabulary of {cfg.vocab_size} ids ({cfg.name}): "
            "the text was encoded with another tokenizer"
        )


def _tie_again(model: Transformer, _keys: Any) -> None:
    model.tie_weights()  # load_state_dict(assign=True), too, makes a parameter for each name


def _cross_entropy(head: nn.Module, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """The sum over the targets: by the head's own fused loss, or of the logits of whatever is in its place."""
    if untouched(head, Head, called=True):
        return head(x_BSD, targets_BS)
    logits_BSV = head(x_BSD)
    logits_TV = logits_BSV.flatten(0, 1).to(at_least_fp32(logits_BSV.dtype))
    return F.cross_entropy(logits_TV, targets_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


# ------------------------------------------------------------------------------------------------------- generation


def check_sampling(
    prompt_BS: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    mask_BS: Tensor | None = None,
    max_new_tokens: int = 0,
) -> None:
    """Raises ValueError for an empty prompt or a sampling setting out of range."""
    for name, value, ok, rule in (
        ("prompt", list(prompt_BS.shape), prompt_BS.ndim == 2 and prompt_BS.shape[1] > 0, "must be [B, S] with S > 0"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "must be 0 or more"),
        ("temperature", temperature, temperature >= 0, "must be 0 or more"),
        ("top_k", top_k, top_k >= 0, "must be 0 (all) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "must be in (0, 1]"),
    ):
        if not ok:
            raise ValueError(f"{name} = {value}: {rule}")
    if mask_BS is not None and not (with_text_B := text_of(mask_BS, prompt_BS.shape).any(1)).all():
        raise ValueError(f"prompt {int(with_text_B.int().argmin())} has no token that its mask calls text")


class Ends:
    """Sequences that have written their end repeat it.

    Args:
        eos_id: the id that ends a sequence, or several of them; None for none.

    Raises:
        ValueError: an id that the model does not have.
    """

    def __init__(self, eos_id: int | Collection[int] | None, vocab_size: int) -> None:
        self.ids = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
        for i in self.ids:
            if not 0 <= i < vocab_size:
                raise ValueError(f"eos_id = {i}: must be an id of the vocabulary, 0 to {vocab_size - 1}")
        self.ended_B: Tensor | None = None
        self.last_B: Tensor | None = None

    def hold(self, next_B: Tensor) -> Tensor:
        """The newest tokens, int64 [B], in their place the end again where a sequence has ended."""
        if self.ids:
            if self.ended_B is not None and self.last_B is not None:
                next_B = torch.where(self.ended_B, self.last_B, next_B)
            self.last_B, self.ended_B = next_B, torch.isin(next_B, torch.tensor(self.ids, device=next_B.device))
        return next_B

    def all(self) -> bool:
        """Whether every sequence has ended. Waits for the device."""
        return self.ended_B is not None and bool(self.ended_B.all())


def last_of_text(x_BSV: Tensor, mask_BS: Tensor | None) -> Tensor:
    """[B, V]: what stands at the last token of each sequence, or at the last that its mask calls text."""
    if mask_BS is None:
        return x_BSV[:, -1]
    S = x_BSV.shape[1]
    last_B = S - 1 - mask_BS.to(x_BSV.device).bool().flip(1).int().argmax(1)
    return x_BSV[torch.arange(len(last_B), device=x_BSV.device), last_B]


def sample(
    logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row -> int64 [B]. Temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing off.

    top_p keeps the smallest set of tokens whose probabilities reach it, the token that crosses it included.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    # Below 1e-20 any two logits that differ are already as far apart as can be, and the quotient would overflow.
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / max(temperature, 1e-20)
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    probabilities_BV, ids_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= max(top_p, 1e-30), 0.0)  # never all of them
    choice_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
    return ids_BV.gather(1, choice_B1).squeeze(1)
