"""Entries: some heads of some tokens, on all context ranks.

Shapes: T local tokens, G heads, N wanted entries, M of them without duplicates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.mirror import Mirror
from .gathering import Gathering, gather
from .ranges import owned
from .volume import Volume, volume_of_gathering


class Entries:
    """Gathers entries that all ranks want; each distinct one travels once.

    Args:
        index_N: Position of the entry's token * G + its head, on the host.
        groups: Heads, G.
        tokens: Gathers all tokens.
    """

    def __init__(self, index_N: Tensor, groups: int, tokens: Gathering) -> None:
        layout, rank = tokens.layout, tokens.transport.rank
        distinct_M, back_N = index_N.unique(return_inverse=True)
        position_M = distinct_M // groups
        self.layout = owned(position_M, layout)
        own = self.layout.index(rank)
        row = torch.searchsorted(layout.index(rank), position_M[own])
        self._rows = Mirror(row * groups + distinct_M[own] % groups)
        self._back = Mirror(back_N)
        self._gathering = Gathering(self.layout, tokens.transport)

    def gather(self, x_TG: Tensor) -> Tensor:
        """The entries [N, ...] of all ranks' tensors [T, G, ...]; differentiable."""
        own = x_TG.flatten(0, 1).index_select(0, self._rows.on(x_TG.device))
        if not self.layout.length:
            return own
        return gather(own, self._gathering).index_select(0, self._back.on(x_TG.device))

    def volume(self, numbers: int, wire: int, accumulator: int = 4, *, learns: bool) -> Volume:
        """Bytes that a rank sends; those that own fewer entries than others send as many rows.

        Args:
            numbers: Of an entry.
            wire: Bytes of a number.
            accumulator: Bytes of a gradient.
            learns: Whether gradients come back.
        """
        most = self.layout.largest
        return volume_of_gathering(
            self.layout.ranks, most, numbers, wire, accumulator, learns=learns
        )
