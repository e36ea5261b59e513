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
from .shards import Arrival, Shard, attend_over, gradients_over
from .transport import Handle, Outgoing, Transport


@dataclass(frozen=True, eq=False)
class Round:
    """What travels at the same time.

    Attributes:
        sends: Ranks, and which of this rank's tokens go to them.
        receives: Ranks, and how many of their tokens come.
        order: The received tokens in ascending order; None if they come so.
        shard: What they are.
    """

    sends: list[tuple[int, Mirror]]
    receives: list[tuple[int, int]]
    order: Mirror | None
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


class Fetch:
    """The fetching exchange over one layout; see `Method`.

    Ranks at the same distances trade in a round. Every rank makes the same rounds, in which none
    receives more tokens than the largest rank owns.

    Args:
        layout: Which tokens each rank owns.
        transport: Between these ranks.
        keeps: Whether a backward has what its forward received, and it does not come again.
    """

    def __init__(self, layout: Layout, transport: Transport, *, keeps: bool = False) -> None:
        self.layout, self.transport, self._keeps = layout, transport, keeps

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor, Kept]:
        """Output and lse over all that the queries see."""
        arrived: list[Tensor] = []
        arrivals = self._arrivals(seen, k_TGD, v_TGV, into=arrived)
        out_THV, lse_TH = attend_over(q_THD, seen, arrivals)
        given = q_THD, k_TGD, v_TGV, out_THV, lse_TH, seen
        return out_THV, lse_TH, Kept(*given, arrived=tuple(arrived))

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Fetches again; what is found for others' keys goes back while the next are computed."""
        rounds = self._plan(kept.seen.reach).rounds
        arrivals = self._arrivals(kept.seen, kept.k, kept.v, kept.arrived)
        found = gradients_over(dout_THV, dlse_TH, kept, arrivals)
        _, own = next(found)
        assert own is not None
        coming: list[tuple[Round, Parcel, Handle]] = []
        for trip, (arrival, parts) in zip(rounds, found, strict=True):
            keys = arrival.k_SGD, arrival.v_SGV
            sums = [torch.zeros_like(x, dtype=own.dq_THD.dtype) for x in keys]
            if parts is not None:
                own.dq_THD[arrival.shard.rows] += parts.dq_THD
                sums = [parts.dk_SGD, parts.dv_SGV]
            for back in coming:
                _add(own, *back)
            coming = [(trip, *self._send_back(trip, sums))]
        for back in coming:
            _add(own, *back)
        return own

    def _send_back(self, trip: Round, sums: list[Tensor]) -> tuple[Parcel, Handle]:
        """Sends gradients to the keys' owners, and starts to receive those of this rank's keys."""
        if trip.order is not None:
            # Back into the order in which the keys came.
            order = trip.order.on(sums[0].device)
            sums = [torch.empty_like(x).index_copy_(0, order.long(), x) for x in sums]
        sizes = [tokens for _, tokens in trip.receives]
        parts = zip(*(x.split(sizes) for x in sums), strict=True)
        sends = [
            Outgoing(peer, Parcel.pack(part).flat)
            for (peer, _), part in zip(trip.receives, parts, strict=True)
        ]
        like = Parcel.pack([x[:0] for x in sums])
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
        """The rank's own keys, and those of each round; the next round is on its way.

        Args:
            seen: What is seen.
            k_TGD: The rank's own keys.
            v_TGV: Its own values.
            arrived: Keys and values of each round, if they are there already.
            into: Where to leave them, if they shall be kept.
        """
        plan, like = self._plan(seen.reach), Parcel.pack([k_TGD[:0], v_TGV[:0]])

        def start(trip: Round) -> Handle:
            sends = [
                Outgoing(peer, Parcel.pack([k_TGD, v_TGV], rows.on(k_TGD.device)).flat)
                for peer, rows in trip.sends
            ]
            receives = [like.incoming(peer, tokens) for peer, tokens in trip.receives]
            return self.transport.trade(sends, receives)

        following = start(plan.rounds[0]) if plan.rounds and not arrived else None
        yield Arrival(plan.own, k_TGD, v_TGV)
        for number, trip in enumerate(plan.rounds):
            if following is None:
                keys = arrived[2 * number : 2 * number + 2]
            else:
                keys = _in_order(trip, like, following)
                more = number + 1 < len(plan.rounds)
                following = start(plan.rounds[number + 1]) if more else following
                if into is not None and self._keeps:
                    into.extend(keys)
            yield Arrival(trip.shard, *keys)

    def _plan(self, reach: Reach) -> Plan:
        """What this rank does, planned once per reach and without a message."""
        return reach.once(("fetch", self), lambda: self._make_plan(reach))

    def _make_plan(self, reach: Reach) -> Plan:
        rank, every = self.transport.rank, reach.of_all
        needs = every.once(("needs", self.layout), lambda: Needs(every, self.layout))
        rounds = []
        for distances in self._distances(needs.counts()):
            sends, receives, index_S = needs.trade(rank, distances)
            order = index_S.argsort()
            sorted_ = bool((index_S.diff() > 0).all())
            shard = Shard.of(reach, index_S[order])
            rounds.append(Round(sends, receives, None if sorted_ else Mirror(order), shard))
        own = self.layout.index(rank)
        return Plan(Shard.of(reach, own, whole=True), rounds)

    def _distances(self, counts: Tensor) -> list[list[int]]:
        """The distances of each round, near ones first."""
        ranks = self.layout.ranks
        at = torch.arange(ranks)
        rounds: list[list[int]] = []
        room = torch.zeros(ranks, dtype=torch.int64)
        for distance in range(1, ranks):
            asked = counts[at, (at - distance) % ranks]
            if not bool(asked.any()):
                continue
            if bool((asked > room).any()):
                rounds.append([])
                room = torch.full((ranks,), self.layout.largest)
            rounds[-1].append(distance)
            room = room - asked
        return rounds


def _in_order(trip: Round, like: Parcel, coming: Handle) -> list[Tensor]:
    """The keys and the values of a round in ascending order."""
    parts = [like.of(flat).tensors for flat in coming.wait()]
    keys = [torch.cat(x) for x in zip(*parts, strict=True)] if parts else like.tensors
    if trip.order is None:
        return keys
    order = trip.order.on(like.flat.device)
    return [x.index_select(0, order) for x in keys]


def _add(own: Gradients, trip: Round, like: Parcel, handle: Handle) -> None:
    """Adds what other ranks found for this rank's keys."""
    for (_, rows), flat in zip(trip.sends, handle.wait(), strict=True):
        index = rows.on(flat.device)
        for whole, part in zip((own.dk_SGD, own.dv_SGV), like.of(flat).tensors, strict=True):
            whole.index_add_(0, index, part)
