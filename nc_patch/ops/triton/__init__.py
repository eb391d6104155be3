"""What Triton kernels of every selection share."""
