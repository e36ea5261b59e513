"""Head trade: ranks that have some tokens of all heads come to have some heads of all tokens.

Shapes: T local tokens, N tokens of all these ranks, X any dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.mirror import Mirror
from .heads import Share
from .parcel import Parcel
from .transport import Outgoing, Transport

Cut = Callable[[Tensor, Share], Tensor]
"""The part [T, some heads, ...] of a tensor [T, heads, ...] that belongs to a share."""


def by_heads(x_TH: Tensor, share: Share) -> Tensor:
    """What has an entry for each query head."""
    return x_TH[:, share.heads]


def by_groups(x_TG: Tensor, share: Share) -> Tensor:
    """What has an entry for each key-value head."""
    return x_TG[:, share.groups]


class HeadTrade:
    """All-to-all over heads (DeepSpeed-Ulysses, arXiv 2309.14509), both ways, of any sizes.

    Args:
        transport: Between the ranks.
        members: Global positions of each rank's tokens, ascending, on the host.

    Attributes:
        index_N: Global positions of all their tokens, ascending.
    """

    def __init__(self, transport: Transport, members: Sequence[Tensor]) -> None:
        self.transport, self._sizes = transport, [len(index) for index in members]
        index_N = torch.cat(list(members))
        order_N = index_N.argsort()
        self.index_N = index_N[order_N]
        self._order = Mirror(order_N)
        self._places = [Mirror(places) for places in order_N.argsort().split(self._sizes)]

    def to_heads(
        self, tensors: Sequence[Tensor], cuts: Sequence[Cut], shares: Sequence[Share]
    ) -> list[Tensor]:
        """The tensors' parts for this rank's heads, [N, ...] each, tokens in ascending order.

        Args:
            tensors: [T, ...] each.
            cuts: How each is cut.
            shares: The heads of each rank.
        """

        def cut(share: Share, rows: slice) -> list[Tensor]:
            return [of(x[rows], share) for x, of in zip(tensors, cuts, strict=True)]

        rank, every, none = self.transport.rank, slice(None), slice(0)
        outgoing = [cut(share, every) for share in shares]
        shapes = [(size, cut(shares[rank], none)) for size in self._sizes]
        arrived = self._swap(outgoing, shapes)
        order_N = self._order.on(tensors[0].device)
        return [torch.cat(parts).index_select(0, order_N) for parts in zip(*arrived, strict=True)]

    def to_tokens(
        self, tensors: Sequence[Tensor], cuts: Sequence[Cut], shares: Sequence[Share]
    ) -> list[list[Tensor]]:
        """This rank's tokens of each tensor, from each rank the part for its heads.

        Args:
            tensors: For this rank's heads, [N, some heads, ...] each.
            cuts: How a tensor of all heads is cut.
            shares: The heads of each rank.

        Returns:
            For each tensor the parts [T, some heads, ...] of all ranks.
        """
        rank, device = self.transport.rank, tensors[0].device
        outgoing = [
            [x.index_select(0, places.on(device)) for x in tensors] for places in self._places
        ]

        def like(share: Share) -> list[Tensor]:
            heads = share.heads.stop, share.groups.stop
            wide = [x.new_empty(0, max(heads), *x.shape[2:]) for x in tensors]
            return [of(x, share) for x, of in zip(wide, cuts, strict=True)]

        arrived = self._swap(outgoing, [(self._sizes[rank], like(share)) for share in shares])
        return [list(parts) for parts in zip(*arrived, strict=True)]

    def _swap(
        self, outgoing: list[list[Tensor]], shapes: list[tuple[int, list[Tensor]]]
    ) -> list[list[Tensor]]:
        """From each rank what it has for this one, a message for each dtype.

        Args:
            outgoing: What goes to each rank.
            shapes: How many tokens come from each rank, and tensors [0, ...] like those that do.
        """
        dtypes = list(dict.fromkeys(x.dtype for x in outgoing[0]))
        sends, receives, likes = [], [], []
        for peer, (tokens, like) in enumerate(shapes):
            if peer == self.transport.rank:
                continue
            for dtype in dtypes:
                sends.append(Outgoing(peer, _of(outgoing[peer], dtype).flat))
                likes.append(_of(like, dtype))
                receives.append(likes[-1].incoming(peer, tokens))
        came = iter(self.transport.trade(sends, receives).wait())
        parcels = iter(likes)
        arrived = []
        for peer, own in enumerate(outgoing):
            if peer == self.transport.rank:
                arrived.append(own)
                continue
            parts = {dtype: iter(next(parcels).of(next(came)).tensors) for dtype in dtypes}
            arrived.append([next(parts[x.dtype]) for x in own])
        return arrived


def _of(tensors: Sequence[Tensor], dtype: torch.dtype) -> Parcel:
    return Parcel.pack([x for x in tensors if x.dtype == dtype])
