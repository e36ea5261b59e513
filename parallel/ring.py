"""Ring: shards of keys and values go from rank to rank while the shard before is computed.

Ring attention (Liu et al. 2023, arXiv 2310.01889) for any layout and route, with an explicit
backward.
Shapes: T local query rows (and local keys), S keys of a shard, H query heads, G key-value heads,
D key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..kernels.attend import attend, attend_backward
from ..kernels.blocks import Blocks
from ..kernels.grid import Grid
from ..kernels.merge import merge
from ..kernels.precision import wide_dtype
from ..kernels.reach import Reach
from ..kernels.scoring import Gradients
from .layout import Layout
from .method import Kept
from .parcel import Parcel
from .route import Route
from .seen import Seen
from .transport import Handle, Outgoing, Transport


@dataclass(frozen=True)
class Shard:
    """One rank's keys as the local queries see them.

    Attributes:
        rows: The local rows to compute.
        reach: Bounds of those rows, as the keys' numbers within the shard.
    """

    rows: slice
    reach: Reach


class Ring:
    """A ring over one layout; see `Method`.

    Args:
        layout: Which tokens each rank owns.
        transport: Between these ranks.
        route: How the shards go round.
    """

    def __init__(self, layout: Layout, transport: Transport, route: Route) -> None:
        self.transport, self.route, self._sizes = transport, route, layout.sizes
        self._index = [layout.index(rank) for rank in range(layout.ranks)]
        self._plans: WeakKeyDictionary[Reach, list[Shard]] = WeakKeyDictionary()
        self._grids: WeakKeyDictionary[Grid, list[Grid]] = WeakKeyDictionary()

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor, Kept]:
        """Output and lse over all shards, merged in the accumulators' dtype."""
        wide, scale = wide_dtype(q_THD), seen.scale
        arrivals = self._arrivals(seen, k_TGD, v_TGV)
        own, blocks, k, v = next(arrivals)
        # A sink is one more key, so that the first shard may bring it.
        how = {"scale": scale, "out_dtype": wide, "sink_H": seen.sink_H}
        out_THV, lse_TH = attend(q_THD, k, v, own.reach, blocks, **how)
        for shard, blocks, k, v in arrivals:
            if len(shard.reach):
                rows = shard.rows
                part = attend(q_THD[rows], k, v, shard.reach, blocks, scale=scale, out_dtype=wide)
                out_THV[rows], lse_TH[rows] = merge(out_THV[rows], lse_TH[rows], *part)
        out_THV = out_THV.to(q_THD.dtype)
        return out_THV, lse_TH, Kept(q_THD, k_TGD, v_TGV, out_THV, lse_TH, seen)

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Gradients; the sums of dk and dv go round one step behind the shard they belong to."""

        def gradients(
            shard: Shard, blocks: Blocks | None, k: Tensor, v: Tensor, sink: Tensor | None = None
        ) -> Gradients:
            dout, q, out, lse = (x[shard.rows] for x in (dout_THV, kept.q, kept.out, kept.lse))
            dlse = None if dlse_TH is None else dlse_TH[shard.rows]
            how = {"scale": kept.seen.scale, "dlse_TH": dlse, "sink_H": sink}
            return attend_backward(dout, q, k, v, out, lse, shard.reach, blocks, **how)

        arrivals = self._arrivals(kept.seen, kept.k, kept.v)
        own = gradients(*next(arrivals), kept.seen.sink_H)
        dq_THD, sums = own.dq_THD, Parcel.pack(own.dk_SGD, own.dv_SGV)
        coming = self._send_home(0, sums)
        for step, (shard, blocks, k, v) in enumerate(arrivals, start=1):
            parts = None
            if len(shard.reach):
                parts = gradients(shard, blocks, k, v)
                dq_THD[shard.rows] += parts.dq_THD
            sums = sums.of(*coming.wait())
            if parts is not None:
                dk, dv = sums.keys_and_values
                dk += parts.dk_SGD
                dv += parts.dv_SGV
            coming = self._send_home(step, sums)
        dk_TGD, dv_TGV = sums.of(*coming.wait()).keys_and_values
        return own._replace(dq_THD=dq_THD, dk_SGD=dk_TGD, dv_SGV=dv_TGV)

    def _send_home(self, step: int, sums: Parcel) -> Handle:
        """Sends the sums of the shard of a step on, and starts to receive those of the next."""
        to, of, following = self.route.homeward(self.transport.rank, step)
        shard = self.transport.rank
        if following < self.route.steps:
            shard = self.route.shards[following][self.transport.rank]
        return self.transport.trade(
            [Outgoing(to, sums.flat)], [sums.incoming(of, self._sizes[shard])]
        )

    def _arrivals(
        self, seen: Seen, k_TGD: Tensor, v_TGV: Tensor
    ) -> Iterator[tuple[Shard, Blocks | None, Tensor, Tensor]]:
        """Each shard with what was chosen of it, its keys and values; the next is on its way.

        The rank's own comes first.
        """
        parcel, rank = Parcel.pack(k_TGD, v_TGV), self.transport.rank
        coming: dict[int, Handle] = {}
        for step, shard in enumerate(self._plan(seen.reach)):
            if step:
                parcel = parcel.of(*coming.pop(step).wait())
            for to, of, use in self.route.hops(rank, step):
                tokens = self._sizes[self.route.shards[use][rank]]
                coming[use] = self.transport.trade(
                    [Outgoing(to, parcel.flat)], [parcel.incoming(of, tokens)]
                )
            yield shard, self._chosen(seen.blocks, shard, step), *parcel.keys_and_values

    def _chosen(self, blocks: Blocks | None, shard: Shard, step: int) -> Blocks | None:
        """What the rows of a shard chose of its keys."""
        if blocks is None:
            return None
        grids = self._grids.get(blocks.grid)
        if grids is None:
            grids = self._grids[blocks.grid] = [blocks.grid.keys(x) for x in self._arriving()]
        return blocks.over(grids[step]).of_rows(shard.rows)

    def _arriving(self) -> list[Tensor]:
        """The positions of the keys that arrive at each step."""
        return [self._index[shards[self.transport.rank]] for shards in self.route.shards]

    def _plan(self, reach: Reach) -> list[Shard]:
        """The shards in the order in which they arrive, planned once per reach."""
        shards = self._plans.get(reach)
        if shards is None:
            # A copy of each: what is kept for a reach must not keep the reach alive.
            locals_ = [replace(reach.keys(index_S)) for index_S in self._arriving()]
            shards = [Shard(slice(0, len(reach)), locals_[0])]
            for local in locals_[1:]:
                start, stop = local.span
                shards.append(Shard(slice(start, stop), local.rows(torch.arange(start, stop))))
            self._plans[reach] = shards
        return shards
