"""Layouts: which tokens of a sequence each context rank owns. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LayoutKind = Literal["zigzag", "contiguous", "striped"]
Chunk = tuple[int, int]

STRIPE = 64
"""Most tokens of a stripe: a kernel's tile of queries then has keys of its own neighbourhood."""

STRIPES = 8
"""Stripes that every rank has at least, if there are tokens for so many."""


@dataclass(frozen=True)
class Layout:
    """The chunks of a sequence that each rank owns.

    Attributes:
        length: Tokens in the sequence.
        chunks: For each rank its half-open token ranges (start, stop), in ascending order. Every
            token has one owner; ranks may own differently many, or none.
    """

    length: int
    chunks: tuple[tuple[Chunk, ...], ...]

    @property
    def ranks(self) -> int:
        """Context ranks."""
        return len(self.chunks)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens that each rank owns."""
        return tuple(sum(stop - start for start, stop in chunks) for chunks in self.chunks)

    @property
    def largest(self) -> int:
        """The most tokens that a rank owns."""
        return max(self.sizes)

    def index(self, rank: int) -> Tensor:
        """Global positions of the rank's tokens, ascending, int64 [sizes[rank]] on the host."""
        import torch

        parts = [torch.arange(start, stop) for start, stop in self.chunks[rank]]
        return torch.cat([torch.arange(0), *parts])

    def joined(self, groups: Iterable[Sequence[int]]) -> Layout:
        """The layout of groups of ranks, each of which owns what its members own.

        Args:
            groups: The ranks of each group.
        """
        return Layout(
            self.length,
            tuple(merged(chunk for rank in group for chunk in self.chunks[rank])
                  for group in groups),
        )  # fmt: skip


def make_layout(kind: LayoutKind, length: int, ranks: int) -> Layout:
    """The layout of a sequence, whatever its documents. Ranks own equally many tokens, or one less.

    Args:
        kind: `contiguous`: one chunk per rank, in order. `zigzag`: an early chunk and the late one
            that mirrors it, so that every rank has equal causal work. `striped`: stripes of up to
            64 tokens in turn, so that ranks have equal causal work against every shard of keys
            (Striped Attention, arXiv 2311.09431).
        length: Tokens in the sequence.
        ranks: Context ranks.
    """
    sizes = [length // ranks + (rank < length % ranks) for rank in range(ranks)]
    if ranks == 1 or kind == "contiguous":
        return Layout(length, tuple(merged([chunk]) for chunk in _in_turn(sizes)))
    if kind == "zigzag":
        halves = [(size + 1) // 2 for size in sizes]
        late = [size - half for size, half in zip(sizes, halves, strict=True)]
        bounds = _in_turn(halves + late[::-1])
        pairs = zip(bounds[:ranks], bounds[:-ranks - 1:-1], strict=True)  # fmt: skip
        return Layout(length, tuple(map(merged, pairs)))
    return Layout(length, _stripes(length, ranks))


def balanced_layout(cu_seqlens: Sequence[int], ranks: int, pairs: Callable[[int], float]) -> Layout:
    """The layout of packed documents that gives all ranks equal work, and splits few documents.

    Args:
        cu_seqlens: Boundaries of the documents, ascending from 0.
        ranks: Context ranks.
        pairs: The visible (query, key) pairs of a document's first tokens, by their number.
    """
    from .balance import balanced_chunks

    return Layout(cu_seqlens[-1], balanced_chunks(cu_seqlens, ranks, pairs))


def _stripes(length: int, ranks: int) -> tuple[tuple[Chunk, ...], ...]:
    """Full rounds of equal stripes, and a last one of shorter ones."""
    width = max(1, min(STRIPE, length // (STRIPES * ranks)))
    rounds, rest = divmod(length, width * ranks)
    last = [rest // ranks + (rank < rest % ranks) for rank in range(ranks)]
    bounds = _in_turn([width] * (rounds * ranks) + last)
    return tuple(merged(bounds[rank::ranks]) for rank in range(ranks))


def _in_turn(sizes: Sequence[int]) -> list[Chunk]:
    """Chunks of these sizes, one after the other."""
    return list(pairwise(accumulate(sizes, initial=0)))


def merged(chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
    """Ascending chunks, without empty ones, neighbours as one."""
    found: list[Chunk] = []
    for start, stop in sorted(chunk for chunk in chunks if chunk[0] < chunk[1]):
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return tuple(found)
