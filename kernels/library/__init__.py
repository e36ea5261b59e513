"""Dense attention by the GPU kernels that ship with PyTorch."""
