"""Slots: the grid blocks that a chunk of query rows looks at, and a place for each of their keys.

Either all rows of a chunk look at the same range of blocks, or each row at those that it chose.
Shapes: T query rows, S keys, B blocks of the grid; M rows of the chunk, C block heads, U blocks,
Z places for the keys of a block (as many as its largest has), L = U * Z, D any dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks
from .chunks import Chunk
from .grid import Grid
from .reach import Reach


@dataclass(frozen=True, eq=False)
class Slots:
    """Blocks and their keys for the rows of a chunk.

    Attributes:
        rows: The rows.
        units: The blocks: a range shared by all rows, or numbers [C, M, U] (0 for none).
        keys: Their keys: a range or numbers [L] shared by all rows, or numbers [C, M, L]. Places
            without a key hold any key.
        seen_CMUZ: Which places hold a key that the row sees; C is 1 if all heads see the same.
    """

    rows: slice
    units: slice | Tensor
    keys: slice | Tensor
    seen_CMUZ: Tensor

    @classmethod
    def shared(cls, chunk: Chunk, units: slice, grid: Grid, reach: Reach, like: Tensor) -> Slots:
        """The blocks `units` for all rows of a chunk, on the device of `like`."""
        device, rows = like.device, chunk.rows
        bounds = grid.starts_B1[units.start : units.stop + 1]
        size = grid.largest_of(units.start, units.stop)
        starts_U1 = grid.mirror.on(device)[units.start : units.stop + 1, None]
        key_UZ = starts_U1[:-1] + torch.arange(size, device=device)
        # A place without a key is beyond every reach.
        end_UZ = key_UZ.masked_fill(key_UZ >= starts_U1[1:], torch.iinfo(key_UZ.dtype).max)
        seen_MUZ = key_UZ >= reach.first.on(device)[rows, None, None]
        seen_MUZ &= end_UZ < reach.last.on(device)[rows, None, None]
        if grid.uniform or bool((bounds.diff() == size).all()):
            keys = slice(int(bounds[0]), int(bounds[-1]))
        else:
            keys = key_UZ.flatten().long().clamp(max=int(bounds[-1]) - 1)
        return cls(rows, units, keys, seen_MUZ[None])

    @classmethod
    def chosen(cls, rows: slice, blocks: Blocks, reach: Reach) -> Slots:
        """The blocks that each row chose."""
        device, size = blocks.ids_QCN.device, max(1, blocks.grid.largest)
        starts_B1 = blocks.grid.mirror.on(device).long()
        group_T = None if blocks.group_T is None else blocks.group_T.on(device)
        ids_MCU = blocks.ids_QCN[rows if group_T is None else group_T[rows].long()]
        ids_CMU = ids_MCU.transpose(0, 1).long()
        units_CMU = ids_CMU.clamp(min=0)
        end_CMU = starts_B1[units_CMU + 1].masked_fill(ids_CMU < 0, 0)
        key_CMUZ = starts_B1[units_CMU].unsqueeze(-1) + torch.arange(size, device=device)
        seen_CMUZ = key_CMUZ >= reach.first.on(device)[rows, None, None]
        seen_CMUZ &= key_CMUZ < reach.last.on(device)[rows, None, None]
        seen_CMUZ &= key_CMUZ < end_CMU.unsqueeze(-1)
        keys_CML = key_CMUZ.masked_fill(~seen_CMUZ, 0).flatten(2)
        return cls(rows, units_CMU, keys_CML, seen_CMUZ)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, blocks, and places for the keys of a block."""
        _, rows, units, places = self.seen_CMUZ.shape
        return rows, units, places

    def of_keys(self, x_SD: Tensor, head: int) -> Tensor:
        """Something that each key has, [L, D] if the rows share the keys, or [M, L, D]."""
        return _take(x_SD, self.keys, head)

    def of_units(self, x_BD: Tensor, head: int) -> Tensor:
        """Something that each block has, [U, D] or [M, U, D]."""
        return _take(x_BD, self.units, head)

    def add_to_keys(self, total_SD: Tensor, part: Tensor, head: int) -> None:
        """The transpose of `of_keys`; the part of places without a key must be zero."""
        _add(total_SD, self.keys, part, head)

    def add_to_units(self, total_BD: Tensor, part: Tensor, head: int) -> None:
        """The transpose of `of_units`."""
        _add(total_BD, self.units, part, head)


def unit_range(chunk: Chunk, grid: Grid) -> tuple[int, int]:
    """First block and one past the last that the keys of a chunk lie in."""
    ends = torch.tensor([chunk.first, chunk.last])
    first = int(torch.searchsorted(grid.starts_B1, ends[:1], right=True)) - 1
    return first, min(int(torch.searchsorted(grid.starts_B1, ends[1:])), len(grid))


def _take(x_SD: Tensor, at: slice | Tensor, head: int) -> Tensor:
    if isinstance(at, slice):
        return x_SD[at]
    if at.ndim == 1:
        return x_SD.index_select(0, at)
    return x_SD[at[head if len(at) > 1 else 0]]


def _add(total_SD: Tensor, at: slice | Tensor, part: Tensor, head: int) -> None:
    if isinstance(at, slice):
        total_SD[at] += part
    elif at.ndim == 1:
        total_SD.index_add_(0, at, part)
    else:
        at_ML = at[head if len(at) > 1 else 0]
        total_SD.index_add_(0, at_ML.flatten(), part.flatten(0, 1))
