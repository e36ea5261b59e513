"""Puts whole documents into sequences of one length, in an order that depends on nothing else.

A document longer than a sequence is first cut into parts that fill one each, and parts are
shuffled like documents: a long document trained on in one go is learned by heart for the moment
and forgotten again, instead of being read. A part is split only where none of the next ones fits:
the best fit within a short look-ahead of the shuffled stream (after best-fit packing, Ding et al.
2024, arXiv 2404.10830), so that the order stays close to the shuffle and every token of an epoch
appears exactly once.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

LOOK_AHEAD = 256
"""Parts of the stream among which the best fit is sought."""


class Piece(NamedTuple):
    """Tokens [start, start + length) of a document."""

    document: int
    start: int
    length: int


class Packing:
    """The training order: `packing[i]` is the i-th sequence, as the pieces that fill it.

    A pure function of (seed, stage, i): neither the number of ranks nor `sequences` changes an
    earlier sequence. Epochs follow one another without a gap. Sequences are computed when first
    asked for, and all those before them with them.

    Args:
        lengths: Tokens of each document, at least 1.
        sequence_length: Tokens of a sequence.
        seed: The run's seed.
        stage: The stage's name.
        sequences: How many sequences the stage trains on.
    """

    def __init__(
        self, lengths: np.ndarray, sequence_length: int, *, seed: int, stage: str, sequences: int
    ) -> None:
        assert len(lengths) > 0 and int(lengths.min()) > 0, "every document has a token"
        self.sequence_length = sequence_length
        self.sequences = sequences
        parts = _Parts(lengths, sequence_length)
        orders = (epoch_order(len(parts), seed, stage, epoch) for epoch in count())
        self._fill = _fill(parts, sequence_length, orders)
        self._pieces = array("q")
        self._ends = array("q", [0])
        self._digest, self._digested = hashlib.blake2b(digest_size=16), 0

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, index: int) -> list[Piece]:
        if not 0 <= index < self.sequences:
            raise IndexError(f"sequence {index} of {self.sequences}")
        while len(self._ends) <= index + 1:
            for piece in next(self._fill):
                self._pieces.extend(piece)
            self._ends.append(len(self._pieces))
        flat = self._pieces[self._ends[index] : self._ends[index + 1]]
        return [Piece(*flat[at : at + 3]) for at in range(0, len(flat), 3)]

    def digest(self, sequences: int) -> str:
        """A key of the first sequences: only the same pieces in the same order have it."""
        if sequences:
            self[sequences - 1]
        end = self._ends[sequences]
        if end < self._digested:
            self._digest, self._digested = hashlib.blake2b(digest_size=16), 0
        # A digest grows with what is asked for: a save reads what came since the last one.
        with memoryview(self._pieces) as pieces, pieces[self._digested : end] as new:
            self._digest.update(new)
        self._digested = end
        return self._digest.hexdigest()


def pack_once(lengths: np.ndarray, sequence_length: int) -> list[list[Piece]]:
    """Each document once, in their order; only the last sequence may fall short."""
    parts = _Parts(lengths, sequence_length)
    return list(_fill(parts, sequence_length, [np.arange(len(parts))]))


def epoch_order(parts: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """A shuffle of the parts.

    Raw Philox draws, sorted: unlike `Generator.permutation`, numpy promises them for ever.
    """
    key = hashlib.blake2b(f"{seed}/{stage}/{epoch}".encode(), digest_size=16).digest()
    draws = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(parts)
    return np.argsort(draws, kind="stable")


class _Parts:
    """Documents cut every `longest` tokens, in the documents' order.

    Attributes:
        documents: The document of each part.
        starts: Its first token within the document.
        sizes: Its tokens, at most `longest`.
    """

    def __init__(self, lengths: np.ndarray, longest: int) -> None:
        counts = -(-lengths // longest)
        self.documents = np.repeat(np.arange(len(lengths)), counts)
        before = np.cumsum(counts) - counts
        self.starts = (np.arange(len(self.documents)) - before[self.documents]) * longest
        self.sizes = np.minimum(lengths[self.documents] - self.starts, longest)

    def __len__(self) -> int:
        return len(self.documents)


def _fill(
    parts: _Parts, sequence_length: int, orders: Iterable[np.ndarray]
) -> Iterator[list[Piece]]:
    """Sequences of exactly `sequence_length` tokens; the last may be shorter if `orders` end."""
    sequence: list[Piece] = []
    gap = sequence_length
    for order in orders:
        ahead = _LookAhead(parts.sizes[order].tolist())
        for _ in range(len(order)):
            rank, left = ahead.take(gap)
            document, start = int(parts.documents[order[rank]]), int(parts.starts[order[rank]])
            while left >= gap:
                sequence.append(Piece(document, start, gap))
                yield sequence
                start, left, sequence, gap = start + gap, left - gap, [], sequence_length
            if left:
                sequence.append(Piece(document, start, left))
                gap -= left
    if sequence:
        yield sequence


class _LookAhead:
    """The next parts of one epoch that have not been taken.

    Args:
        sizes: Tokens of the epoch's parts, in stream order.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._taken = bytearray(len(sizes))
        self._oldest = self._newest = 0
        # Sorted by size and then from the newest to the oldest, so that the oldest of equals wins.
        self._window: list[tuple[int, int]] = []

    def take(self, gap: int) -> tuple[int, int]:
        """The largest part that fits the gap, else the oldest: its rank in stream and its size."""
        sizes, window = self._sizes, self._window
        while self._newest < len(sizes) and len(window) < LOOK_AHEAD:
            insort(window, (sizes[self._newest], -self._newest))
            self._newest += 1
        at = bisect_right(window, (gap, 1)) - 1
        if at < 0:
            at = bisect_left(window, (sizes[self._oldest], -self._oldest))
        size, newness = window.pop(at)
        self._taken[-newness] = 1
        while self._oldest < len(sizes) and self._taken[self._oldest]:
            self._oldest += 1
        return -newness, size
