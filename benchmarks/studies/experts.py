"""How many experts? 4, 16 and 64 at the same work per token: two of 256 for each token. Three seeds.

Run: python benchmarks/studies/experts.py [--seeds 3] [--steps 300] [--jobs 1]
"""

from typing import Any

import study
from study import BITS, LOAD, Variant

from moe import figures

VARIANTS = [
    Variant("16 experts, top-2"),
    Variant("4 experts, top-2", ("experts.n_experts=4",)),
    Variant("64 experts, top-2", ("experts.n_experts=64",)),
]


def draw(record: dict[str, Any]) -> Any:
    """The curves, and the score of each run."""
    figure, (curves, runs) = figures.figure(1, 2, width=6.2, height=4.2)
    study.draw_curves(curves, record, "bits per byte of held-out text; thin: each seed, thick: their mean")
    study.draw_runs(runs, record, BITS, "At the end", "bits per byte of all held-out files, a dot for each seed")
    return figure


if __name__ == "__main__":
    study.main("experts", __doc__, VARIANTS, [BITS, *LOAD], draw)
