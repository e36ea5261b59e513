"""Grid: keys cut into consecutive blocks, from which a selection chooses.

Shapes: B blocks, S keys, T query rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .boundaries import boundaries
from .mirror import Mirror
from .once import Once

if TYPE_CHECKING:
    from .reach import Reach


@dataclass(frozen=True, eq=False)
class Grid(Once):
    """Block b holds the keys [starts[b], starts[b + 1]); a block may be empty.

    Each document has blocks of its own, the last one shorter, so that no block holds keys of two
    documents. Restricted to a shard's keys, a grid keeps its blocks and their numbers.

    Attributes:
        starts_B1: Boundaries of the blocks, ascending from 0, int64 [B + 1] on the host.
    """

    starts_B1: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts_B1", boundaries(self.starts_B1, "boundaries of blocks"))

    @classmethod
    def documents(cls, cu_seqlens: Tensor | Sequence[int], size: int) -> Grid:
        """Blocks of `size` tokens in each packed document, the last of each shorter.

        Args:
            cu_seqlens: Boundaries of the documents, ascending from 0, on the host.
            size: Tokens in a block, at least 1.

        Raises:
            ValueError: Boundaries that do not ascend from 0, or a size below 1.
        """
        cu = boundaries(cu_seqlens, "cu_seqlens")
        if size < 1:
            raise ValueError(f"a block holds at least 1 key, not {size}")
        counts = -(-cu.diff() // size)
        document = torch.repeat_interleave(torch.arange(len(counts)), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        starts = cu[document] + (torch.arange(len(document)) - before) * size
        return cls(torch.cat([starts, cu[-1:]]))

    def keys(self, index_S: Tensor) -> Grid:
        """The same blocks over local keys only.

        Args:
            index_S: Positions of the local keys, strictly ascending, int64 [S] on the host.
        """
        starts = torch.searchsorted(index_S, self.starts_B1)
        return Grid(starts)

    def __len__(self) -> int:
        return len(self.starts_B1) - 1

    @cached_property
    def largest(self) -> int:
        """Keys in the largest block."""
        return int(self.starts_B1.diff().max()) if len(self) else 0

    @cached_property
    def uniform(self) -> bool:
        """Whether all blocks have as many keys."""
        return bool((self.starts_B1.diff() == self.largest).all())

    def largest_of(self, first: int, last: int) -> int:
        """Keys in the largest of the blocks `first` to `last` - 1."""
        return self.largest if self.uniform else int(self.starts_B1[first : last + 1].diff().max())

    @cached_property
    def mirror(self) -> Mirror:
        """`starts_B1` as int32 on other devices."""
        return Mirror(self.starts_B1)

    def span(self, reach: Reach) -> tuple[Tensor, Tensor]:
        """First block and one past the last block that each row's reach meets, int64 [T].

        A row that sees nothing has first >= last.
        """
        first_T = torch.searchsorted(self.starts_B1, reach.first_T.contiguous(), right=True) - 1
        last_T = torch.searchsorted(self.starts_B1, reach.last_T.contiguous())
        return first_T, torch.where(reach.first_T < reach.last_T, last_T, first_T)
