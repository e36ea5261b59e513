"""Layouts: which tokens of a sequence each context rank owns. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import LongspanError

if TYPE_CHECKING:
    from torch import Tensor

LayoutKind = Literal["zigzag", "contiguous"]


@dataclass(frozen=True)
class Layout:
    """The chunks of a sequence that each rank owns.

    Attributes:
        length: Tokens in the sequence.
        chunks: For each rank its half-open token ranges (start, stop), in ascending order. Every
            rank owns equally many tokens, and every token has one owner.
    """

    length: int
    chunks: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def ranks(self) -> int:
        """Context ranks."""
        return len(self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens that each rank owns."""
        return self.length // self.ranks

    def index(self, rank: int) -> Tensor:
        """Global positions of the rank's tokens, ascending, int64 [tokens] on the host."""
        import torch

        return torch.cat([torch.arange(start, stop) for start, stop in self.chunks[rank]])

    def local_chunks(self) -> list[tuple[int, int, int]]:
        """All chunks in global order, as (rank, start, stop) with the rank's own token numbers."""
        located: list[tuple[int, int, int, int]] = []
        for rank, chunks in enumerate(self.chunks):
            begin = 0
            for start, stop in chunks:
                located.append((start, rank, begin, begin + stop - start))
                begin += stop - start
        return [(rank, begin, end) for _, rank, begin, end in sorted(located)]


def divisor(kind: LayoutKind, ranks: int) -> int:
    """What must divide a sequence's length for this layout: its number of chunks."""
    return 2 * ranks if kind == "zigzag" and ranks > 1 else ranks


def make_layout(kind: LayoutKind, length: int, ranks: int) -> Layout:
    """The layout of a sequence.

    Args:
        kind: `contiguous`: one chunk per rank, in order. `zigzag`: chunk r and chunk 2R - 1 - r of
            2R for rank r of R, so that every rank has equal causal work.
        length: Tokens in the sequence.
        ranks: Context ranks.

    Raises:
        LongspanError: The length does not split into equal chunks.
    """
    count = divisor(kind, ranks)
    if length < count or length % count:
        raise LongspanError(
            f"a {kind} layout over {ranks} context ranks cannot split {length} tokens into "
            f"{count} equal chunks",
            fix=f"use a length that is a multiple of {count}, such as "
            f"{max(1, length // count) * count}, or fewer context ranks",
        )
    size = length // count
    bounds = [(chunk * size, (chunk + 1) * size) for chunk in range(count)]
    if count == ranks:
        return Layout(length, tuple((bound,) for bound in bounds))
    return Layout(length, tuple((bounds[r], bounds[count - 1 - r]) for r in range(ranks)))
