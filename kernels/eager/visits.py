"""Visits: the choices of `Blocks`, key block by key block, as pieces over gathered rows.

Shapes: T query rows, B blocks of the grid, C block heads, P choices; M rows of a visit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach
from .dense import mask


@dataclass(frozen=True)
class Visit:
    """The rows that chose one block and see it.

    Attributes:
        rows_M: Their numbers; first those that see only a part of the block.
        keys: The block's keys.
        block_head: Which of the block heads.
        mask_LS: Added to the scores of the first L rows: 0 where visible, -inf elsewhere.
    """

    rows_M: Tensor
    keys: slice
    block_head: int
    mask_LS: Tensor


def visits(reach: Reach, blocks: Blocks, like: Tensor, most: int) -> Iterator[Visit]:
    """Every visible (row, block) pair in exactly one visit of at most `most` rows.

    Waits for the device, before the first and not again.
    """
    device, count = like.device, len(blocks.grid)
    starts_B1 = blocks.grid.mirror.on(device)
    first_T, last_T = reach.first.on(device), reach.last.on(device)
    row_P, key_P = _choices(blocks)
    begin_P, end_P = starts_B1[key_P % count], starts_B1[key_P % count + 1]
    first_P, last_P = first_T[row_P], last_T[row_P]
    whole_P = (first_P <= begin_P) & (end_P <= last_P) & (begin_P < end_P)
    partly_P = (torch.maximum(first_P, begin_P) < torch.minimum(last_P, end_P)) & ~whole_P
    edges = torch.arange(blocks.ids_QCN.shape[1] * count + 1, device=device)
    rows, cuts = zip(
        *((row_P[p], torch.searchsorted(key_P[p], edges).tolist()) for p in (partly_P, whole_P)),
        strict=True,
    )
    bounds = blocks.grid.starts_B1.tolist()
    for at in range(len(edges) - 1):
        partly_L, wholly = (r[c[at] : c[at + 1]] for r, c in zip(rows, cuts, strict=True))
        if len(partly_L) + len(wholly) == 0:
            continue
        keys = slice(bounds[at % count], bounds[at % count + 1])
        mask_LS = mask(first_T[partly_L], last_T[partly_L], keys, like)
        rows_M = torch.cat([partly_L, wholly])
        # Some blocks are chosen by every row: what a visit computes should stay in the caches.
        for start in range(0, len(rows_M), most):
            part = slice(start, start + most)
            yield Visit(rows_M[part], keys, at // count, mask_LS[part])


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
