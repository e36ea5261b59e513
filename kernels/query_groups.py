"""Query groups: neighbouring query rows that something is asked of together.

Shapes: T query rows, Q groups, C heads, U blocks; M rows and N groups of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .boundaries import boundaries
from .chunks import Chunk
from .mirror import Mirror
from .reach import Reach
from .slots import Slots


@dataclass(frozen=True, eq=False)
class QueryGroups:
    """Group g holds the rows [starts[g], starts[g + 1]); a group may be empty.

    Attributes:
        starts_Q1: Boundaries of the groups, ascending from 0, int64 [Q + 1] on the host; those of
            a `Grid` over the same tokens, say.
    """

    starts_Q1: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts_Q1", boundaries(self.starts_Q1, "query groups"))

    def __len__(self) -> int:
        return len(self.starts_Q1) - 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.starts_Q1[-1])

    @cached_property
    def largest(self) -> int:
        """Rows of the largest group."""
        return int(self.starts_Q1.diff().max()) if len(self) else 0

    @cached_property
    def mirror(self) -> Mirror:
        """`starts_Q1` as int32 on other devices."""
        return Mirror(self.starts_Q1)

    def reach(self, reach: Reach) -> Reach:
        """For each group the smallest interval that holds what its rows see."""
        group_T = torch.repeat_interleave(torch.arange(len(self)), self.starts_Q1.diff())
        seen_T = reach.first_T < reach.last_T
        group_T, first_T, last_T = group_T[seen_T], reach.first_T[seen_T], reach.last_T[seen_T]
        nothing = torch.zeros(len(self), dtype=torch.int64)
        how = {"include_self": False}
        return Reach(
            nothing.scatter_reduce(0, group_T, first_T, "amin", **how),
            nothing.scatter_reduce(0, group_T, last_T, "amax", **how),
        )

    def rows_of(self, chunk: Chunk) -> Chunk:
        """The rows of a chunk of groups."""
        start, stop = (int(self.starts_Q1[at]) for at in (chunk.start, chunk.stop))
        return replace(chunk, start=start, stop=stop)

    def largest_of(self, x_CMU: Tensor, groups: slice) -> Tensor:
        """The largest entry over the rows of each group, [C, N, U]; 0 or False for an empty one.

        Args:
            x_CMU: Something that each row of the groups has, not negative.
            groups: A range of groups.
        """
        starts = self.starts_Q1[groups.start : groups.stop + 1]
        sizes = starts.diff()
        size = int(sizes.max())
        if bool((sizes == size).all()):
            return x_CMU.unflatten(1, (-1, size)).amax(2)
        starts_N1 = self.mirror.on(x_CMU.device)[groups.start : groups.stop + 1, None]
        row_NZ = starts_N1[:-1] + torch.arange(size, device=x_CMU.device)
        at_NZ = (row_NZ - starts_N1[0]).clamp(max=x_CMU.shape[1] - 1)
        x_CNZU = x_CMU.index_select(1, at_NZ.flatten()).unflatten(1, at_NZ.shape)
        return x_CNZU.masked_fill_((row_NZ >= starts_N1[1:])[..., None], 0).amax(2)

    def together(self, slots: Slots, groups: slice) -> Slots:
        """Slots whose rows are groups, each of which sees the blocks that one of its rows sees."""
        seen_CNU = self.largest_of(slots.seen_CMUZ.any(-1), groups)
        return replace(slots, rows=groups, seen_CMUZ=seen_CNU.unsqueeze(-1))
