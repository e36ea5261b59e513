"""Ranges: which keys the rows of one rank reach, and who owns them; plain host arithmetic.

Shapes: T rows or tokens of a rank, N ranges, P ranks, M things.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, starmap
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.mirror import Mirror
from ..kernels.reach import Reach
from .layout import Layout


def joined(first_N: Tensor, last_N: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges in any order, some empty, as disjoint ascending ones that cover the same.

    Args:
        first_N: The first key of each.
        last_N: One past the last.
    """
    some = first_N < last_N
    first, until = (first_N, last_N) if bool(some.all()) else (first_N[some], last_N[some])
    if not len(first):
        return first, until
    # Those of packed documents ascend, and need neither.
    if bool((first[1:] < first[:-1]).any()):
        order = first.argsort(stable=True)
        first, until = first[order], until[order]
    if bool((until[1:] < until[:-1]).any()):
        until = until.cummax(0).values
    gaps = (first[1:] > until[:-1]).nonzero()[:, 0]
    return torch.cat([first[:1], first[gaps + 1]]), torch.cat([until[gaps], until[-1:]])


def within(first_N: Tensor, last_N: Tensor, index_T: Tensor) -> Tensor:
    """The numbers of those positions, ascending, that lie in ascending disjoint ranges."""
    from_N, to_N = torch.searchsorted(index_T, first_N), torch.searchsorted(index_T, last_N)
    sizes_N = to_N - from_N
    before_N = sizes_N.cumsum(0) - sizes_N
    shift = torch.repeat_interleave(from_N - before_N, sizes_N)
    return torch.arange(len(shift)) + shift


def owned(position_M: Tensor, layout: Layout) -> Layout:
    """Who owns things that belong to tokens.

    Args:
        position_M: Positions of their tokens, ascending, int64 on the host.
        layout: Who owns the tokens.

    Returns:
        A layout of which the things are the tokens.
    """
    bounds = [bound for chunks in layout.chunks for chunk in chunks for bound in chunk]
    at = iter(torch.searchsorted(position_M, torch.tensor(bounds, dtype=torch.int64)).tolist())
    found = tuple(tuple((next(at), next(at)) for _ in chunks) for chunks in layout.chunks)
    return Layout(
        len(position_M),
        tuple(tuple((a, b) for a, b in chunks if a < b) for chunks in found),
    )


class Trade(NamedTuple):
    """What one rank sends and receives at the same time.

    Attributes:
        sends: Ranks, and which of this rank's tokens go to them.
        receives: Ranks, and how many of their tokens come.
        index_S: Global positions of what comes, in the order of `receives`.
    """

    sends: list[tuple[int, Mirror]]
    receives: list[tuple[int, int]]
    index_S: Tensor


class Needs:
    """What every rank needs of every rank's tokens.

    Args:
        reach: Of all rows.
        layout: Who owns the keys.
        rows: Who owns the rows; None for who owns the keys.
    """

    def __init__(self, reach: Reach, layout: Layout, rows: Layout | None = None) -> None:
        rows = layout if rows is None else rows
        assert len(reach) == rows.length, (len(reach), rows.length)
        self._index = [layout.index(rank) for rank in range(layout.ranks)]
        # Keys of different ranks' rows lie apart, so that one search serves all ranks.
        self._apart_P = torch.arange(layout.ranks) * (layout.length + 1)
        parts = [
            (slice(*chunk), apart)
            for apart, chunks in zip(self._apart_P, rows.chunks, strict=True)
            for chunk in chunks
        ]
        bounds = [
            torch.cat([torch.arange(0), *(bound_T[some] + apart for some, apart in parts)])
            for bound_T in (reach.first_T, reach.last_T)
        ]
        self._first_N, self._last_N = joined(*bounds)
        # Where the ranges of each rank begin.
        starts = torch.searchsorted(self._first_N, self._apart_P).tolist()
        of_rank = starmap(slice, pairwise([*starts, len(self._first_N)]))
        self._ranges = [
            (self._first_N[own] - apart, self._last_N[own] - apart)
            for own, apart in zip(of_rank, self._apart_P, strict=True)
        ]

    def of(self, rank: int, owner: int) -> Tensor:
        """What a rank needs of another one's tokens, as the owner's own numbers."""
        return within(*self._ranges[rank], self._index[owner])

    def positions(self, owner: int, numbers: Tensor) -> Tensor:
        """Global positions of an owner's tokens."""
        return self._index[owner][numbers]

    def trade(self, rank: int, distances: Iterable[int]) -> Trade:
        """What a rank trades with those that are so many ranks before and after it."""
        ranks, sends, receives, index = len(self._index), [], [], [torch.arange(0)]
        for distance in distances:
            to, of = (rank + distance) % ranks, (rank - distance) % ranks
            rows, numbers = self.of(to, rank), self.of(rank, of)
            if len(rows):
                sends.append((to, Mirror(rows)))
            if len(numbers):
                receives.append((of, len(numbers)))
                index.append(self.positions(of, numbers))
        return Trade(sends, receives, torch.cat(index))

    def distances(self) -> list[int]:
        """So many ranks before some rank is one of which it needs something, ascending from 1."""
        ranks, counts = len(self._index), self.counts()
        at = torch.arange(ranks)
        return [d for d in range(1, ranks) if bool(counts[at, (at - d) % ranks].any())]

    def counts(self) -> Tensor:
        """How many tokens each rank needs of each owner, [ranks, owners]."""
        ranks = len(self._index)
        sizes = torch.tensor([len(first) for first, _ in self._ranges])
        of_N = torch.repeat_interleave(torch.arange(ranks), sizes)
        own_N = self._apart_P[of_N]
        # All owners' tokens one after the other.
        index = torch.cat([x + apart for x, apart in zip(self._index, self._apart_P, strict=True)])
        first_N, last_N = self._first_N - own_N, self._last_N - own_N
        found_PN = torch.searchsorted(index, last_N + self._apart_P[:, None])
        found_PN -= torch.searchsorted(index, first_N + self._apart_P[:, None])
        counts = torch.zeros(ranks, ranks, dtype=torch.int64)
        return counts.index_add_(0, of_N, found_PN.T.contiguous())
