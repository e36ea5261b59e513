"""Members: some of the context ranks, as a transport of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .transport import Handle, Incoming, Outgoing, Transport


class Members:
    """A transport among some ranks of another one, by messages between two; see `Transport`.

    It needs no process group of its own, which under nccl would have buffers of its own.

    Args:
        whole: The transport of all context ranks.
        ranks: The members, this rank among them.
    """

    def __init__(self, whole: Transport, ranks: Sequence[int]) -> None:
        self._whole, self._ranks = whole, tuple(ranks)
        self.rank, self.size = self._ranks.index(whole.rank), len(ranks)

    def trade(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> Handle:
        """See `Transport`."""
        ranks = self._ranks
        return self._whole.trade(
            [Outgoing(ranks[peer], rows) for peer, rows in sends],
            [Incoming(ranks[peer], length, like) for peer, length, like in receives],
        )

    def all_gather(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        sends = [Outgoing(peer, tensor) for peer in self._others]
        receives = [Incoming(peer, len(tensor), tensor) for peer in self._others]
        return _Gathered(self.rank, tensor, self.trade(sends, receives))

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        own = tensor[self.rank]
        sends = [Outgoing(peer, tensor[peer]) for peer in self._others]
        receives = [Incoming(peer, len(own), own) for peer in self._others]
        return _Summed(self.rank, own, self.trade(sends, receives))

    @property
    def _others(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]


@dataclass(frozen=True)
class _Gathered:
    rank: int
    own: Tensor
    handle: Handle

    def wait(self) -> list[Tensor]:
        parts = self.handle.wait()
        return [torch.stack([*parts[: self.rank], self.own, *parts[self.rank :]])]


@dataclass(frozen=True)
class _Summed(_Gathered):
    # In the order of ranks, so that the sum does not depend on who makes it.
    def wait(self) -> list[Tensor]:
        return [super().wait()[0].sum(dim=0)]
