"""Merge: partial attention over disjoint keys as one.

Shapes: T query rows, H query heads, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint keys as one; exact where either saw nothing.

    Args:
        out_a: Output [T, H, V] over some keys.
        lse_a: Its natural-log lse [T, H].
        out_b: Output over other keys, of the same dtype.
        lse_b: Its lse.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf minus -inf is NaN; any finite stand-in gives weight 0 to a side that saw nothing.
    weight_b = (lse_b - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    return torch.lerp(out_a, out_b, weight_b.unsqueeze(-1)), lse
