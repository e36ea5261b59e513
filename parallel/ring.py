"""Ring: shards of keys and values go from rank to rank while the shard before is computed.

Ring attention (Liu et al. 2023, arXiv 2310.01889) for any layout and route, with an explicit
backward.
Shapes: T local query rows (and local keys), S keys of a shard, H query heads, G key-value heads,
D key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..kernels.reach import Reach
from ..kernels.scoring import Gradients
from .layout import Layout
from .method import Kept
from .parcel import Parcel
from .route import Route
from .seen import Seen
from .shards import Arrival, InParts, Shard, gradients_over
from .transport import Handle, Outgoing, Transport


class Ring(InParts):
    """A ring over one layout; see `Method`.

    Args:
        layout: Which tokens each rank owns.
        transport: Between these ranks.
        route: How the shards go round.
        keeps: Whether a backward has the shards of its forward, and they do not go round again.
    """

    def __init__(
        self, layout: Layout, transport: Transport, route: Route, *, keeps: bool = False
    ) -> None:
        self.keeps = keeps
        self.transport, self.route, self._sizes = transport, route, layout.sizes
        self._index = [layout.index(rank) for rank in range(layout.ranks)]

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Gradients; the sums of dk and dv go round one step behind the shard they belong to."""
        arrivals = self._arrivals(kept.seen, kept.k, kept.v, kept.arrived)
        found = gradients_over(dout_THV, dlse_TH, kept, arrivals)
        _, own = next(found)
        assert own is not None
        sums = Parcel.pack([own.dk_SGD, own.dv_SGV])
        dq_THD, dsink_H = own.dq_THD, own.dsink_H
        del own  # or its dk and dv would be there beside their copy
        coming = self._send_home(0, sums)
        for step in range(1, self.route.steps):
            shard, parts = next(found)
            sums = sums.of(*coming.wait())
            if parts is not None:
                dq_THD[shard.rows] += parts.dq_THD
                _add(sums, parts)
            # Before the next ones are there as well.
            del parts
            coming = self._send_home(step, sums)
        dk_TGD, dv_TGV = sums.of(*coming.wait()).tensors
        return Gradients(dq_THD, dk_TGD, dv_TGV, dsink_H)

    def _send_home(self, step: int, sums: Parcel) -> Handle:
        """Sends the sums of the shard of a step on, and starts to receive those of the next."""
        rank = self.transport.rank
        to, of, following = self.route.homeward(rank, step)
        shard = rank if following == self.route.steps else self.route.shards[following][rank]
        return self.transport.trade(
            [Outgoing(to, sums.flat)], [sums.incoming(of, self._sizes[shard])]
        )

    def _arrivals(
        self,
        seen: Seen,
        k_TGD: Tensor,
        v_TGV: Tensor,
        arrived: Sequence[Tensor] = (),
        into: list[Tensor] | None = None,
    ) -> Iterator[Arrival]:
        parcel, rank = Parcel.pack([k_TGD, v_TGV]), self.transport.rank
        coming: dict[int, Handle] = {}
        for step, shard in enumerate(self._plan(seen.reach)):
            if step:
                flat = arrived[step - 1] if arrived else coming.pop(step).wait()[0]
                parcel = parcel.of(flat)
                if into is not None and self.keeps:
                    into.append(flat)
            for to, of, use in () if arrived else self.route.hops(rank, step):
                tokens = self._sizes[self.route.shards[use][rank]]
                coming[use] = self.transport.trade(
                    [Outgoing(to, parcel.flat)], [parcel.incoming(of, tokens)]
                )
            yield Arrival(shard, *parcel.tensors)

    def _arriving(self) -> list[Tensor]:
        """The positions of the keys that arrive at each step."""
        return [self._index[shards[self.transport.rank]] for shards in self.route.shards]

    def _plan(self, reach: Reach) -> list[Shard]:
        """The shards in the order in which they arrive, planned once per reach."""

        def plan() -> list[Shard]:
            own, *others = self._arriving()
            return [Shard.of(reach, own, whole=True), *(Shard.of(reach, x) for x in others)]

        return reach.once(("ring", self), plan)


def _add(sums: Parcel, parts: Gradients) -> None:
    """Adds what this rank found for the keys and values of a shard."""
    dk_SGD, dv_SGV = sums.tensors
    dk_SGD += parts.dk_SGD
    dv_SGV += parts.dv_SGV
