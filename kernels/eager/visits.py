"""Visits: the choices of `Blocks`, key block by key block, as pieces over gathered rows.

Shapes: T query rows, B blocks of the grid, C block heads, P choices; M rows of a visit, L of them
that see only a part of the block, S keys of the largest block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach


@dataclass(frozen=True)
class Visit:
    """The rows that chose one block and see it.

    Attributes:
        rows_M: Their numbers; first those that see only a part of the block.
        keys: The block's keys.
        block_head: Which of the block heads.
        mask_LS: Added to the scores of the first L rows: 0 where visible, -inf elsewhere; None
            if all rows see the whole block.
    """

    rows_M: Tensor
    keys: slice
    block_head: int
    mask_LS: Tensor | None


def visits(reach: Reach, blocks: Blocks, like: Tensor, most: int) -> Iterator[Visit]:
    """Every visible (row, block) pair in exactly one visit of at most `most` rows.

    Waits for the device, before the first and not again.
    """
    order = blocks.once(("order", reach), lambda: _Order.of(reach, blocks))
    bounds, masks = blocks.grid.starts_B1.tolist(), _Masks(blocks.grid.largest, like)
    for at, (first, last) in enumerate(zip(order.starts, order.starts[1:], strict=False)):
        start, stop = bounds[at % len(blocks.grid)], bounds[at % len(blocks.grid) + 1]
        # Some blocks are chosen by every row: what a visit computes should stay in the caches.
        for begin in range(first, last, most):
            end, partly = min(begin + most, last), min(begin + most, order.wholly[at])
            mask_LS = None
            if begin < partly:
                mask_LS = masks(order.sees_P2[begin:partly], stop - start)
            yield Visit(order.row_P[begin:end], slice(start, stop), at // len(blocks.grid), mask_LS)


@dataclass(frozen=True)
class _Order:
    """Visible choices by block head, then block; first the rows that see a part, then by row.

    Attributes:
        row_P: The row of each.
        sees_P2: What it sees of its block: keys from and up to, counted from the block's first.
        starts: Where the choices of each block begin, C * B + 1.
        wholly: Where its rows begin that see all of it, C * B.
    """

    row_P: Tensor
    sees_P2: Tensor
    starts: list[int]
    wholly: list[int]

    @classmethod
    def of(cls, reach: Reach, blocks: Blocks) -> _Order:
        """The order; waits for the device."""
        row_P, key_P = _choices(blocks)
        count, device = len(blocks.grid), row_P.device
        starts_B1 = blocks.grid.mirror.on(device)
        begin_P, end_P = (starts_B1[n:][key_P % count] for n in (0, 1))
        sees_P2 = torch.stack([reach.first.on(device)[row_P], reach.last.on(device)[row_P]], -1)
        sees_P2 = torch.minimum(sees_P2, end_P[:, None]) - begin_P[:, None]
        first_P, last_P = sees_P2.clamp_(min=0).unbind(-1)
        whole_P = (first_P == 0) & (last_P == end_P - begin_P)
        place_P = 2 * key_P + whole_P
        place_P = place_P.masked_fill_(first_P >= last_P, 2 * blocks.ids_QCN.shape[1] * count)
        place_P, order_P = place_P.sort(stable=True)
        edges = torch.arange(2 * blocks.ids_QCN.shape[1] * count + 1, device=device)
        cuts = torch.searchsorted(place_P, edges).tolist()
        return cls(row_P[order_P], sees_P2[order_P], cuts[::2], cuts[1::2])


class _Masks:
    """Masks of partly seen blocks, looked up by row: one operation for each visit."""

    def __init__(self, size: int, like: Tensor) -> None:
        hidden_SS = like.new_full((size + 1, size), float("-inf"))
        # Row i hides the keys from i on, or those before i.
        self._after, self._before = hidden_SS.triu(), hidden_SS.tril(-1)

    def __call__(self, sees_L2: Tensor, size: int) -> Tensor:
        """The masks [L, S] of rows that see these keys of a block."""
        first_L, last_L = sees_L2.unbind(-1)
        mask_LS = self._after[:, :size].index_select(0, last_L)
        return mask_LS.add_(self._before[:, :size].index_select(0, first_L))


def _choices(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Row and block (block head * B + block) of each choice, sorted by block, then row."""
    inverse = blocks.inverse
    sizes = inverse.starts_CB1.diff()
    key_P = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    group_P = inverse.groups_P[: len(key_P)].long()
    if blocks.query_starts is None:
        return group_P, key_P
    starts = blocks.query_starts.to(group_P.device)
    rows_P = starts.diff()[group_P]
    ends = rows_P.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0, device=ends.device)
    within -= torch.repeat_interleave(ends - rows_P, rows_P)
    row_P = torch.repeat_interleave(starts[group_P], rows_P) + within
    return row_P, torch.repeat_interleave(key_P, rows_P)
