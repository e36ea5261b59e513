"""Halo: what is made of windows of tokens is made by their owners, and only that travels to all.

A window belongs to the rank that owns its first token. Where it ends in tokens of other ranks,
these are the halo, which comes straight from its owners, and its gradients go straight back.
Shapes: T local tokens, P windows, L keys of the rank's windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.mirror import Mirror
from ..kernels.precision import wide
from ..kernels.reach import Reach
from ..kernels.windows import Windows
from .gathering import Gathering, gather
from .ranges import Needs, Trade, owned
from .transport import Incoming, Outgoing
from .volume import Volume, volume_of_gathering

Make = Callable[[Tensor, Windows], Tensor]
"""Keys [L, ...] of some windows, and these windows, become an entry for each window."""


@dataclass(frozen=True, eq=False)
class Halo:
    """What one rank does for some windows.

    Attributes:
        trade: What it sends for windows of others, and receives for its own.
        travels: Whether there is a halo on some rank.
        places: Where each key of its windows is among its tokens and what it receives, [L].
        local: Its windows, over these keys.
        gathering: Gathers what was made of windows.
    """

    trade: Trade
    travels: bool
    places: Mirror
    local: Windows
    gathering: Gathering

    @classmethod
    def of(cls, windows: Windows, tokens: Gathering) -> Halo:
        """Plans on the host, without a message.

        Args:
            windows: Of the whole sequence.
            tokens: Gathers all tokens.
        """
        layout, rank = tokens.layout, tokens.transport.rank
        assert windows.keys == layout.length, (windows.keys, layout.length)
        owners = owned(windows.starts_P, layout)
        needs = Needs(Reach(windows.starts_P, windows.stops_P), layout, owners)
        distances = needs.distances()
        trade, own = needs.trade(rank, distances), needs.of(rank, rank)
        place = torch.cat([own, layout.sizes[rank] + torch.arange(len(trade.index_S))])
        index = torch.cat([needs.positions(rank, own), trade.index_S])
        order_L = index.argsort()
        local = windows.part(owners.index(rank), index[order_L])
        gathering = Gathering(owners, tokens.transport)
        return cls(trade, bool(distances), Mirror(place[order_L]), local, gathering)

    def pooled(self, x_T: Tensor, make: Make) -> Tensor:
        """What `make` makes of all windows, [P, ...]; see `Exchange.pooled`."""
        places_L = self.places.on(x_T.device)
        x_L = _Bring.apply(x_T, self) if self.travels else x_T.index_select(0, places_L)
        made_P = make(x_L, self.local)
        return gather(made_P, self.gathering) if self.gathering.layout.length else made_P

    def bring(self, x_T: Tensor) -> Tensor:
        """The keys of the rank's windows, [L, ...]; without a gradient."""
        sends = [
            Outgoing(peer, x_T.index_select(0, rows.on(x_T.device)))
            for peer, rows in self.trade.sends
        ]
        receives = [Incoming(peer, tokens, x_T) for peer, tokens in self.trade.receives]
        came = self.gathering.transport.trade(sends, receives).wait()
        return torch.cat([x_T, *came]).index_select(0, self.places.on(x_T.device))

    def send_back(self, dx_L: Tensor, tokens: int) -> Tensor:
        """The gradients of the rank's tokens, [T, ...], from those of all ranks' windows.

        Those that travel are in the keys' dtype, to which autograd has rounded them; their owners
        add them up in the accumulators' dtype.

        Args:
            dx_L: Of the keys of this rank's windows.
            tokens: This rank's, T.
        """
        sizes = [tokens, *(size for _, size in self.trade.receives)]
        spread = dx_L.new_zeros(sum(sizes), *dx_L.shape[1:])
        spread.index_copy_(0, self.places.on(dx_L.device).long(), dx_L)
        own_T, *parts = spread.split(sizes)
        peers = [peer for peer, _ in self.trade.receives]
        sends = [Outgoing(peer, part) for peer, part in zip(peers, parts, strict=True)]
        receives = [Incoming(peer, len(rows.host), dx_L) for peer, rows in self.trade.sends]
        came = self.gathering.transport.trade(sends, receives).wait()
        sum_T = wide(own_T)
        for (_, rows), part in zip(self.trade.sends, came, strict=True):
            sum_T.index_add_(0, rows.on(dx_L.device), wide(part))
        return sum_T.to(dx_L.dtype)

    def volume(
        self, numbers: int, made: int, wire: int, accumulator: int = 4, *, learns: bool
    ) -> Volume:
        """Bytes that this rank sends: halos there and back, and what was made of windows.

        Args:
            numbers: Of a token.
            made: Numbers of what is made of a window.
            wire: Bytes of a number, and of the gradient of a token.
            accumulator: Bytes of the gradient of what is made.
            learns: Whether gradients come back.
        """
        sent = sum(len(rows.host) for _, rows in self.trade.sends)
        came = sum(tokens for _, tokens in self.trade.receives)
        owners = self.gathering.layout
        of_made = volume_of_gathering(
            owners.ranks, owners.largest, made, wire, accumulator, learns=learns
        )
        back = came * numbers * wire if learns else 0
        return Volume(of_made.forward + sent * numbers * wire, of_made.backward + back)


class _Bring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T: Tensor, halo: Halo) -> Tensor:
        ctx.halo, ctx.tokens = halo, len(x_T)
        return halo.bring(x_T)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        return ctx.halo.send_back(grad_outputs[0], ctx.tokens), None
