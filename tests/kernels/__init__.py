"""Tests of moe.kernels, op by op, against the float64 reference."""
