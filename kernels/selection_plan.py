"""SelectionPlan: what a selection knows before it has seen any number.

Shapes: T query rows, Q query groups, P windows, B blocks, K windows that overlap a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .grid import Grid
from .mirror import Mirror
from .reach import Reach
from .windows import Windows


@dataclass(frozen=True)
class Sight:
    """Which windows a range of rows may see.

    Attributes:
        windows: The smallest range that holds all that any of them sees.
        first: From here to `last` every row sees every window.
        last: The end of that; may be before `first`.
        blind: Whether a row sees no window.
    """

    windows: slice
    first: int
    last: int
    blind: bool

    def __len__(self) -> int:
        return self.windows.stop - self.windows.start


@dataclass(frozen=True)
class Chunk:
    """Query groups that are scored together: their numbers, rows, and what these may see."""

    groups: slice
    rows: slice
    blocks: slice
    sight: Sight


@dataclass(frozen=True, eq=False)
class Bounds:
    """An interval per query group, [first, last), on the host and on devices."""

    first_Q: Tensor
    last_Q: Tensor

    @cached_property
    def first(self) -> Mirror:
        """`first_Q` as int32 on other devices."""
        return Mirror(self.first_Q)

    @cached_property
    def last(self) -> Mirror:
        """`last_Q` as int32 on other devices."""
        return Mirror(self.last_Q)


@dataclass(frozen=True, eq=False)
class SelectionPlan:
    """Made once per micro-batch; see `plan`.

    Attributes:
        windows: Of the pooled keys.
        grid: The blocks to choose from.
        starts_Q1: Boundaries of the query groups, int64 on the host.
        grouped: Whether groups are more than single rows.
        seen: The windows that each row sees.
        seen_by: The windows that the rows of a group see, as one interval.
        choosable: The blocks that the rows of a group reach, as one interval.
        own_first: The lowest of the blocks that the rows of a group are in.
    """

    windows: Windows
    grid: Grid
    starts_Q1: Tensor
    grouped: bool
    seen: Reach
    seen_by: Bounds
    choosable: Bounds
    own_first: Mirror
    _own_first_Q: Tensor

    @classmethod
    def of(
        cls, windows: Windows, grid: Grid, reach: Reach, query_starts: Tensor | None
    ) -> SelectionPlan:
        """The plan of a selection; see `select_blocks`."""
        starts = torch.arange(len(reach) + 1) if query_starts is None else query_starts
        seen = visible(windows, reach)
        first_T, last_T = grid.span(reach)
        blind = first_T >= last_T
        far = len(grid)
        first_Q = _least(first_T.masked_fill(blind, far), starts, query_starts, far)
        own_Q = _least((last_T - 1).masked_fill(blind, far), starts, query_starts, far)
        last_Q = -_least(-last_T.masked_fill(blind, 0), starts, query_starts, 0)
        seen_by = cls._bounds(seen.first_T, seen.last_T, starts, query_starts, len(windows))
        grouped = query_starts is not None
        choosable = Bounds(first_Q, last_Q)
        return cls(windows, grid, starts, grouped, seen, seen_by, choosable, Mirror(own_Q), own_Q)

    @staticmethod
    def _bounds(
        first_T: Tensor, last_T: Tensor, starts: Tensor, groups: Tensor | None, far: int
    ) -> Bounds:
        blind = first_T >= last_T
        first_Q = _least(first_T.masked_fill(blind, far), starts, groups, far)
        return Bounds(first_Q, -_least(-last_T.masked_fill(blind, 0), starts, groups, 0))

    def most_forced(self, initial: int, local: int) -> int:
        """The most blocks that a rule forces on one query group."""
        first_Q, last_Q = self.choosable.first_Q, self.choosable.last_Q
        size_Q = (last_Q - first_Q).clamp(min=0)
        head_Q = size_Q.clamp(max=initial)
        tail_Q = last_Q - (self._own_first_Q - (local - 1)) if local else torch.zeros_like(size_Q)
        forced_Q = torch.minimum(head_Q + tail_Q.clamp(min=0), size_Q)
        return int(forced_Q.max()) if len(forced_Q) else 0

    @cached_property
    def joined(self) -> bool:
        """Whether what the rows of a group see of the windows is one interval, in all groups."""
        sizes_Q = self.starts_Q1.diff()
        group_T = torch.repeat_interleave(torch.arange(len(sizes_Q)), sizes_Q)
        sees_T = self.seen.first_T < self.seen.last_T
        # Far enough apart that an interval of one group never joins that of another.
        before_T = group_T[sees_T] * (len(self.windows) + 2)
        first_T, order_T = (self.seen.first_T[sees_T] + before_T).sort()
        reached_T = (self.seen.last_T[sees_T] + before_T)[order_T].cummax(0).values
        same_T = before_T[order_T].diff() == 0
        return not bool((same_T & (first_T[1:] > reached_T[:-1])).any())

    @cached_property
    def overlapping(self) -> Bounds:
        """The windows that overlap each block, [B]."""
        starts_B, stops_B = self.grid.starts_B1[:-1], self.grid.starts_B1[1:]
        first_B = torch.searchsorted(self.windows.stops_P, starts_B.contiguous(), right=True)
        last_B = torch.searchsorted(self.windows.starts_P, stops_B.contiguous())
        # An empty block overlaps nothing, even inside of a window.
        return Bounds(first_B, torch.where(starts_B < stops_B, last_B, first_B))

    @cached_property
    def overlaps(self) -> tuple[Mirror, Mirror]:
        """Windows that overlap each block [K, B], and by how many keys; 0 for no such window."""
        first_B, last_B = self.overlapping.first_Q, self.overlapping.last_Q
        most = int((last_B - first_B).max().clamp(min=0)) if len(first_B) else 0
        at_KB = first_B + torch.arange(most)[:, None]
        there_KB = at_KB < last_B
        at_KB = at_KB.clamp(max=max(0, len(self.windows) - 1))
        if not len(self.windows):
            return Mirror(at_KB), Mirror(at_KB)
        starts_B, stops_B = self.grid.starts_B1[:-1], self.grid.starts_B1[1:]
        keys_KB = torch.minimum(self.windows.stops_P[at_KB], stops_B)
        keys_KB -= torch.maximum(self.windows.starts_P[at_KB], starts_B)
        return Mirror(at_KB), Mirror(keys_KB.masked_fill(~there_KB, 0))

    @cached_property
    def _planned(self) -> dict[tuple[int, int, int], list[Chunk]]:
        return {}

    def chunks(self, heads: int, height: int, most: int) -> list[Chunk]:
        """All query groups, some at a time; at least one, whatever it needs. Planned once.

        Args:
            heads: Scores of a chunk are heads * rows * windows in sight.
            height: Rows that a chunk may have. Rows far apart see different windows.
            most: Scores that a chunk may have.
        """
        how = heads, height, most
        if how not in self._planned:
            self._planned[how] = [*self._chunks(*how)]
        return self._planned[how]

    def _chunks(self, heads: int, height: int, most: int) -> Iterator[Chunk]:
        starts, at, groups = self.starts_Q1, 0, len(self.starts_Q1) - 1
        while at < groups:
            stop = self._reaching(at, height)
            rows = slice(int(starts[at]), int(starts[stop]))
            width = len(sight(self.seen, rows))
            if heads * (rows.stop - rows.start) * width > most:
                stop = self._reaching(at, most // (heads * width))
                rows = slice(rows.start, int(starts[stop]))
            first, last = self.choosable.first_Q[at:stop], self.choosable.last_Q[at:stop]
            low, high = int(first.min()), int(last.max())
            blocks = slice(low, max(low, high))
            yield Chunk(slice(at, stop), rows, blocks, sight(self.seen, rows))
            at = stop

    def _reaching(self, group: int, rows: int) -> int:
        """The group after the last that ends within so many rows; after `group` at least."""
        end = self.starts_Q1[group] + rows
        return max(group + 1, int(torch.searchsorted(self.starts_Q1, end, right=True)) - 1)


@lru_cache(maxsize=4)
def visible(windows: Windows, reach: Reach) -> Reach:
    """`Windows.reach`; of the same objects made once."""
    return windows.reach(reach)


@lru_cache(maxsize=2)
def plan(windows: Windows, grid: Grid, reach: Reach, query_starts: Tensor | None) -> SelectionPlan:
    """The plan of a selection; of the same objects made once, for all layers of a micro-batch."""
    return SelectionPlan.of(windows, grid, reach, query_starts)


def sight(seen: Reach, rows: slice) -> Sight:
    """What some rows see of windows."""
    first_T, last_T = seen.first_T[rows], seen.last_T[rows]
    sees = first_T < last_T
    blind = not bool(sees.all())
    if blind:
        first_T, last_T = first_T[sees], last_T[sees]
    if not len(first_T):
        return Sight(slice(0, 0), 0, 0, blind)
    windows = slice(int(first_T.min()), int(last_T.max()))
    if blind:
        return Sight(windows, windows.stop, windows.start, blind)
    return Sight(windows, int(first_T.max()), int(last_T.min()), blind)


def _least(x_T: Tensor, starts_Q1: Tensor, query_starts: Tensor | None, empty: int) -> Tensor:
    """The least of each group; `empty` for groups without rows."""
    if query_starts is None:
        return x_T
    sizes_Q = starts_Q1.diff()
    group_T = torch.repeat_interleave(torch.arange(len(sizes_Q)), sizes_Q)
    least_Q = torch.full_like(sizes_Q, empty)
    return least_Q.scatter_reduce_(0, group_T, x_T, "amin")
