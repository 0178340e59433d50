"""Output layer and cross-entropy in one pass, the logits never in memory at once.

Constants only, and no torch: data and the planner read them.
"""

IGNORE_INDEX = -100  # a target that is none: torch's own convention
# Logits of one chunk: 2**22 elements are 16 MB in float32, which a server CPU's last-level cache and a GPU's L2 hold.
CHUNK_ELEMENTS = 2**22
