"""Index selection: the keys, or the grid blocks, that an indexer chooses for each query.

Shapes: T query rows, S keys, B blocks of the grid, C block heads, N to choose, E key heads, D index
dim; M rows of a chunk, U blocks, Z places for the keys of a block, L = U * Z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .blocks import Blocks
from .chunks import Chunk, plan_chunks
from .grid import Grid
from .indexer import MAX_ELEMENTS, Index, index_scores
from .mirror import Mirror
from .precision import wide, wide_dtype
from .reach import Reach
from .running_top import RunningTop
from .selection_rule import LAST
from .slots import Slots, unit_range
from .top import top_ids

# Keys that a chunk scores at once.
TILE_KEYS = 2**13
# A score costs about as much as this many elements of a temporary while the largest are chosen.
SCORE = 4


@torch.no_grad()
def select_tokens(
    index: Index, reach: Reach, count: int, *, elements: int = MAX_ELEMENTS
) -> Blocks:
    """The keys with the highest scores in each query's reach (DeepSeek-V3.2, arXiv 2512.02556).

    Waits for nothing on the device. Needs T * C * count numbers of 4 bytes, and about 64 bytes
    per element.

    Args:
        index: What scores.
        reach: The keys that each query sees.
        count: Keys to choose; all of them where a query sees fewer. Of equal scores the lowest
            keys are chosen.
        elements: Of a temporary; changes nothing else.

    Returns:
        Blocks of one key.

    Raises:
        ValueError: Counts that contradict each other.
    """
    grid = _tokens(len(index.k_SED))
    return select_index_blocks(index, reach, grid, count, elements=elements)


@torch.no_grad()
def select_index_blocks(
    index: Index,
    reach: Reach,
    grid: Grid,
    count: int,
    *,
    initial: int = 0,
    local: int = 0,
    elements: int = MAX_ELEMENTS,
) -> Blocks:
    """The grid blocks that hold the highest scores in each query's reach (MSA, arXiv 2606.13392).

    A block's score is the largest of those of its keys in reach. Memory as in `select_tokens`.

    Args:
        index: What scores.
        reach: The keys that each query sees.
        grid: The blocks to choose from.
        count: Blocks to choose; of equal ones the lowest.
        initial: So many of the first blocks in reach are always chosen, as part of the `count`.
        local: So many of the last ones, likewise (MSA: the query's own block, 1).
        elements: Of a temporary.

    Raises:
        ValueError: Counts that contradict each other.
    """
    _check(index, reach, grid, count)
    if min(initial, local) < 0 or initial + local > count:
        raise ValueError(f"{initial} initial and {local} local blocks among {count} chosen")
    first_T, last_T = (Mirror(x).on(index.k_SED.device) for x in grid.span(reach))

    def score(slots: Slots) -> Tensor:
        scores_CMU = _block_scores(index, slots, elements)
        if initial or local:
            unit_U = _numbers(slots)
            forced_MU = unit_U < first_T[slots.rows, None] + initial
            forced_MU |= unit_U >= last_T[slots.rows, None] - local
            forced_CMU = forced_MU & (scores_CMU > float("-inf"))
            # What is forced must not tie with a score that overflowed.
            scores_CMU.clamp_(max=-LAST).masked_fill_(forced_CMU, float("inf"))
        return scores_CMU

    return _choose(score, index, reach, grid, count, elements)


@torch.no_grad()
def select_tokens_in_blocks(
    index: Index,
    reach: Reach,
    count: int,
    grid: Grid,
    budget: int,
    *,
    pool: Literal["mean", "max"] = "mean",
    elements: int = MAX_ELEMENTS,
) -> Blocks:
    """`select_tokens` in two steps: blocks by their pooled keys, then keys inside those blocks.

    HISA (arXiv 2603.28458). The choice is that of `select_tokens` wherever the budget covers all
    blocks in reach. Blocks that are only partly in reach are always searched: their pooled keys
    know keys that the query must not see. Memory as in `select_tokens`, with the budget in place
    of the count.

    Args:
        index: What scores.
        reach: The keys that each query sees.
        count: Keys to choose.
        grid: The blocks of the first step; keys outside the grid are never chosen.
        budget: Blocks to search, at least 2 (a reach may begin and end inside a block).
        pool: How the index keys of a block become one.
        elements: Of a temporary.

    Returns:
        Blocks of one key.

    Raises:
        ValueError: Counts that contradict each other.
    """
    _check(index, reach, grid, count)
    if budget < 2:
        raise ValueError(f"the budget must be at least 2 blocks, not {budget}")
    if pool not in ("mean", "max"):
        raise ValueError(f"the index keys of a block become one by mean or max, not {pool!r}")
    coarse = _coarse(index, reach, grid, budget, pool, elements)
    tokens = _tokens(len(index.k_SED))
    ids_QCN = torch.full(
        (len(reach), index.heads, count), -1, dtype=torch.int32, device=index.k_SED.device
    )
    if reach.empty or not grid.largest:
        return Blocks(ids_QCN, tokens)
    per_row = index.heads * budget * grid.largest * max(SCORE, index.k_SED.shape[2])
    step = max(1, elements // max(1, per_row))
    for start in range(0, len(reach), step):
        slots = Slots.chosen(slice(start, min(start + step, len(reach))), coarse, reach)
        ids_QCN[slots.rows] = _among(index, slots, count, elements).transpose(0, 1)
    return Blocks(ids_QCN, tokens)


def _among(index: Index, slots: Slots, count: int, elements: int) -> Tensor:
    """The keys with the highest scores among those that each row looks at, [C, M, N]."""
    assert isinstance(slots.keys, Tensor)
    scores_CML = index_scores(index, slots, elements)
    scores_CML.masked_fill_(~slots.seen_CMUZ.flatten(2), float("-inf"))
    # The places of a row ascend with its keys, so that ties go to the lowest key.
    at_RN = top_ids(scores_CML.flatten(0, 1), count)
    keys_RN = slots.keys.flatten(0, 1).gather(1, at_RN.clamp(min=0).long())
    ids_RN = keys_RN.int().masked_fill_(at_RN < 0, -1)
    return ids_RN.unflatten(0, (index.heads, -1))


def _coarse(
    index: Index, reach: Reach, grid: Grid, budget: int, pool: str, elements: int
) -> Blocks:
    """The blocks that the second step searches."""
    pooled = replace(index, k_SED=_pooled_keys(index.k_SED, grid, pool, elements))
    first_T, last_T = grid.span(reach)
    over_blocks, blocks = Reach(first_T, last_T.clamp(max=len(grid))), _tokens(len(grid))
    starts_B1 = grid.mirror.on(index.k_SED.device)

    def score(slots: Slots) -> Tensor:
        assert isinstance(slots.units, slice)
        scores_CMU = _block_scores(pooled, slots, elements)
        first_M1, last_M1 = (
            x.on(scores_CMU.device)[slots.rows, None] for x in (reach.first, reach.last)
        )
        begin_U = starts_B1[slots.units]
        end_U = starts_B1[slots.units.start + 1 : slots.units.stop + 1]
        partly_MU = (begin_U < first_M1) | (end_U > last_M1)
        partly_MU &= torch.maximum(begin_U, first_M1) < torch.minimum(end_U, last_M1)
        scores_CMU.masked_fill_(partly_MU, float("inf"))
        return scores_CMU.masked_fill_(begin_U == end_U, float("-inf"))

    ids_QCN = _choose(score, index, over_blocks, blocks, budget, elements).ids_QCN
    return Blocks(ids_QCN, grid)


def _choose(
    score: Callable[[Slots], Tensor],
    index: Index,
    reach: Reach,
    grid: Grid,
    count: int,
    elements: int,
) -> Blocks:
    """The blocks of the highest scores [C, M, U] that `score` gives to the blocks of slots."""
    heads, device = index.heads, index.k_SED.device
    ids_QCN = torch.full((len(reach), heads, count), -1, dtype=torch.int32, device=device)
    for chunk in plan_chunks(reach, max(1, elements // (SCORE * heads)), TILE_KEYS):
        first, last = unit_range(chunk, grid)
        width = min(count, last - first)
        if width < 1:
            continue
        top = RunningTop(heads * (chunk.stop - chunk.start), width, device)
        for units in _tiles(first, last, grid):
            slots = Slots.shared(chunk, units, grid, reach, index.k_SED)
            top.add(score(slots).flatten(0, 1), units.start)
        ids_MCN = top.ids().unflatten(0, (heads, -1)).transpose(0, 1)
        ids_QCN[chunk.rows, :, :width] = ids_MCN
    return Blocks(ids_QCN, grid)


def _numbers(slots: Slots) -> Tensor:
    """The numbers of blocks that all rows share."""
    assert isinstance(slots.units, slice)
    return torch.arange(slots.units.start, slots.units.stop, device=slots.seen_CMUZ.device)


def _block_scores(index: Index, slots: Slots, elements: int) -> Tensor:
    """The largest score of the visible keys of each block, [C, M, U]; -inf without one."""
    scores_CML = index_scores(index, slots, elements)
    scores_CML.masked_fill_(~slots.seen_CMUZ.flatten(2), float("-inf"))
    size = slots.shape[2]
    return scores_CML if size == 1 else scores_CML.unflatten(2, (-1, size)).amax(-1)


def _tiles(first: int, last: int, grid: Grid) -> list[slice]:
    """Blocks [first, last) in ranges of at most TILE_KEYS places, or of one block."""
    step = max(1, TILE_KEYS // max(1, grid.largest))
    tiles = [slice(at, min(at + step, last)) for at in range(first, last, step)]
    bounds = grid.starts_B1
    return [tile for tile in tiles if int(bounds[tile.start]) < int(bounds[tile.stop])]


def _pooled_keys(k_SED: Tensor, grid: Grid, pool: str, elements: int) -> Tensor:
    """One key for each block, [B, E, D]; 0 for an empty one."""
    _, heads, dim = k_SED.shape
    pooled_BED = k_SED.new_zeros(len(grid), heads, dim, dtype=wide_dtype(k_SED))
    step = max(1, elements // max(1, grid.largest * heads * dim))
    for start in range(0, len(grid), step):
        bounds = grid.starts_B1[start : start + step + 1]
        if int(bounds[0]) == int(bounds[-1]):
            continue
        chunk = Chunk(0, 1, int(bounds[0]), int(bounds[-1]))
        whole = Reach(bounds[:1], bounds[-1:])
        slots = Slots.shared(chunk, slice(start, start + len(bounds) - 1), grid, whole, k_SED)
        _, blocks, size = slots.shape
        k_UZED = wide(slots.of_keys(k_SED, 0)).unflatten(0, (blocks, size))
        seen_UZ11 = slots.seen_CMUZ[0, 0, :, :, None, None]
        count_U11 = seen_UZ11.sum(1)
        if pool == "mean":
            k_UED = (k_UZED * seen_UZ11).sum(1) / count_U11.clamp(min=1)
        else:
            k_UED = k_UZED.masked_fill(~seen_UZ11, float("-inf")).amax(1)
        pooled_BED[start : start + step] = k_UED.masked_fill_(count_U11 == 0, 0.0)
    return pooled_BED


def _tokens(keys: int) -> Grid:
    """A grid of one block per key."""
    return Grid.documents([0, keys], 1)


def _check(index: Index, reach: Reach, grid: Grid, count: int) -> None:
    keys = len(index.k_SED)
    if count < 1:
        raise ValueError(f"at least 1 must be chosen, not {count}")
    if len(index.q_TCJD) != len(reach):
        raise ValueError(f"{len(index.q_TCJD)} index queries, but a reach of {len(reach)}")
    if int(grid.starts_B1[-1]) > keys:
        raise ValueError(f"{keys} index keys, but a grid of {int(grid.starts_B1[-1])}")
    if reach.stop > keys:
        raise ValueError(f"{keys} index keys, but a reach up to {reach.stop}")
