"""Serving: many requests at once from one model, over a paged cache of keys and values."""
