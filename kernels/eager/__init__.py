"""Attention with PyTorch's own operators, on any device; what a CPU trains with."""
