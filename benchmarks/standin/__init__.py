"""A stand-in for CUDA's driver: Triton's own JIT and launcher run, and nothing reaches a GPU."""
