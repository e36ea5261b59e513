"""Shards: attention over keys that arrive one part after the other.

Shapes: T local query rows, S keys of a part, H query heads, G key-value heads, D key dim, V value
dim.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def attend_over(q_THD: Tensor, seen: Seen, arrivals: Iterator[Arrival]) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H] over all that arrives, merged in the accumulators' dtype.

    Args:
        q_THD: Queries.
        seen: What they see.
        arrivals: The first one is of all rows, with those that see nothing.
    """
    how = {"scale": seen.scale, "out_dtype": wide_dtype(q_THD)}
    first = next(arrivals)
    keys, reach = (first.k_SGD, first.v_SGV), first.shard.reach
    # A sink is one more key, so that the first shard may bring it.
    out_THV, lse_TH = attend(
        q_THD, *keys, reach, first.shard.chosen(seen.blocks), sink_H=seen.sink_H, **how
    )
    for arrival in arrivals:
        shard = arrival.shard
        if len(shard.reach):
            rows, keys = shard.rows, (arrival.k_SGD, arrival.v_SGV)
            part = attend(q_THD[rows], *keys, shard.reach, shard.chosen(seen.blocks), **how)
            out_THV[rows], lse_TH[rows] = merge(out_THV[rows], lse_TH[rows], *part)
    return out_THV.to(q_THD.dtype), lse_TH


def gradients_over(
    dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept, arrivals: Iterator[Arrival]
) -> Iterator[tuple[Arrival, Gradients | None]]:
    """The gradients of each arrival; None where no row sees it.

    Those of sinks come with the first, of all rows; those of queries are of `shard.rows`.
    """
    for number, arrival in enumerate(arrivals):
        shard = arrival.shard
        if number and not len(shard.reach):
            yield arrival, None
            continue
        rows = shard.rows
        dout, q, out, lse = (x[rows] for x in (dout_THV, kept.q, kept.out, kept.lse))
        how = {
            "scale": kept.seen.scale,
            "dlse_TH": None if dlse_TH is None else dlse_TH[rows],
            "sink_H": None if number else kept.seen.sink_H,
        }
        given = q, arrival.k_SGD, arrival.v_SGV, out, lse, shard.reach
        yield arrival, attend_backward(dout, *given, shard.chosen(kept.seen.blocks), **how)
