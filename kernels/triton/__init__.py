"""Attention with our own Triton kernels, on a GPU, or on a CPU in Triton's interpreter."""
