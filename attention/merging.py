"""Merging: attention over disjoint keys as one, with gradients.

Shapes: T query rows, H query heads, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_outputs(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The output [T, H, V] over the keys of all parts.

    Args:
        parts: Outputs [T, H, V] with their natural-log lse [T, H]; -inf where a row saw nothing.
    """
    lse_NTH = torch.stack([lse_TH for _, lse_TH in parts])
    blind_TH = (lse_NTH == float("-inf")).all(0)
    # A softmax over nothing but -inf is NaN, and so is its gradient.
    weight_NTH = lse_NTH.masked_fill(blind_TH, 0.0).softmax(0)
    out_THV = sum(
        out.to(weight.dtype) * weight.unsqueeze(-1)
        for (out, _), weight in zip(parts, weight_NTH, strict=True)
    )
    assert isinstance(out_THV, Tensor)
    return out_THV.to(parts[0][0].dtype)
