"""What the routers of a model do: load, balance, confidence, correlation, specialisation. Exact counts, streaming.

    with moe.profile.routing(model) as p:
        model(tokens)
    p.counts_LE, p.load_entropy_L, p.drop_rate_L(1.25)

Every statistic is a sum over tokens or passes, kept on the model's device and read only when asked for: memory does
not grow with the number of tokens, and the forward pass never waits.

Shape suffixes: L layers, B batch, S sequence, T = B*S tokens, E experts, K experts per token, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from moe.profile import observe
from moe.profile.observe import Pass

MAX_SPANS = 256  # of the load over time
MAX_TOKEN_COUNTS = 2**28  # L * E * V up to which token classes are counted (1 GiB of int32)


@dataclass
class Share:
    """How much of a source's text each expert serves, with the uncertainty of the estimate."""

    mean_LE: Tensor  # mean over sequences of the share of routed tokens; each row sums to 1
    error_LE: Tensor  # standard error of that mean: sequences, not tokens, are independent
    sequences: int


@dataclass
class _Moments:
    """Sum and sum of squares over sequences of the experts' shares."""

    sequences: int
    sum_LE: Tensor
    square_LE: Tensor


class RoutingProfile:
    """Streaming statistics of routing; see the module. `update` takes a pass, `routing` feeds it from a model.

    Args:
        n_experts: E.
        vocab_size: counts the tokens that each expert reads, where L * E * V is at most 2^28.
        capacity_factors: for `drop_rate_L`.
    """

    def __init__(
        self, n_experts: int, vocab_size: int = 0, capacity_factors: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    ) -> None:
        self.n_experts = n_experts
        self.vocab_size = vocab_size
        self.capacity_factors = capacity_factors
        self.source: str | None = None  # of the passes to come
        self.passes = 0
        self.tokens = 0
        self._top_k = 0
        self._device: torch.device | None = None
        self._spans: list[tuple[int, Tensor]] = []  # (passes, counts_LE)
        self._passes_per_span = 1
        self._sources: dict[str, _Moments] = {}
        self._sums: dict[str, Tensor] = {}
        self._token_counts_LEV: Tensor | None = None

    # ------------------------------------------------------------------------------------------------------- feeding

    def update(self, p: Pass) -> None:
        """Counts the text of one forward pass: the same under autocast, inference mode and any default dtype."""
        device = self._device = self._device or p.ids_LTK.device  # that of the first pass, whatever runs elsewhere
        p = p._replace(**{name: x.to(device) for name, x in p._asdict().items() if isinstance(x, Tensor)})
        with torch.no_grad(), torch.inference_mode(False), torch.autocast(device.type, enabled=False), device:
            self._update(p)

    def _update(self, p: Pass) -> None:
        row_T = torch.arange(p.shape[0]).repeat_interleave(p.shape[1])
        if p.text_T is not None:
            row_T = row_T[p.text_T]
        p, B = p.text(), p.shape[0]
        ids, E = p.ids_LTK, self.n_experts
        L, T, K = ids.shape
        if self.passes and len(self._sums["counts"]) != L:
            raise ValueError(f"this pass has {L} layers, those before had {len(self._sums['counts'])}")
        if T == 0:
            return
        chosen_LTE = torch.zeros(L, T, E, dtype=torch.float32, device=ids.device).scatter_(2, ids, 1.0)
        first_LTE = F.one_hot(ids[..., 0], E).to(torch.float32)
        counts_LE = chosen_LTE.sum(1)
        logits = p.logits_LTE.float()
        log_p = logits.log_softmax(-1)
        self._add("counts", counts_LE.long())
        self._add("first", first_LTE.sum(1).long())
        # Integers up to 2^24 are exact in float32, and a pass has fewer tokens.
        self._add("together", (chosen_LTE.mT @ chosen_LTE).long())
        self._add("next_layer", (first_LTE[:-1].mT @ first_LTE[1:]).long())
        self._add("weight", torch.zeros_like(chosen_LTE).scatter_(2, ids, p.weights_LTK.float()).sum(1).double())
        self._add("entropy", -(log_p.exp() * log_p).sum(-1).sum(1).double())
        self._add("top_probability", log_p.amax(-1).exp().sum(1).double())
        self._add("top_weight", p.weights_LTK[..., 0].sum(1).double())
        self._add("max_over_mean", (counts_LE.amax(1) * (E / (T * K))).double())
        for factor in self.capacity_factors:
            capacity = math.ceil(factor * T * K / E)
            self._add(f"dropped {factor}", (counts_LE - capacity).clamp(min=0).sum(1).long())
        follows = row_T[1:] == row_T[:-1]
        self._add("pairs", follows.sum())
        self._add("same_as_before", ((ids[:, 1:, 0] == ids[:, :-1, 0]) & follows).sum(1))
        if self.source is not None:
            chosen_LBE = chosen_LTE.new_zeros(L, B, E).index_add_(1, row_T, chosen_LTE).double()
            has_text_B = chosen_LBE[0].sum(1) > 0
            self._add_source(self.source, (chosen_LBE / chosen_LBE.sum(2, keepdim=True))[:, has_text_B])
        if p.tokens_T is not None and 0 < L * E * self.vocab_size <= MAX_TOKEN_COUNTS:
            self._add_tokens(ids, p.tokens_T)
        self._add_span(counts_LE.long())
        self.passes, self.tokens, self._top_k = self.passes + 1, self.tokens + T, K

    def _add(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value.clone()  # never a tensor of inference mode, which could not be added to later

    def _add_source(self, source: str, shares_LBE: Tensor) -> None:
        new = _Moments(shares_LBE.shape[1], shares_LBE.sum(1), shares_LBE.square().sum(1))
        if old := self._sources.get(source):
            new = _Moments(old.sequences + new.sequences, old.sum_LE + new.sum_LE, old.square_LE + new.square_LE)
        self._sources[source] = new

    def _add_tokens(self, ids_LTK: Tensor, tokens_T: Tensor) -> None:
        L = len(ids_LTK)
        if self._token_counts_LEV is None:
            shape = L, self.n_experts * self.vocab_size
            self._token_counts_LEV = torch.zeros(shape, dtype=torch.int32, device=ids_LTK.device)
        # Flat, as CUDA's deterministic algorithms add into one dimension only.
        layer_L = torch.arange(L, device=ids_LTK.device)[:, None, None] * self.n_experts
        known_T = (tokens_T >= 0) & (tokens_T < self.vocab_size)
        at_LTK = (layer_L + ids_LTK) * self.vocab_size + torch.where(known_T, tokens_T, 0)[:, None]
        counted_LTK = known_T[:, None].expand_as(at_LTK).to(torch.int32)
        self._token_counts_LEV.view(-1).scatter_add_(0, at_LTK.flatten(), counted_LTK.flatten())
        self._add("outside the vocabulary", (~known_T).sum())

    def _add_span(self, counts_LE: Tensor) -> None:
        """Loads over time, at most MAX_SPANS of them: when they are full, neighbours merge."""
        if self._spans and self._spans[-1][0] < self._passes_per_span:
            passes, counts = self._spans[-1]
            self._spans[-1] = (passes + 1, counts + counts_LE)
            return
        if len(self._spans) == MAX_SPANS:
            pairs = zip(self._spans[::2], self._spans[1::2], strict=True)
            self._spans = [(n + m, a + b) for (n, a), (m, b) in pairs]
            self._passes_per_span *= 2
        self._spans.append((1, counts_LE))

    # ------------------------------------------------------------------------------------------------------- reading

    def _sum(self, name: str) -> Tensor:
        if not self.passes:
            raise ValueError("nothing was profiled yet: run the model inside `with moe.profile.routing(model)`")
        return self._sums[name].cpu()

    @property
    def counts_LE(self) -> Tensor:
        """Routed tokens, int64; each row sums to tokens * K."""
        return self._sum("counts")

    @property
    def first_counts_LE(self) -> Tensor:
        """Tokens whose first choice an expert was, int64; each row sums to the tokens."""
        return self._sum("first")

    @property
    def load_LE(self) -> Tensor:
        """Share of the routed tokens, float64; each row sums to 1."""
        return self.counts_LE.double() / (self.tokens * self._top_k)

    @property
    def load_entropy_L(self) -> Tensor:
        """Entropy of the load over its maximum log E: 1 when even, 0 when one expert serves everything."""
        return load_entropy(self.load_LE)

    @property
    def load_cv_L(self) -> Tensor:
        """Coefficient of variation of the load: standard deviation over mean, 0 when even."""
        return self.load_LE.std(1, correction=0) * self.n_experts

    @property
    def max_over_mean_L(self) -> Tensor:
        """The busiest expert's tokens over the mean, of all tokens together."""
        return self.load_LE.amax(1) * self.n_experts

    @property
    def pass_max_over_mean_L(self) -> Tensor:
        """The same within a pass, averaged over passes: what a step waits for."""
        return self._sum("max_over_mean") / self.passes

    def drop_rate_L(self, capacity_factor: float) -> Tensor:
        """Share of routed tokens above ceil(factor * T * K / E) per expert and pass: what a capacity would drop."""
        if capacity_factor not in self.capacity_factors:
            known = ", ".join(f"{f:g}" for f in self.capacity_factors)
            raise ValueError(f"capacity_factor = {capacity_factor}: was not counted; counted were {known}")
        return self._sum(f"dropped {capacity_factor}").double() / (self.tokens * self._top_k)

    @property
    def weight_LE(self) -> Tensor:
        """Mean routing weight of an expert over the tokens it serves; nan where it serves none."""
        return self._sum("weight") / self.counts_LE

    @property
    def router_entropy_L(self) -> Tensor:
        """Mean entropy, in nats, of the router's softmax over all experts."""
        return self._sum("entropy") / self.tokens

    @property
    def top_probability_L(self) -> Tensor:
        """Mean probability of the likeliest expert: the router's confidence."""
        return self._sum("top_probability") / self.tokens

    @property
    def top_weight_L(self) -> Tensor:
        """Mean routing weight of the first choice; 1 / K when the router does not care."""
        return self._sum("top_weight") / self.tokens

    @property
    def coactivation_LEE(self) -> Tensor:
        """Tokens that an ordered pair of experts serves together, int64; the diagonal holds `counts_LE`."""
        return self._sum("together")

    @property
    def coactivation_lift_LEE(self) -> Tensor:
        """How much more often two experts serve a token together than if pairs came in proportion to their loads.

        float64, 1 by chance; nan on the diagonal and where an expert is idle.
        """
        counts = self.counts_LE.double()
        product = counts[:, :, None] * counts[:, None, :]
        product.diagonal(dim1=1, dim2=2).zero_()
        pairs = self.coactivation_LEE.double()
        pairs.diagonal(dim1=1, dim2=2).zero_()
        expected = product * pairs.sum((1, 2), keepdim=True) / product.sum((1, 2), keepdim=True)
        return torch.where(product > 0, pairs / expected, math.nan)

    @property
    def repeat_rate_L(self) -> Tensor:
        """How often a token's first choice is that of the token before it."""
        return self._sum("same_as_before").double() / self._sum("pairs").clamp(min=1)

    @property
    def expected_repeat_rate_L(self) -> Tensor:
        """The same were tokens independent: the sum of squared shares of first choices."""
        return (self.first_counts_LE.double() / self.tokens).square().sum(1)

    @property
    def next_layer_counts(self) -> Tensor:
        """[L - 1, E, E] int64: tokens with first choice i in a layer and j in the next."""
        return self._sum("next_layer")

    @property
    def next_layer_information(self) -> Tensor:
        """[L - 1] float64: mutual information of first choices in neighbouring layers over the smaller entropy.

        1 when one determines the other, 0 when independent (a finite sample is a little above 0).
        """
        joint = self.next_layer_counts.double() / self.tokens
        own, other = joint.sum(2), joint.sum(1)
        entropies = torch.special.entr(own).sum(1), torch.special.entr(other).sum(1)
        information = entropies[0] + entropies[1] - torch.special.entr(joint).sum((1, 2))
        return information / torch.minimum(*entropies).clamp(min=1e-12)

    @property
    def load_over_time(self) -> tuple[Tensor, Tensor]:
        """Up to 256 spans of the run, in order: passes of each, int64 [N], and its loads, float64 [N, L, E]."""
        if not self._spans:
            raise ValueError("nothing was profiled yet: run the model inside `with moe.profile.routing(model)`")
        counts_NLE = torch.stack([counts for _, counts in self._spans]).cpu().double()
        return torch.tensor([n for n, _ in self._spans], device="cpu"), counts_NLE / counts_NLE.sum(2, keepdim=True)

    @property
    def sources(self) -> dict[str, Share]:
        """Per source named in `source`: the experts' shares of its text, with standard errors over its sequences."""
        found = {}
        for name, m in self._sources.items():
            mean = m.sum_LE.cpu() / m.sequences
            variance = (m.square_LE.cpu() / m.sequences - mean.square()).clamp(min=0)
            # Bessel's correction; with one sequence the error is unknown.
            error = (variance / (m.sequences - 1)).sqrt() if m.sequences > 1 else torch.full_like(mean, math.nan)
            found[name] = Share(mean, error, m.sequences)
        return found

    def specialisation(self, one: str, other: str) -> tuple[Tensor, Tensor]:
        """How differently two sources use each expert.

        Returns:
            difference_LE: share of `one` minus share of `other`; and z_LE, that difference over its standard error
            (beyond +-4 it is no chance, even among hundreds of experts).
        """
        shares = self.sources
        for name in (one, other):
            if name not in shares:
                raise ValueError(f"source {name!r}: not profiled; there are {', '.join(sorted(shares)) or 'none'}")
        a, b = shares[one], shares[other]
        difference = a.mean_LE - b.mean_LE
        z_LE = difference / (a.error_LE.square() + b.error_LE.square()).sqrt()
        return difference, torch.where(difference == 0, 0.0, z_LE)  # no difference is none, even without any error

    def dead_experts(self, below: float = 0.1) -> list[tuple[int, int]]:
        """(layer, expert) of those with less than `below` times the mean load."""
        return [(int(i), int(e)) for i, e in (self.load_LE * self.n_experts < below).nonzero()]

    @property
    def token_counts_LEV(self) -> Tensor:
        """How often each expert serves each token of the vocabulary, int32.

        Raises:
            ValueError: not counted: no `vocab_size`, too large, too small, or a model called without token ids.
        """
        if self._token_counts_LEV is None:
            raise ValueError("tokens were not counted: give vocab_size (L * E * V up to 2^28) and call with token ids")
        if outside := int(self._sum("outside the vocabulary")):
            raise ValueError(f"vocab_size = {self.vocab_size}: {outside} tokens have other ids; give the model's own")
        return self._token_counts_LEV.cpu().unflatten(1, (self.n_experts, self.vocab_size))

    def layer_top_tokens(self, layer: int, n: int = 10, at_least: int = 8) -> list[list[tuple[int, float]]]:
        """Per expert, the tokens it serves most above its share: (id, lift), falling; seen at least `at_least` times.

        Lift is how much more often the expert serves that token than its share of all of them.
        """
        counts_EV = self.token_counts_LEV[layer].double()
        seen_V = counts_EV.sum(0) / self._top_k
        found = []
        for counts_V, load in zip(counts_EV, self.load_LE[layer], strict=True):
            lift_V = counts_V / seen_V.clamp(min=1) / (load * self._top_k).clamp(min=1e-12)
            lift_V[seen_V < at_least] = 0
            best = lift_V.sort(descending=True, stable=True)  # of equals the lower id comes first
            found.append([(int(i), float(v)) for v, i in zip(*(part[:n] for part in best), strict=True) if v > 0])
        return found

    def top_tokens(self, layer: int, expert: int, n: int = 10, at_least: int = 8) -> list[tuple[int, float]]:
        """`layer_top_tokens` of one expert."""
        return self.layer_top_tokens(layer, n, at_least)[expert]


@contextmanager
def routing(model: nn.Module, vocab_size: int = 0) -> Iterator[RoutingProfile]:
    """Profiles every forward pass of `model` inside the block: ours, or one of transformers' MoE models.

    Raises:
        NotObservable: the model has no router that is known here.
    """
    profile = RoutingProfile(observe.n_experts(observe.routers(model)[0]), vocab_size)
    with observe.observe(model, profile.update):
        yield profile


def load_entropy(load_LE: Tensor) -> Tensor:
    """Entropy of loads [..., E], each summing to 1, over its maximum: 1 when even, 0 when one expert serves all.

    A single expert's load is even.
    """
    if load_LE.shape[-1] == 1:
        return torch.ones_like(load_LE[..., 0])
    return torch.special.entr(load_LE).sum(-1) / math.log(load_LE.shape[-1])
