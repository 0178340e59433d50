"""The pieces of benchmarks/gpu.py: what it runs, how it ends it, what it writes down."""
