"""The specification of RoPE in float64: channel pairs as complex numbers. Read by tests only.

Shapes: T tokens, H heads, D head dim.
"""

import torch
from torch import Tensor


def naive_rope(x_THD: Tensor, positions_T: Tensor, base: float) -> Tensor:
    """Turns the pair (i, i + D / 2) of each head by position * base ** (-2i / D)."""
    half = x_THD.shape[-1] // 2
    x = torch.complex(x_THD[..., :half].double(), x_THD[..., half:].double())
    turns = torch.tensor([base ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    angle_TD = positions_T[:, None].double() * turns
    turned = x * torch.polar(torch.ones_like(angle_TD), angle_TD)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)
