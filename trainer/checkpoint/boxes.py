"""Boxes: which part of a full parameter a run of a rank's elements is.

Every parameter is looked at as a matrix: the first dimension by all others. A tensor rank has some
of its rows or columns, a data rank a range of that part's elements, which is at most three boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """Rows `[row, row_end)` and columns `[column, column_end)` of a matrix."""

    row: int
    row_end: int
    column: int
    column_end: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.row_end - self.row

    @property
    def columns(self) -> int:
        """How many columns."""
        return self.column_end - self.column

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def within(self, other: Box) -> Box | None:
        """What both have, if anything."""
        both = Box(
            max(self.row, other.row),
            min(self.row_end, other.row_end),
            max(self.column, other.column),
            min(self.column_end, other.column_end),
        )
        return both if both.rows > 0 and both.columns > 0 else None


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter's matrix."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True)
class Part:
    """A rank's part of a full matrix.

    Attributes:
        shape: Of the full parameter.
        rows: Ranges of the full matrix's rows, in the order in which the rank holds them.
        columns: The range of its columns.
    """

    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]

    @property
    def width(self) -> int:
        """Columns of the rank's own matrix."""
        return self.columns[1] - self.columns[0]

    @property
    def size(self) -> int:
        """Elements that the rank has."""
        return sum(end - first for first, end in self.rows) * self.width

    def boxes(self, first: int = 0, end: int | None = None) -> Iterator[tuple[Box, int]]:
        """Elements `[first, end)` of the rank's own matrix, row by row, as boxes of the full one.

        Yields:
            Disjoint boxes in the elements' order, and the element that each begins with. The
            elements of a box lie one after another.
        """
        width = self.width
        end = self.size if end is None else end
        for rows in self._row_runs(first, end):
            yield from self._placed(*rows, width)

    def _row_runs(self, first: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Runs of rows (first, end) with the columns (first, end) that they have in common."""
        width = self.width
        while first < end:
            row, column = divmod(first, width)
            whole = (end - first) // width
            if column or not whole:
                stop = min(width, column + end - first)
                yield row, row + 1, column, stop
                first += stop - column
            else:
                yield row, row + whole, 0, width
                first += whole * width

    def _placed(
        self, row: int, row_end: int, column: int, column_end: int, width: int
    ) -> Iterator[tuple[Box, int]]:
        """Own rows and columns, split where the full matrix has other rows between them."""
        before, shift = 0, self.columns[0]
        for first, end in self.rows:
            low, high = max(row, before), min(row_end, before + end - first)
            if low < high:
                place = first - before
                box = Box(low + place, high + place, column + shift, column_end + shift)
                yield box, low * width + column
            before += end - first
