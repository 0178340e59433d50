"""Output layer and cross-entropy in one pass, the logits never in memory at once. No torch here: data imports this."""

IGNORE_INDEX = -100  # a target that is none: torch's own convention
