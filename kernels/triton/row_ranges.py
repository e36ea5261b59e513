"""Row ranges: which rows a tile of keys has to meet, planned on the host.

Shapes: T query rows, J tiles of keys, L levels.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..mirror import Mirror
from ..reach import Reach

PLAN_KEYS = 32
"""Keys of a tile here; kernels take several of them at once."""

NEVER = 2**31 - 1

_plans: WeakKeyDictionary[Reach, dict[int, Mirror]] = WeakKeyDictionary()


def row_ranges(reach: Reach, keys: int) -> Mirror:
    """Four bounds of rows for each tile of PLAN_KEYS keys, [4, J]; made once per reach.

    Rows low to high - 1 hold every row that sees a key of the tile (none if low > high); rows
    core_low to core_high - 1 all see all of it. They are the tightest of this kind for any order
    of the rows, except that there is no core unless the bounds of the reach ascend.
    """
    plans = _plans.setdefault(reach, {})
    plan = plans.get(keys)
    if plan is None:
        low_J, high_J = _hull(reach, -(-keys // PLAN_KEYS))
        plan = plans[keys] = Mirror(torch.stack([low_J, high_J, *_core(reach, keys)]))
    return plan


def _hull(reach: Reach, tiles: int) -> tuple[Tensor, Tensor]:
    """First and one past the last row that sees a key of each tile.

    A sparse table (Bender and Farach-Colton 2000) the other way round: a row's tiles are the union
    of two runs of 2^level, and a level's runs are then halved into those of the level below.
    """
    row_R = (reach.first_T < reach.last_T).nonzero()[:, 0]
    begin_R = reach.first_T[row_R] // PLAN_KEYS
    end_R = (reach.last_T[row_R] - 1) // PLAN_KEYS + 1
    level_R = (end_R - begin_R).double().frexp().exponent.long() - 1
    levels = int(level_R.max()) + 1 if len(row_R) else 1
    at_R2 = level_R[:, None] * tiles + torch.stack([begin_R, end_R - (1 << level_R)], dim=1)
    both_R2 = row_R[:, None].expand_as(at_R2).flatten()
    low_LJ = torch.full((levels, tiles), NEVER)
    low_LJ.view(-1).scatter_reduce_(0, at_R2.flatten(), both_R2, "amin")
    high_LJ = torch.zeros(levels, tiles, dtype=torch.int64)
    high_LJ.view(-1).scatter_reduce_(0, at_R2.flatten(), both_R2 + 1, "amax")
    for level in range(levels - 1, 0, -1):
        half = 1 << (level - 1)
        for table, best in ((low_LJ, torch.minimum), (high_LJ, torch.maximum)):
            below = table[level - 1]
            best(below, table[level], out=below)
            best(below[half:], table[level][:-half], out=below[half:])
    return low_LJ[0], high_LJ[0]


def _core(reach: Reach, keys: int) -> tuple[Tensor, Tensor]:
    """First and one past the last row of a run that sees all keys of each tile."""
    begin_J = torch.arange(0, keys, PLAN_KEYS)
    first_T, last_T = reach.first_T.contiguous(), reach.last_T.contiguous()
    if not bool((first_T.diff() >= 0).all()) or not bool((last_T.diff() >= 0).all()):
        return torch.zeros_like(begin_J), torch.zeros_like(begin_J)
    end_J = (begin_J + PLAN_KEYS).clamp(max=keys)
    return torch.searchsorted(last_T, end_J), torch.searchsorted(first_T, begin_J, right=True)
