"""Pooling with gradients: one key per window.

Shapes: S keys, G heads, D their dim, P windows, L keys in a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.pool import How, pool, pool_backward
from ..kernels.windows import Windows


def pool_keys(x_SGD: Tensor, windows: Windows, how: How, weight_GL: Tensor | None = None) -> Tensor:
    """Each window's keys as one, [P, G, D]; see `pool`. Differentiable in keys and weights.

    Args:
        x_SGD: Keys (or values).
        windows: Which keys go together.
        how: Mean, extremes, or a sum with learned weights.
        weight_GL: Of the sum: the weight of each place in a window.
    """
    return _Pool.apply(x_SGD, weight_GL, windows, how)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SGD: Tensor, weight_GL: Tensor | None, windows: Windows, how: How
    ) -> Tensor:
        ctx.save_for_backward(x_SGD, weight_GL)
        ctx.windows, ctx.how = windows, how
        return pool(x_SGD, windows, how, weight_GL)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        x_SGD, weight_GL = ctx.saved_tensors
        dx, dweight = pool_backward(grad_outputs[0], x_SGD, ctx.windows, ctx.how, weight_GL)
        # They come in the dtype of the accumulators.
        dweight = None if dweight is None else dweight.to(weight_GL.dtype)
        return dx.to(x_SGD.dtype), dweight, None, None
