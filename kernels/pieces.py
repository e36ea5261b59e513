"""Pieces: a reach cut into shapes that a dense kernel computes at full speed.

Shapes: T query rows, R runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# A kernel call costs about as much as this many rows: shorter runs share a masked tile.
SHORT_RUN = 32
TILE_ROWS = 128
# A tile is halved while it is mostly mask, but not below the pairs that a call costs anyway.
TILE_WASTE = 4
TILE_PAIRS = 64 * 64
# Bounds the mask of one tile however many keys its rows see.
MAX_MASK = 2**23


@dataclass(frozen=True)
class Piece:
    """A range of keys for a range of rows.

    Attributes:
        first: First key.
        last: One past the last key.
        kind: `full`: every row sees every key; `causal`: as many rows as keys, row i sees the
            keys up to i; `masked`: the rows' own bounds decide.
    """

    first: int
    last: int
    kind: Literal["full", "causal", "masked"]


@dataclass(frozen=True)
class RowGroup:
    """Rows [start, stop) and the pieces that together hold exactly the keys that they see."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def plan_pieces(first_T: Tensor, last_T: Tensor) -> tuple[RowGroup, ...]:
    """Cuts a reach into pieces in linear time; rows that see nothing are in none.

    Args:
        first_T: First visible key of each row, int64 [T] on the host.
        last_T: One past the last visible key, int64 [T] on the host.
    """
    groups: list[RowGroup] = []
    short: list[tuple[int, int, bool]] = []
    for start, stop, grows in _runs(first_T, last_T):
        if short and (short[-1][1] != start or stop - start >= SHORT_RUN):
            groups += _short_groups(short, first_T, last_T)
            short = []
        if stop - start >= SHORT_RUN:
            groups.append(_run_group(start, stop, grows, first_T, last_T))
        else:
            short.append((start, stop, grows))
    groups += _short_groups(short, first_T, last_T)
    return tuple(groups)


def _runs(first_T: Tensor, last_T: Tensor) -> Iterator[tuple[int, int, bool]]:
    """Maximal runs (start, stop, grows) of rows with equal first and equal or growing last."""
    seen_T = first_T < last_T
    if not len(seen_T):
        return
    step = last_T.diff()
    same = (first_T.diff() == 0) & seen_T[1:] & seen_T[:-1]
    # 0: another interval starts here; 1: last stays; 2: last grows by one.
    kind = torch.zeros_like(first_T)
    kind[1:][same & (step == 0)] = 1
    kind[1:][same & (step == 1)] = 2
    # A row after a break may go on either way; any other row must go on as the one before.
    turns = (kind[1:] != kind[:-1]) & (kind[:-1] != 0)
    starts = kind == 0
    starts[1:] |= turns
    starts_R = starts.nonzero()[:, 0]
    stops_R = torch.cat([starts_R[1:], torch.tensor([len(seen_T)])])
    # The second row tells how a run goes on, unless it is the next run's first.
    second_R = (starts_R + 1).clamp(max=len(seen_T) - 1)
    grows_R = (kind[second_R] == 2) & (stops_R - starts_R > 1)
    keep_R = seen_T[starts_R]
    columns = [column[keep_R].tolist() for column in (starts_R, stops_R, grows_R)]
    yield from zip(*columns, strict=True)


def _run_group(start: int, stop: int, grows: bool, first_T: Tensor, last_T: Tensor) -> RowGroup:
    """One run: a rectangle, a causal square, or the two side by side."""
    first, last = int(first_T[start]), int(last_T[start])
    if not grows:
        return RowGroup(start, stop, (Piece(first, last, "full"),))
    square = Piece(last - 1, last - 1 + stop - start, "causal")
    if last - 1 == first:
        return RowGroup(start, stop, (square,))
    return RowGroup(start, stop, (Piece(first, last - 1, "full"), square))


def _short_groups(
    runs: list[tuple[int, int, bool]], first_T: Tensor, last_T: Tensor
) -> list[RowGroup]:
    """Neighbouring short runs: themselves if there is one, otherwise masked tiles of rows."""
    if not runs:
        return []
    if len(runs) == 1:
        return [_run_group(*runs[0], first_T, last_T)]
    start, stop = runs[0][0], runs[-1][1]
    groups: list[RowGroup] = []
    for tile in range(start, stop, TILE_ROWS):
        groups += _tiles(tile, min(tile + TILE_ROWS, stop), first_T, last_T)
    return groups


def _tiles(start: int, stop: int, first_T: Tensor, last_T: Tensor) -> list[RowGroup]:
    """Rows [start, stop) as masked tiles over the union of their keys, halved if mostly mask."""
    first, last = int(first_T[start:stop].min()), int(last_T[start:stop].max())
    visible = int((last_T[start:stop] - first_T[start:stop]).sum())
    rows, pairs = stop - start, (stop - start) * (last - first)
    if rows > 1 and pairs > min(MAX_MASK, max(TILE_PAIRS, TILE_WASTE * visible)):
        middle = start + rows // 2
        left = _tiles(start, middle, first_T, last_T)
        return left + _tiles(middle, stop, first_T, last_T)
    kind = "full" if pairs == visible else "masked"
    return [RowGroup(start, stop, (Piece(first, last, kind),))]
