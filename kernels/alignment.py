"""Alignment: how far two outputs of attention are apart, and where each is drawn to.

Shapes: T query rows, H heads, V value dim; M rows of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import wide, wide_dtype

# Elements of one temporary; about six of them exist at once.
MAX_ELEMENTS = 2**21


class Alignment(NamedTuple):
    """The loss, and its gradients.

    Attributes:
        total: Weighted sum over the rows, fp32 (fp64 for fp64 outputs).
        da_THV: Gradient of the first output, in the dtype of the total.
        db_THV: Gradient of the second one.
    """

    total: Tensor
    da_THV: Tensor
    db_THV: Tensor


@torch.no_grad()
def align(
    a_THV: Tensor,
    b_THV: Tensor,
    weight_T: Tensor,
    *,
    beta: float = 1.0,
    width: int | None = None,
    elements: int = MAX_ELEMENTS,
) -> Alignment:
    """SmoothL1(a, b held still) + SmoothL1(b, a held still), as SSA aligns (arXiv 2511.20102).

    A row's term is the mean over its elements, the total a sum over the rows: over a number of
    tokens it is what a mean over all elements would be. Needs about 32 bytes per element beside the
    gradients.

    Args:
        a_THV: One output.
        b_THV: The other.
        weight_T: Of the rows: 0 for padding.
        beta: Where the loss turns from square to linear; 0 for an absolute difference.
        width: Elements of a row in the whole model, where H are the heads of one tensor rank:
            the totals of the ranks then add up. H * V when left out.
        elements: Of a temporary.

    Raises:
        ValueError: Shapes that contradict each other, or a negative beta.
    """
    if a_THV.ndim != 3 or a_THV.shape != b_THV.shape or weight_T.shape != a_THV.shape[:1]:
        raise ValueError(f"two outputs [T, H, V] and weights [T], not {list(a_THV.shape)}, "
                         f"{list(b_THV.shape)} and {list(weight_T.shape)}")  # fmt: skip
    if beta < 0:
        raise ValueError(f"beta must not be negative: {beta}")
    per_row = a_THV.shape[1] * a_THV.shape[2]
    width = per_row if width is None else width
    if width < 1 and per_row:
        raise ValueError(f"a row has at least 1 element, not {width}")
    total = torch.zeros((), dtype=wide_dtype(a_THV), device=a_THV.device)
    # In fp16 what a mean over many elements leaves of a gradient would be 0.
    da_THV, db_THV = (x.new_empty(x.shape, dtype=total.dtype) for x in (a_THV, b_THV))
    step = max(1, elements // max(1, per_row))
    for start in range(0, len(a_THV), step):
        rows = slice(start, start + step)
        weight_M11 = weight_T[rows, None, None].to(total.dtype) / max(1, width)
        values_MHV, slopes_MHV = _smooth(wide(a_THV[rows]) - wide(b_THV[rows]), beta)
        # Both directions have the same value.
        total += 2 * values_MHV.mul_(weight_M11).sum()
        da_THV[rows] = slopes_MHV.mul_(weight_M11)
        db_THV[rows] = slopes_MHV.neg_()
    return Alignment(total, da_THV, db_THV)


def _smooth(apart: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """SmoothL1 of differences, and its slopes in their place."""
    far = apart.abs()
    if not beta:
        return far, apart.sign_()
    # near * (far - near / 2) / beta is both the square and the linear part.
    near = far.clamp(max=beta)
    values = far.sub_(near, alpha=0.5).mul_(near).div_(beta)
    return values, apart.div_(beta).clamp_(-1.0, 1.0)
