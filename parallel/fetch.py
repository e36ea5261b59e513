"""Fetch: every rank receives the keys and values that some of its queries reach, and no others.

They come straight from their owners, in rounds, and the gradients go straight back; windows become
halos, and packed documents stay where they are.
Shapes: T local query rows (and local keys), S keys of a round, H query heads, G key-value heads,
D key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.mirror import Mirror
from ..kernels.reach import Reach
from ..kernels.scoring import Gradients
from .layout import Layout
from .method import Kept
from .parcel import Parcel
from .ranges import Needs
from .seen import Seen
from .shards import Arrival, InParts, Shard, gradients_over
from .transport import Handle, Outgoing, Transport


@dataclass(frozen=True, eq=False)
class Round:
    """What travels at the same time.

    Attributes:
        sends: Ranks, and which of this rank's tokens go to them.
        receives: Ranks, and where in the shard their tokens belong.
        shard: What comes, in ascending order.
    """

    sends: list[tuple[int, Mirror]]
    receives: list[tuple[int, Mirror]]
    shard: Shard


@dataclass(frozen=True)
class Plan:
    """What one rank does for one reach.

    Attributes:
        own: Its own tokens, of which nothing travels.
        rounds: The rest.
    """

    own: Shard
    rounds: list[Round]


class Fetch(InParts):
    """The fetching exchange over one layout; see `Method`.

    Ranks at the same distances trade in a round. Every rank makes the same rounds, in which none
    receives more tokens than the largest rank owns, and none sends more.

    Args:
        layout: Which tokens each rank owns.
        transport: Between these ranks.
        keeps: Whether a backward has what its forward received, and it does not come again.
    """

    def __init__(self, layout: Layout, transport: Transport, *, keeps: bool = False) -> None:
        self.layout, self.transport, self.keeps = layout, transport, keeps

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Fetches again; what is found for others' keys goes back while the next are computed."""
        rounds = self._plan(kept.seen.reach).rounds
        arrivals = self._arrivals(kept.seen, kept.k, kept.v, kept.arrived)
        found = gradients_over(dout_THV, dlse_TH, kept, arrivals)
        _, own = next(found)
        assert own is not None
        coming: list[tuple[Round, Parcel, Handle]] = []
        for trip in rounds:
            shard, parts = next(found)
            if parts is not None:
                own.dq_THD[shard.rows] += parts.dq_THD
            while coming:
                _add(own, *coming.pop())
            coming.append((trip, *self._send_back(trip, own, parts)))
            # Before the next ones are there as well.
            del parts
        while coming:
            _add(own, *coming.pop())
        return own

    def _send_back(
        self, trip: Round, own: Gradients, parts: Gradients | None
    ) -> tuple[Parcel, Handle]:
        """Sends gradients to the keys' owners, and starts to receive those of this rank's keys."""
        like = Parcel.pack([own.dk_SGD[:0], own.dv_SGV[:0]])
        # What no row sees has not come.
        assert parts is not None or not trip.receives, trip.receives
        sends = [] if parts is None else [
            Outgoing(peer, Parcel.pack(parts[1:3], places.on(like.flat.device)).flat)
            for peer, places in trip.receives
        ]  # fmt: skip
        receives = [like.incoming(peer, len(rows.host)) for peer, rows in trip.sends]
        return like, self.transport.trade(sends, receives)

    def _arrivals(
        self,
        seen: Seen,
        k_TGD: Tensor,
        v_TGV: Tensor,
        arrived: Sequence[Tensor] = (),
        into: list[Tensor] | None = None,
    ) -> Iterator[Arrival]:
        plan = self._plan(seen.reach)
        like = Parcel.pack([k_TGD[:0], v_TGV[:0]])

        def start(trip: Round) -> Handle:
            sends = [
                Outgoing(peer, Parcel.pack([k_TGD, v_TGV], rows.on(k_TGD.device)).flat)
                for peer, rows in trip.sends
            ]
            receives = [like.incoming(peer, len(at.host)) for peer, at in trip.receives]
            return self.transport.trade(sends, receives)

        travels = [] if arrived else plan.rounds
        coming = [start(trip) for trip in travels[:1]]
        yield Arrival(plan.own, k_TGD, v_TGV)
        for number, trip in enumerate(plan.rounds, start=1):
            if arrived:
                sorted_ = like.of(arrived[number - 1])
            else:
                sorted_ = _in_place(trip, like, coming.pop().wait())
            if into is not None and self.keeps:
                into.append(sorted_.flat)
            # What came in parts is gone, and only its copy in order is there.
            coming = [start(following) for following in travels[number : number + 1]]
            yield Arrival(trip.shard, *sorted_.tensors)
            del sorted_

    def _plan(self, reach: Reach) -> Plan:
        """What this rank does, planned once per reach and without a message."""
        return reach.once(("fetch", self), lambda: self._make_plan(reach))

    def _make_plan(self, reach: Reach) -> Plan:
        rank, every = self.transport.rank, reach.of_all
        needs = every.once(("needs", self.layout), lambda: Needs(every, self.layout))
        rounds = []
        for distances in self._distances(needs.counts()):
            sends, receives, index = needs.trade(rank, distances)
            index_S, places_S = _sorted(index)
            places = map(Mirror, places_S.split([tokens for _, tokens in receives]))
            owners = [peer for peer, _ in receives]
            placed = list(zip(owners, places, strict=True))
            rounds.append(Round(sends, placed, Shard.of(reach, index_S)))
        own = self.layout.index(rank)
        return Plan(Shard.of(reach, own, whole=True), rounds)

    def _distances(self, counts: Tensor) -> list[list[int]]:
        """The distances of each round, near ones first."""
        ranks = self.layout.ranks
        at = torch.arange(ranks)
        rounds: list[list[int]] = []
        room_2P = torch.zeros(2, ranks, dtype=torch.int64)
        for distance in range(1, ranks):
            asked = counts[at, (at - distance) % ranks]
            both_2P = torch.stack([asked, asked.roll(-distance)])
            if not bool(asked.any()):
                continue
            if bool((both_2P > room_2P).any()):
                rounds.append([])
                room_2P = torch.full_like(room_2P, self.layout.largest)
            rounds[-1].append(distance)
            room_2P = room_2P - both_2P
        return rounds


def _sorted(index_S: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in ascending order, and the place of each one in it."""
    if bool((index_S[1:] > index_S[:-1]).all()):
        return index_S, torch.arange(len(index_S))
    sorted_S, order_S = index_S.sort()
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S))
    return sorted_S, places_S


def _in_place(trip: Round, like: Parcel, received: list[Tensor]) -> Parcel:
    """What came in a round, in the order of its shard."""
    if len(received) == 1:
        return like.of(*received)
    tokens = len(trip.shard.index_S)
    whole = like.of(like.flat.new_empty(tokens * like.width))
    for (_, places), flat in zip(trip.receives, received, strict=True):
        at = places.on(flat.device).long()
        for x, part in zip(whole.tensors, like.of(flat).tensors, strict=True):
            x.index_copy_(0, at, part)
    return whole


def _add(own: Gradients, trip: Round, like: Parcel, handle: Handle) -> None:
    """Adds what other ranks found for this rank's keys."""
    for (_, rows), flat in zip(trip.sends, handle.wait(), strict=True):
        index = rows.on(flat.device)
        for whole, part in zip((own.dk_SGD, own.dv_SGV), like.of(flat).tensors, strict=True):
            whole.index_add_(0, index, part)
