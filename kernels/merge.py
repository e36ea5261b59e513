"""Merge: partial attention over disjoint keys as one.

Shapes: T query rows, H query heads, V value dim; R rows of any kind, N partial results of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda.merge import fits
from .cuda.merge import merge_parts as cuda_merge_parts
from .cuda.standing import serves
from .precision import finite


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint keys as one; exact where either saw nothing.

    Args:
        out_a: Output [T, H, V] over some keys.
        lse_a: Its natural-log lse [T, H].
        out_b: Output over other keys, of the same dtype.
        lse_b: Its lse.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_b = (lse_b - finite(lse)).exp()
    return torch.lerp(out_a, out_b, weight_b.unsqueeze(-1)), lse


@torch.no_grad()
def merge_parts(parts_RNV: Tensor, lse_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Any number of partial results over disjoint keys as one; carries no gradient.

    Args:
        parts_RNV: Outputs over some keys each, [R, N, V]; not looked at where their lse is -inf.
        lse_RN: Their natural-log lse.

    Returns:
        The output [R, V] in the dtype of the parts, and its lse [R] in that of lse_RN; 0 and -inf
        where all parts have -inf.
    """
    if serves("merge", parts_RNV) and fits(parts_RNV):
        return cuda_merge_parts(parts_RNV, lse_RN)
    nothing_RN = lse_RN == float("-inf")
    weight_RN = lse_RN.softmax(1).masked_fill(nothing_RN, 0.0)  # softmax is NaN where all are -inf
    seen_RNV = parts_RNV.to(lse_RN.dtype).masked_fill(nothing_RN.unsqueeze(-1), 0.0)
    out_RV = (weight_RN.unsqueeze(1) @ seen_RNV).squeeze(1)
    return out_RV.to(parts_RNV.dtype), lse_RN.logsumexp(1)
