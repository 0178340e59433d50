"""Which experts tokens choose: the routings that benchmarks are measured with, each a function of its seed alone.

Besides `balanced`, `zipf` and what a trained router chose, the workloads of Megatron-LM's token-imbalance benchmark
(NVIDIA/Megatron-LM, pull request 7488), as far as one GPU can tell them apart. The names and what each isolates are
theirs; the figures are ours. A "rank" is a run of neighbouring experts, max(K, E / 8) of them; R = T*K rows:

    balanced      every expert serves R / E rows, up to one
    hot_experts   as many experts as a rank has, spread over all, share half of the rows; the others the other half
    hot_rank      the same heat, on one rank
    ragged        loads fall as they will: log-normal, so that hardly one is a multiple of a tile
    zero_experts  every other rank gets no row at all, and the others share them alike
    rotating      every rank in turn is hot for a stretch of the tokens; over all of them loads are even
    burst         balanced, but an eighth of the tokens, all in one stretch, choose the same K experts

Every token has K different experts. Shape suffixes: T tokens, E experts, K experts per token, L layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def from_loads(loads: Sequence[int], n_tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Ids [T, K] int64 in which expert e serves exactly `loads[e]` rows, K different ones per token, in random order.

    Raises:
        ValueError: the loads do not sum to T*K, or one is above T.
    """
    if sum(loads) != n_tokens * top_k or max(loads) > n_tokens:
        raise ValueError(f"loads {list(loads)}: must sum to {n_tokens} x {top_k}, and none may be above {n_tokens}")
    # The rows in the order of the experts, laid into K columns: an expert's stretch of at most T rows begins in one
    # column and ends in the next before it comes to a token of its own.
    rows = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    ids_TK = rows.view(top_k, n_tokens).t()[torch.randperm(n_tokens, generator=generator)]
    return ids_TK.gather(1, torch.rand(ids_TK.shape, generator=generator).argsort(1))


def shared_out(total: int, shares: Sequence[float], most: int) -> list[int]:
    """`total` rows by shares, in whole rows, none above `most`; what is above goes to the others."""
    loads, left = [0] * len(shares), total
    while left:
        open_ = [e for e in range(len(shares)) if loads[e] < most and shares[e] > 0]
        if not open_:
            raise ValueError(f"{total} rows do not fit into {len(shares)} experts of at most {most}")
        scale = left / sum(shares[e] for e in open_)
        # Whole rows by shares; where that is none, one row each until they are gone.
        given = {e: min(most - loads[e], int(shares[e] * scale)) for e in open_}
        if not any(given.values()):
            given = dict.fromkeys(sorted(open_, key=lambda e: -shares[e])[:left], 1)
        for e, n in given.items():
            loads[e] += n
        left = total - sum(loads)
    return loads


def rank_size(n_experts: int, top_k: int) -> int:
    """How many neighbouring experts are a rank."""
    return min(max(top_k, n_experts // 8), n_experts - 1)


def _heated(hot: Sequence[int], n_tokens: int, n_experts: int, top_k: int) -> list[int]:
    """Loads of which the hot experts have half."""
    cold = n_experts - len(hot)
    shares = [0.5 / len(hot) if e in hot else 0.5 / cold for e in range(n_experts)]
    return shared_out(n_tokens * top_k, shares, n_tokens)


def _rank(index: int, n_experts: int, top_k: int) -> range:
    size = rank_size(n_experts, top_k)
    first = index % (n_experts // size) * size
    return range(first, first + size)


def balanced(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    loads = shared_out(n_tokens * top_k, [1.0] * n_experts, n_tokens)
    return from_loads(loads, n_tokens, top_k, torch.Generator().manual_seed(seed))


def zipf(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """Expert e is chosen with a probability that falls as 1 / (e + 1)."""
    share = 1 / torch.arange(1, n_experts + 1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(share.expand(n_tokens, n_experts), top_k, generator=generator)


def hot_experts(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hot = torch.randperm(n_experts, generator=generator)[: rank_size(n_experts, top_k)].tolist()
    return from_loads(_heated(hot, n_tokens, n_experts, top_k), n_tokens, top_k, generator)


def hot_rank(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    loads = _heated(_rank(seed, n_experts, top_k), n_tokens, n_experts, top_k)
    return from_loads(loads, n_tokens, top_k, torch.Generator().manual_seed(seed))


def ragged(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.randn(n_experts, generator=generator).exp().tolist()
    return from_loads(shared_out(n_tokens * top_k, shares, n_tokens), n_tokens, top_k, generator)


def zero_experts(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    size = rank_size(n_experts, top_k)
    empty = [e for e in range(n_experts) if (e // size + seed) % 2][: n_experts - top_k]
    shares = [0.0 if e in empty else 1.0 for e in range(n_experts)]
    loads = shared_out(n_tokens * top_k, shares, n_tokens)
    return from_loads(loads, n_tokens, top_k, torch.Generator().manual_seed(seed))


def rotating(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n_ranks = n_experts // rank_size(n_experts, top_k)
    stretches = []
    for index, length in enumerate(shared_out(n_tokens, [1.0] * n_ranks, n_tokens)):
        loads = _heated(_rank(index + seed, n_experts, top_k), length, n_experts, top_k)
        stretches.append(from_loads(loads, length, top_k, generator))
    return torch.cat(stretches)


def burst(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> Tensor:
    length = n_tokens // 8
    ids_TK = balanced(n_tokens - length, n_experts, top_k, seed)
    same = (torch.arange(top_k) + seed) % n_experts
    begin = len(ids_TK) // 2
    return torch.cat([ids_TK[:begin], same.expand(length, top_k), ids_TK[begin:]])


Routing = Callable[[int, int, int, int], Tensor]
WORKLOADS: dict[str, Routing] = {
    f.__name__: f for f in (balanced, hot_experts, hot_rank, ragged, zero_experts, rotating, burst)
}
ROUTINGS: dict[str, Routing] = {**WORKLOADS, "zipf": zipf}


def traced(trace: Any, n_tokens: int) -> Tensor:
    """The experts [T, K] of the most uneven layer of a `moe.profile.Trace`; a shorter one is gone through again."""
    ids_TLK = torch.from_numpy(trace.ids_TLK(n_tokens))
    loads = [torch.bincount(ids_TLK[:, layer].flatten()).max().item() for layer in range(trace.n_layers)]
    ids_TK = ids_TLK[:, loads.index(max(loads))].long()
    return ids_TK.repeat(-(-n_tokens // len(ids_TK)), 1)[:n_tokens]
