"""Which GPU holds which experts, and which are worth a second copy: greedy packing, then local search.

Every GPU gets the same number of expert slots, as their memory is the same. An expert's load divides evenly over its
copies. Plain Python and numpy, no torch.

Shape suffixes: L layers, E experts, P passes, G GPUs.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placement:
    """`gpus[layer][gpu]` lists the experts that a GPU holds, rising; an expert with copies is on several GPUs."""

    n_experts: int
    gpus: tuple[tuple[tuple[int, ...], ...], ...]

    def gpu_loads(self, counts_PLE: np.ndarray) -> np.ndarray:
        """Tokens on each GPU, [P, L, G], from the tokens of each expert, [P, L, E]."""
        share_LGE = np.zeros((len(self.gpus), len(self.gpus[0]), self.n_experts))
        for layer, gpus in enumerate(self.gpus):
            for gpu, experts in enumerate(gpus):
                np.add.at(share_LGE[layer, gpu], list(experts), 1.0)
        share_LGE /= share_LGE.sum(1, keepdims=True)
        return np.einsum("ple,lge->plg", counts_PLE, share_LGE)

    def max_over_mean(self, counts_PLE: np.ndarray) -> np.ndarray:
        """The busiest GPU's tokens over the mean, [L], averaged over passes: a step waits for the busiest."""
        loads_PLG = self.gpu_loads(counts_PLE)
        mean_PL = loads_PLG.mean(2)
        ratio_PL = np.divide(loads_PLG.max(2), mean_PL, out=np.ones_like(mean_PL), where=mean_PL > 0)
        return ratio_PL.mean(0)


def round_robin(n_layers: int, n_experts: int, n_gpus: int) -> Placement:
    """Expert e on GPU e mod G: what is done without looking. The last GPUs may hold one expert fewer."""
    gpus = tuple(tuple(range(g, n_experts, n_gpus)) for g in range(n_gpus))
    return Placement(n_experts, (gpus,) * n_layers)


def place(load_LE: np.ndarray, n_gpus: int, redundant: int = 0) -> Placement:
    """A placement that evens out `load_LE` (any unit), with `redundant` more slots per layer for copies.

    Copies go, one at a time, to the expert with the most load per copy. The pieces are then packed, heaviest first,
    each onto the least loaded GPU with a free slot that does not hold the expert yet; at last, pieces are swapped
    between the busiest GPU and another for as long as that helps.

    Raises:
        ValueError: no GPU, more copies than GPUs for every expert, or slots that do not divide evenly over the GPUs.
    """
    _, E = load_LE.shape
    slots = E + redundant
    if n_gpus < 1:
        raise ValueError(f"gpus = {n_gpus}: must be at least 1")
    if redundant < 0 or slots > E * n_gpus:
        raise ValueError(f"redundant = {redundant}: must be 0 to {E * (n_gpus - 1)} (everything everywhere)")
    if slots % n_gpus:
        more = n_gpus - slots % n_gpus
        raise ValueError(
            f"redundant = {redundant}: {E} experts + {redundant} copies do not divide over {n_gpus} GPUs; "
            f"{redundant + more} would"
        )
    return Placement(E, tuple(_place_layer(load_E, n_gpus, redundant, slots // n_gpus) for load_E in load_LE))


def _place_layer(load_E: np.ndarray, n_gpus: int, redundant: int, slots: int) -> tuple[tuple[int, ...], ...]:
    copies = np.ones(len(load_E), dtype=int)
    for _ in range(redundant):
        per_copy = np.where(copies < n_gpus, load_E / copies, -1.0)
        copies[int(per_copy.argmax())] += 1
    piece_E = load_E / copies
    held: list[list[int]] = [[] for _ in range(n_gpus)]
    total = np.zeros(n_gpus)
    # Heaviest first; among equals, those with more copies, which have fewer GPUs to choose from.
    for e in sorted(range(len(load_E)), key=lambda e: (-piece_E[e], -copies[e], e)):
        for _ in range(copies[e]):
            free = [g for g in range(n_gpus) if len(held[g]) < slots and e not in held[g]]
            if not free:
                _make_room(e, held, total, piece_E, slots)
                continue
            g = min(free, key=lambda g: (total[g], g))
            held[g].append(e)
            total[g] += piece_E[e]
    _swap(held, total, piece_E)
    return tuple(tuple(sorted(experts)) for experts in held)


def _make_room(e: int, held: list[list[int]], total: np.ndarray, piece_E: np.ndarray, slots: int) -> None:
    """Place a copy of `e` where every GPU with a free slot holds it already: one of them passes another expert on."""
    for taker in range(len(held)):
        if len(held[taker]) == slots or e not in held[taker]:
            continue
        for giver in range(len(held)):
            if e in held[giver]:
                continue
            for other in held[giver]:
                if other not in held[taker]:
                    held[giver].remove(other)
                    held[taker].append(other)
                    held[giver].append(e)
                    total[taker] += piece_E[other]
                    total[giver] += piece_E[e] - piece_E[other]
                    return
    raise AssertionError("no room for a copy, although there are slots")  # cannot be: copies <= GPUs


def _swap(held: list[list[int]], total: np.ndarray, piece_E: np.ndarray) -> None:
    """Swap a piece of the busiest GPU with a lighter one elsewhere, the best swap first, until none helps."""
    while True:
        busy = int(total.argmax())
        best, best_swap = total[busy] - 1e-12 * max(1.0, total[busy]), None
        for g in range(len(held)):
            for mine in held[busy]:
                for theirs in held[g] if g != busy else ():
                    if mine in held[g] or theirs in held[busy]:
                        continue
                    moved = piece_E[mine] - piece_E[theirs]
                    worst = max(total[busy] - moved, total[g] + moved)
                    if worst < best:
                        best, best_swap = worst, (g, mine, theirs)
        if best_swap is None:
            return
        g, mine, theirs = best_swap
        held[busy].remove(mine)
        held[g].remove(theirs)
        held[busy].append(theirs)
        held[g].append(mine)
        moved = piece_E[mine] - piece_E[theirs]
        total[busy] -= moved
        total[g] += moved
