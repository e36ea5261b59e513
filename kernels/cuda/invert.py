"""Invert: launches invert.cu.

Shapes: Q query groups, B blocks of the grid, C block heads, N blocks per choice, P = C * Q * N
choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .program import Program

_SLICES = (1028, 2052, 4100, 8200)
"""Counters in shared memory; a little more than powers of two, for grids of as many blocks."""

_COUNTS = 2**24
"""Bound on the counters in the work buffer: 64 MiB."""

_CHOICES_PER_BLOCK = 4
"""In a chunk: enough for most 32-byte sectors to fill up before they leave the L2 cache."""

_MOST_SLICES = 8
"""Each slice of blocks reads all choices; from about here on a radix sort moves fewer bytes."""


def fits(ids_QCN: Tensor, blocks: int) -> bool:
    """Whether counting is the better way to sort them, and int32 holds their positions."""
    return ids_QCN.numel() < 2**31 and blocks < _MOST_SLICES * _SLICES[-1]


def invert(ids_QCN: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts choices by block head, then block, then position; the same order as a stable sort.

    Needs at most 64 MiB beside the results, or 4 bytes per block and block head if that is more,
    and 16 bytes per block and block head.

    Args:
        ids_QCN: Chosen blocks, int32, less than 2^31; numbers outside the grid for none. Lists may
            have duplicates: several block heads are sorted as one by a view as one longer list.
        blocks: Blocks of the grid.

    Returns:
        Each choice's position in the flattened `ids_QCN`, int32 [P]; its query group, int32 [P];
        where each block's choices begin, int64 [C * B + 1]. Choices of nothing come after all
        others, by block head.
    """
    queries, heads, width = ids_QCN.shape
    ids_QCN, device = ids_QCN.int().contiguous(), ids_QCN.device
    columns = heads * (blocks + 1)
    order = torch.empty(ids_QCN.numel(), dtype=torch.int32, device=device)
    groups = torch.empty_like(order)
    starts = torch.zeros(columns + 1, dtype=torch.int64, device=device)
    if not ids_QCN.numel():
        return order, groups, starts[: heads * blocks + 1]

    chunk = _chunk(queries, heads, width, blocks)
    chunks = -(-queries // chunk)
    size = next((size for size in _SLICES if size > blocks), _SLICES[-1])
    program = Program("invert.cu", (("SLICE", size),))
    grid = (chunks, heads, -(-(blocks + 1) // size))
    counts = torch.empty((chunks, columns), dtype=torch.int32, device=device)
    totals = torch.empty(columns, dtype=torch.int64, device=device)
    what = (ids_QCN, queries, heads, width, blocks, chunk, counts)
    program.launch("count_choices", grid, 256, *what)
    program.launch("sum_chunks", (-(-columns // 128),), 128, counts, chunks, columns, totals)
    torch.cumsum(totals, 0, out=starts[1:])
    program.launch("place_choices", grid, 32, *what, starts, order, groups)
    return order, groups, starts[: heads * blocks + 1]


def _chunk(queries: int, heads: int, width: int, blocks: int) -> int:
    """How many queries are counted and placed together."""
    most = max(1, _COUNTS // (heads * (blocks + 1)))
    return max(-(-queries // most), -(-_CHOICES_PER_BLOCK * (blocks + 1) // width))
