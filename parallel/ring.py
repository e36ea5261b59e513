"""Ring: shards of keys and values go from rank to rank while the shard before is computed.

Ring attention (Liu et al. 2023, arXiv 2310.01889) for any layout, with an explicit backward.
Shapes: T local query rows (and keys of one shard), H query heads, G key-value heads, D key dim,
V value dim.
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
from .seen import Seen
from .transport import Transport


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
    """The ring over one layout; see `exchange.Method`."""

    def __init__(self, layout: Layout, transport: Transport) -> None:
        self.transport = transport
        self._index = [layout.index(rank) for rank in range(layout.ranks)]
        self._plans: WeakKeyDictionary[Reach, list[Shard]] = WeakKeyDictionary()
        self._grids: WeakKeyDictionary[Grid, list[Grid]] = WeakKeyDictionary()

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
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
        return out_THV.to(q_THD.dtype), lse_TH

    def backward(
        self,
        dout_THV: Tensor,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        out_THV: Tensor,
        lse_TH: Tensor,
        dlse_TH: Tensor | None,
        seen: Seen,
    ) -> Gradients:
        """Gradients; the sums of dk and dv go round one step behind the shard they belong to."""

        def gradients(
            shard: Shard, blocks: Blocks | None, k: Tensor, v: Tensor, sink: Tensor | None = None
        ) -> Gradients:
            dout, q, out, lse = (x[shard.rows] for x in (dout_THV, q_THD, out_THV, lse_TH))
            dlse = None if dlse_TH is None else dlse_TH[shard.rows]
            how = {"scale": seen.scale, "dlse_TH": dlse, "sink_H": sink}
            return attend_backward(dout, q, k, v, out, lse, shard.reach, blocks, **how)

        arrivals = self._arrivals(seen, k_TGD, v_TGV)
        own = gradients(*next(arrivals), seen.sink_H)
        dq_THD, dk, dv = own[:3]
        sums = self.transport.shift([dk, dv])
        for shard, blocks, k, v in arrivals:
            parts = None
            if len(shard.reach):
                parts = gradients(shard, blocks, k, v)
                dq_THD[shard.rows] += parts[0]
            dk, dv = sums.wait()
            if parts is not None:
                dk += parts[1]
                dv += parts[2]
            sums = self.transport.shift([dk, dv])
        dk_TGD, dv_TGV = sums.wait()
        return own._replace(dq_THD=dq_THD, dk_SGD=dk_TGD, dv_SGV=dv_TGV)

    def _arrivals(
        self, seen: Seen, k_TGD: Tensor, v_TGV: Tensor
    ) -> Iterator[tuple[Shard, Blocks | None, Tensor, Tensor]]:
        """Each shard with what was chosen of it, its keys and values; the next is on its way.

        The rank's own comes first.
        """
        shards = self._plan(seen.reach)
        for number, shard in enumerate(shards):
            following = None
            if number + 1 < len(shards):
                following = self.transport.shift([k_TGD, v_TGV])
            yield shard, self._chosen(seen.blocks, shard, number), k_TGD, v_TGV
            if following is not None:
                k_TGD, v_TGV = following.wait()

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
        rank, size = self.transport.rank, self.transport.size
        return [self._index[(rank - step) % size] for step in range(size)]

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
