"""Is a mixture of experts better than a dense model that does the same work per token? Held-out loss, three seeds.

Both sides pass each token through MLPs of the same width in all: 2 of 16 experts of 256, or one MLP of 512. They have
the same number of active parameters (but for the router), the same tokens and the same recipe. As that recipe was found
with the mixture, the dense side is also tried at half and at twice its rates, and judged by the best of the three.

Run: python benchmarks/studies/dense.py [--seeds 3] [--steps 300] [--jobs 1]
"""

import study
from study import BITS, Variant

DENSE = ("experts.n_experts=1", "experts.top_k=1", "experts.d_ff=512")
VARIANTS = [
    Variant("16 experts, top-2"),
    Variant("dense", DENSE),
    Variant("dense, half the rates", (*DENSE, "train.lr=0.006", "train.muon_lr=0.025"), seeds=1),
    Variant("dense, twice the rates", (*DENSE, "train.lr=0.024", "train.muon_lr=0.1"), seeds=1),
]


if __name__ == "__main__":
    study.main("dense", __doc__, VARIANTS, [BITS], study.draw_losses)
