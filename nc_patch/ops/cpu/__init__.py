"""Kernels for CPUs, compiled by Numba: vector instructions, launches on PyTorch's threads, and what selections share."""
