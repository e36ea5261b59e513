"""Gathering: what every context rank has of a tensor, on all of them in global order.

Shapes: T local tokens, S tokens of the whole sequence, P ranks, Y numbers of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.precision import wide
from .layout import Layout
from .transport import Transport


class Gathering:
    """Gathers tokens over one layout, and sums what belongs to them back to their owners."""

    def __init__(self, layout: Layout, transport: Transport) -> None:
        self.layout, self.transport = layout, transport
        self._chunks = layout.local_chunks()

    def gather(self, x_T: Tensor) -> Tensor:
        """All ranks' tokens in global order, [S, ...]; without a gradient."""
        gathered_PT = self.transport.all_gather(x_T)
        return torch.cat([gathered_PT[rank, start:stop] for rank, start, stop in self._chunks])

    def scatter(self, parts_S: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks of this rank's own tokens, [T, ...] each, in one transfer."""
        flat_SY = [part.flatten(1) for part in parts_S]
        widths = [part.shape[1] for part in flat_SY]
        side_PTY = flat_SY[0].new_empty(
            self.transport.size, len(flat_SY[0]) // self.transport.size, sum(widths)
        )
        begin = 0
        for rank, start, stop in self._chunks:
            end = begin + stop - start
            for part_SY, side_TY in zip(
                flat_SY, side_PTY[rank, start:stop].split(widths, -1), strict=True
            ):
                side_TY.copy_(part_SY[begin:end])
            begin = end
        summed_TY = self.transport.reduce_scatter(side_PTY).split(widths, -1)
        return [
            own_TY.unflatten(1, part.shape[1:])
            for own_TY, part in zip(summed_TY, parts_S, strict=True)
        ]


def gather(x_T: Tensor, gathering: Gathering) -> Tensor:
    """All ranks' tokens in global order; gradients are summed in the accumulators' dtype."""
    return _Gather.apply(x_T, gathering)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        return gathering.gather(x_T)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        (dx_T,) = ctx.gathering.scatter([wide(grad_outputs[0])])
        return dx_T.to(grad_outputs[0].dtype), None
