"""The test suite: it mirrors moe/ and kernels/."""
