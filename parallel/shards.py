"""Shards: attention over keys that arrive one part after the other.

Shapes: T local query rows, S keys of a part, H query heads, G key-value heads, D key dim, V value
dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels.attend import attend, attend_backward
from ..kernels.blocks import Blocks
from ..kernels.merge import merge
from ..kernels.precision import wide_dtype
from ..kernels.reach import Reach
from ..kernels.scoring import Gradients
from .method import Kept
from .seen import Seen


@dataclass(frozen=True, eq=False)
class Shard:
    """Some keys as the local queries see them.

    Attributes:
        index_S: Global positions of the keys, ascending, on the host.
        rows: The local rows to compute.
        reach: Bounds of those rows, as the keys' numbers within the shard.
    """

    index_S: Tensor
    rows: slice
    reach: Reach

    @classmethod
    def of(cls, reach: Reach, index_S: Tensor, *, whole: bool = False) -> Shard:
        """What a reach sees of some keys.

        Args:
            reach: Of all local rows.
            index_S: Global positions of the keys, ascending.
            whole: Whether rows count that see none of them.
        """
        local = reach.keys(index_S)
        start, stop = (0, len(reach)) if whole else local.span
        rows = slice(start, stop)
        # Copied bounds: what is kept for a reach must keep neither it nor other rows alive.
        bounds = local.first_T[rows].clone(), local.last_T[rows].clone()
        return cls(index_S, rows, Reach(*bounds))

    def chosen(self, blocks: Blocks | None) -> Blocks | None:
        """What the rows chose of the keys."""
        if blocks is None:
            return None
        grid = blocks.grid.once(("keys of", self), lambda: blocks.grid.keys(self.index_S))
        return blocks.over(grid).of_rows(self.rows)


@dataclass(frozen=True, eq=False)
class Arrival:
    """Keys and values that are there.

    Attributes:
        shard: Which ones, and who sees them.
        k_SGD: The keys.
        v_SGV: The values.
    """

    shard: Shard
    k_SGD: Tensor
    v_SGV: Tensor


class InParts(ABC):
    """A method whose keys come one part after the other; see `Method`.

    Attributes:
        keeps: Whether a backward has what came in its forward, and it does not come again.
    """

    keeps: bool

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor, Kept]:
        """Output and lse over all parts."""
        arrived: list[Tensor] = []
        arrivals = self._arrivals(seen, k_TGD, v_TGV, into=arrived)
        out_THV, lse_TH = attend_over(q_THD, seen, arrivals)
        given = q_THD, k_TGD, v_TGV, out_THV, lse_TH, seen
        return out_THV, lse_TH, Kept(*given, arrived=tuple(arrived))

    @abstractmethod
    def _arrivals(
        self,
        seen: Seen,
        k_TGD: Tensor,
        v_TGV: Tensor,
        arrived: Sequence[Tensor] = (),
        into: list[Tensor] | None = None,
    ) -> Iterator[Arrival]:
        """The rank's own keys first, then each part while the next is on its way.

        Args:
            seen: What is seen.
            k_TGD: The rank's own keys.
            v_TGV: Its own values.
            arrived: Keys and values of each other part in one tensor, if they are there already.
            into: Where to leave them, if they shall be kept.
        """


def attend_over(q_THD: Tensor, seen: Seen, arrivals: Iterator[Arrival]) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H] over all that arrives, merged in the accumulators' dtype.

    Args:
        q_THD: Queries.
        seen: What they see.
        arrivals: The first one is of all rows, with those that see nothing.
    """

    def attended(arrival: Arrival, sink_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shard, how = arrival.shard, {"scale": seen.scale, "out_dtype": wide_dtype(q_THD)}
        given = arrival.k_SGD, arrival.v_SGV, shard.reach, shard.chosen(seen.blocks)
        return attend(q_THD[shard.rows], *given, sink_H=sink_H, **how)

    # A sink is one more key, so that the first shard may bring it.
    out_THV, lse_TH = attended(next(arrivals), seen.sink_H)
    for arrival in arrivals:
        rows = arrival.shard.rows
        if len(arrival.shard.reach):
            out_THV[rows], lse_TH[rows] = merge(out_THV[rows], lse_TH[rows], *attended(arrival))
        # What follows would come beside it.
        del arrival
    return out_THV.to(q_THD.dtype), lse_TH


def gradients_over(
    dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept, arrivals: Iterator[Arrival]
) -> Iterator[tuple[Shard, Gradients | None]]:
    """The gradients of each arrival; None where no row sees it.

    Those of sinks come with the first, of all rows; those of queries are of `shard.rows`.
    """

    def gradients(arrival: Arrival, sink_H: Tensor | None = None) -> Gradients:
        shard, rows = arrival.shard, arrival.shard.rows
        dout, q, out, lse = (x[rows] for x in (dout_THV, kept.q, kept.out, kept.lse))
        dlse = None if dlse_TH is None else dlse_TH[rows]
        how = {"scale": kept.seen.scale, "dlse_TH": dlse, "sink_H": sink_H}
        given = q, arrival.k_SGD, arrival.v_SGV, out, lse, shard.reach
        return attend_backward(dout, *given, shard.chosen(kept.seen.blocks), **how)

    first = next(arrivals)
    yield first.shard, gradients(first, kept.seen.sink_H)
    del first
    for arrival in arrivals:
        yield arrival.shard, gradients(arrival) if len(arrival.shard.reach) else None
        # What follows would come beside it.
        del arrival
