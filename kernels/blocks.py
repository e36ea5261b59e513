"""Blocks: which blocks of a grid each query may see, as chosen by a selection.

Shapes: T query rows, Q query groups, B blocks of the grid, C block heads (heads that choose
separately), N blocks per choice, P = C * Q * N choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .boundaries import boundaries
from .cuda.invert import fits, invert
from .cuda.standing import serves
from .grid import Grid
from .mirror import Mirror
from .once import Once


@dataclass(frozen=True, eq=False)
class Blocks(Once):
    """For each query group and block head a list of blocks; a query sees their union in its reach.

    Numbers of grid blocks and no ranges of keys: half the memory, duplicates are equal numbers,
    and the choices invert by counting.

    Attributes:
        ids_QCN: Chosen blocks, int32 on the queries' device, ascending and distinct in each
            list apart from -1 for none. A block head may serve several key-value heads, or there
            may be one per query head.
        grid: The blocks to choose from.
        query_starts: Boundaries of the query groups, ascending from 0, int64 [Q + 1] on the host;
            None if each query row chooses for itself.
    """

    ids_QCN: Tensor
    grid: Grid
    query_starts: Tensor | None = None

    @classmethod
    def choose(
        cls,
        ids_QCN: Tensor,
        grid: Grid,
        query_starts: Tensor | Sequence[int] | None = None,
        *,
        check: bool = False,
    ) -> Blocks:
        """Blocks from lists in any order, with duplicates and entries below 0 for none.

        Args:
            ids_QCN: Chosen blocks, of any integer dtype.
            grid: The blocks to choose from.
            query_starts: Boundaries of the query groups; None if each row chooses for itself.
            check: Raise ValueError for a number outside the grid, which waits for the device.
        """
        if ids_QCN.ndim != 3 or ids_QCN.is_floating_point():
            raise ValueError(
                f"block numbers must be integers [Q, C, N], not {ids_QCN.dtype} "
                f"{list(ids_QCN.shape)}"
            )
        if check and ids_QCN.numel() and int(ids_QCN.max()) >= len(grid):
            raise ValueError(f"block {int(ids_QCN.max())} is not in a grid of {len(grid)} blocks")
        starts = None if query_starts is None else boundaries(query_starts, "query groups")
        if starts is not None and len(starts) != len(ids_QCN) + 1:
            raise ValueError(f"{len(ids_QCN)} lists of blocks for {len(starts) - 1} query groups")
        ids = ids_QCN.int().sort(dim=-1).values
        ids = ids.masked_fill(ids < 0, -1)
        twice = torch.zeros_like(ids, dtype=torch.bool)
        twice[..., 1:] = ids[..., 1:] == ids[..., :-1]
        return cls(ids.masked_fill(twice, -1), grid, starts)

    def keys(self, index_S: Tensor) -> Blocks:
        """The same choices over local keys only; see `Grid.keys`."""
        return self.over(self.grid.keys(index_S))

    def over(self, grid: Grid) -> Blocks:
        """The same choices over another grid of as many blocks."""
        return Blocks(self.ids_QCN, grid, self.query_starts)

    def of_rows(self, rows: slice) -> Blocks:
        """The choices of some query rows.

        Raises:
            ValueError: Rows that do not choose for themselves, unless these are all.
        """
        if rows == slice(0, self.rows):
            return self
        if self.query_starts is not None:
            raise ValueError("rows that choose in groups cannot be told apart")
        return Blocks(self.ids_QCN[rows], self.grid)

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return len(self.ids_QCN) if self.query_starts is None else int(self.query_starts[-1])

    @cached_property
    def group_T(self) -> Mirror | None:
        """The query group of each row, on any device; None if each row is its own."""
        if self.query_starts is None:
            return None
        sizes = self.query_starts.diff()
        return Mirror(torch.repeat_interleave(torch.arange(len(sizes)), sizes))

    @cached_property
    def starts(self) -> Mirror | None:
        """`query_starts` as int32 on other devices; None if each row is its own group."""
        return None if self.query_starts is None else Mirror(self.query_starts)

    @cached_property
    def tokens(self) -> int:
        """Query rows of the largest group."""
        if self.query_starts is None:
            return 1
        return int(self.query_starts.diff().max()) if len(self.query_starts) > 1 else 0

    @property
    def inverse(self) -> Inverse:
        """The choices in the order of the chosen blocks, made once for forward and backward."""
        return self.inverse_over(self.ids_QCN.shape[1])

    def inverse_over(self, heads: int) -> Inverse:
        """The same with neighbouring block heads counted as one; made once for each number.

        Args:
            heads: How many block heads to tell apart: a divisor of their number.
        """
        return self.once(("inverse", heads), lambda: Inverse.of(self, heads))


@dataclass(frozen=True, eq=False)
class Inverse:
    """Who chose each block.

    Attributes:
        groups_P: Query groups, sorted by block head, then block, then group; int32.
        order_P: Where each of these choices is in ids_QCN, flattened; int32 if it can be.
        starts_CB1: Where each block's groups begin, int64 [C * B + 1]: those that chose block b
            with block head c are at starts[c * B + b] to starts[c * B + b + 1]. Choices of nothing
            come after all others, by block head.
    """

    groups_P: Tensor
    order_P: Tensor
    starts_CB1: Tensor

    @classmethod
    def of(cls, blocks: Blocks, heads: int | None = None) -> Inverse:
        """Sorts the choices of `blocks`; stable, so that the order is the same every time.

        Args:
            blocks: The choices.
            heads: How many block heads to tell apart, see `Blocks.inverse_over`; None for all.
        """
        count, (queries, block_heads, width) = len(blocks.grid), blocks.ids_QCN.shape
        heads = block_heads if heads is None else heads
        assert block_heads % heads == 0, (block_heads, heads)
        # The lists of several heads are one longer list, without a change of positions.
        width *= block_heads // heads
        ids_QCN = blocks.ids_QCN.reshape(queries, heads, width)
        if serves("invert", ids_QCN) and fits(ids_QCN, count):
            order_P, groups_P, starts_CB1 = invert(ids_QCN, count)
            return cls(groups_P, order_P, starts_CB1)
        head_C1 = torch.arange(heads, device=ids_QCN.device)[:, None]
        key_QCN = ids_QCN + head_C1 * count
        key_QCN = torch.where(ids_QCN < 0, heads * count + head_C1, key_QCN)
        sorted_P, order_P = key_QCN.flatten().sort(stable=True)
        edges = torch.arange(heads * count + 1, device=ids_QCN.device)
        starts = torch.searchsorted(sorted_P, edges)
        if len(order_P) < 2**31:
            order_P = order_P.int()
        return cls((order_P // (heads * width)).int(), order_P, starts)
