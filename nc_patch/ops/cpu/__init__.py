"""Kernels for CPUs, compiled by Numba: vector instructions, launches on PyTorch's threads, what selections share."""
