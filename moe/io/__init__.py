"""Files and tensors that appear on disk whole or not at all, and the look of pictures."""
