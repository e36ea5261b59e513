"""Gathering: what every context rank has of a tensor, on all of them in global order.

Shapes: T local tokens, S tokens of the whole sequence, P ranks, R rows of the largest rank, Y
numbers of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.mirror import Mirror
from ..kernels.precision import wide
from .layout import Layout
from .transport import Transport


class Gathering:
    """Gathers tokens over one layout, and sums what belongs to them back to their owners.

    Ranks that own fewer tokens than others send as many rows.
    """

    def __init__(self, layout: Layout, transport: Transport) -> None:
        self.layout, self.transport = layout, transport
        self._tokens = layout.sizes[transport.rank]

    @cached_property
    def _rows(self) -> Mirror:
        """The token of each row that all ranks send. A spare one is token 0, and not read."""
        rows_PR = torch.zeros(self.layout.ranks, self.layout.largest, dtype=torch.int64)
        for rank, size in enumerate(self.layout.sizes):
            rows_PR[rank, :size] = self.layout.index(rank)
        return Mirror(rows_PR.flatten())

    @cached_property
    def _places(self) -> Mirror:
        """The row of each token."""
        sizes, largest = self.layout.sizes, self.layout.largest
        owned = [torch.arange(size) + rank * largest for rank, size in enumerate(sizes)]
        index = torch.cat([self.layout.index(rank) for rank in range(self.layout.ranks)])
        return Mirror(torch.cat(owned)[index.argsort()])

    def start(self, x_T: Tensor) -> Callable[[], Tensor]:
        """Starts to gather; call what it returns for all ranks' tokens in global order, [S, ...].

        No gradient comes back.
        """
        spare = self.layout.largest - self._tokens
        if spare:
            x_T = torch.cat([x_T, x_T.new_zeros(spare, *x_T.shape[1:])])
        handle, places_S = self.transport.all_gather(x_T), self._places.on(x_T.device)

        def finish() -> Tensor:
            (gathered_PR,) = handle.wait()
            return gathered_PR.flatten(0, 1).index_select(0, places_S)

        return finish

    def gather(self, x_T: Tensor) -> Tensor:
        """All ranks' tokens in global order, [S, ...]; without a gradient."""
        return self.start(x_T)()

    def start_sum(self, parts_S: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts to sum tensors over ranks in one transfer; call what it returns for the sums.

        They are of this rank's own tokens, [T, ...] each.
        """
        flat_SY = [part_S.flatten(1) for part_S in parts_S]
        # Not the parts themselves: they are not needed until the sums are there.
        shapes = [part_S.shape[1:] for part_S in parts_S]
        widths = [part_SY.shape[1] for part_SY in flat_SY]
        rows = self._rows.on(flat_SY[0].device)
        side_RY = torch.cat([part_SY.index_select(0, rows) for part_SY in flat_SY], 1)
        handle = self.transport.reduce_scatter(side_RY.unflatten(0, (self.layout.ranks, -1)))

        def finish() -> list[Tensor]:
            (summed_RY,) = handle.wait()
            owned_TY = summed_RY[: self._tokens].split(widths, -1)
            return [x_TY.unflatten(1, shape) for x_TY, shape in zip(owned_TY, shapes, strict=True)]

        return finish

    def scatter(self, parts_S: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks of this rank's own tokens, [T, ...] each."""
        return self.start_sum(parts_S)()


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
