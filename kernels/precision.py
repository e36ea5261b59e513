"""Precision: the dtype that everything accumulates in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of the accumulators: fp64 stays, all else is fp32."""
    return x.to(wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that results of `x` accumulate in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def finite(lse: Tensor) -> Tensor:
    """An lse with 0 where it is -inf, because -inf minus -inf is NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def wide_zeros(x: Tensor) -> Tensor:
    """Zeros of the shape of `x` to accumulate in."""
    return torch.zeros_like(x, dtype=wide_dtype(x))
