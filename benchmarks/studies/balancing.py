"""What does balancing cost, and what does it give? The balance loss, none, and a bias on the scores instead of it.

With the bias (Wang et al. 2024, arXiv:2408.15664) nothing but the choice of the experts changes: after each step it
rises for those below the mean load. Three seeds.

Run: python benchmarks/studies/balancing.py [--seeds 3] [--steps 300] [--jobs 1]
"""

from typing import Any

import study
from study import BITS, LOAD, Variant

from moe.io import figures

VARIANTS = [
    Variant("balance loss"),
    Variant("no balancing", ("router.balance_loss=0.0",)),
    Variant("bias", ("router.balance_loss=0.0", "router.bias_update_rate=0.01")),
]


def draw(record: dict[str, Any]) -> Any:
    """The score of each run, and how evenly its experts are used."""
    figure, (bits, entropy, busiest) = figures.figure(1, 3, width=4.2, height=4.2)
    study.draw_runs(bits, record, BITS, "Held-out loss", "bits per byte of all held-out files")
    study.draw_runs(entropy, record, LOAD[0], "Load entropy", "1 when even; the last fifth of the run")
    study.draw_runs(busiest, record, LOAD[1], "Busiest expert", "its load over the mean; the last fifth of the run")
    return figure


if __name__ == "__main__":
    study.main("balancing", __doc__, VARIANTS, [BITS, *LOAD], draw)
