"""Kernels in CUDA C++, for what Triton does badly; compiled on the machine that runs them."""
