"""Chunks: consecutive query rows and the range of keys that they see together, bounded in pairs.

Shapes: T query rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .reach import Reach

# A chunk is halved while it is mostly blind, but not below the pairs that a call costs anyway.
WASTE = 4
SMALL = 2**16


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) and the smallest range [first, last) of keys that holds what they see.

    Attributes:
        start: First row.
        stop: One past the last row.
        first: First key.
        last: One past the last key.
    """

    start: int
    stop: int
    first: int
    last: int

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.start, self.stop)


def halves(reach: Reach, chunk: Chunk) -> list[Chunk]:
    """The chunks of the two halves of a chunk's rows that see something."""
    found, middle = [], (chunk.start + chunk.stop) // 2
    for start, stop in ((chunk.start, middle), (middle, chunk.stop)):
        first_T, last_T = reach.first_T[start:stop], reach.last_T[start:stop]
        sees_T = first_T < last_T
        if bool(sees_T.any()):
            bounds = int(first_T[sees_T].min()), int(last_T[sees_T].max())
            found.append(Chunk(start, stop, *bounds))
    return found


def plan_chunks(reach: Reach, pairs: int, width: int | None = None) -> list[Chunk]:
    """Cuts the rows of a reach; those that see nothing may be in no chunk.

    The cuts depend on nothing but the arguments, so that ranks which hold other heads of the same
    rows cut alike.

    Args:
        reach: The keys that each row sees.
        pairs: Most rows times keys of a chunk that has more than one row.
        width: Most keys that a caller has in hand at once; None for all of a chunk.
    """
    seen_T = reach.first_T < reach.last_T
    sizes_T = (reach.last_T - reach.first_T).clamp(min=0)
    # Rows that see nothing must not stretch the range of the others.
    far = torch.iinfo(torch.int64).max
    first_T = reach.first_T.masked_fill(~seen_T, far)
    last_T = reach.last_T.masked_fill(~seen_T, -1)
    chunks: list[Chunk] = []
    waiting = [reach.span]
    while waiting:
        start, stop = waiting.pop()
        if start == stop:
            continue
        first, last = int(first_T[start:stop].min()), int(last_T[start:stop].max())
        if first >= last:
            continue
        rows, keys = stop - start, last - first
        at_once = rows * (keys if width is None else min(keys, width))
        blind = rows * keys > max(SMALL, WASTE * int(sizes_T[start:stop].sum()))
        if rows > 1 and (at_once > pairs or blind):
            middle = start + rows // 2
            waiting += [(middle, stop), (start, middle)]
        else:
            chunks.append(Chunk(start, stop, first, last))
    return chunks
