"""Attention over keys and values that lie in blocks, for decoding."""
