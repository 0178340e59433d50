"""How many experts? 4, 16 and 64 at the same work per token: two of 256 for each token. Three seeds.

Run: python benchmarks/studies/experts.py [--seeds 3] [--steps 300] [--jobs 1]
"""

import study
from study import BITS, LOAD, Variant

VARIANTS = [
    Variant("16 experts, top-2"),
    Variant("4 experts, top-2", ("experts.n_experts=4",)),
    Variant("64 experts, top-2", ("experts.n_experts=64",)),
]


if __name__ == "__main__":
    study.main("experts", __doc__, VARIANTS, [BITS, *LOAD], study.draw_losses)
