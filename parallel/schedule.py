"""Schedule: which documents of a batch are computed together, and by which ranks. No torch.

A micro-batch is what all ranks compute at once; micro-batches follow one after the other. In each,
long documents are cut over as many ranks as their work asks for, and short ones stay whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import LongspanError
from .shares import Part, share

ROOM = 1.01
"""Micro-batches may be this much longer than their mean, so that few documents must be cut."""


def causal_pairs(tokens: int) -> int:
    """(query, key) pairs of a document's first tokens, if each sees all before and itself."""
    return tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class DocumentCost:
    """Work of the first tokens of a document.

    Attributes:
        pair: Work of a visible (query, key) pair.
        token: Work of a token whatever it sees, in the same unit.
        pairs: Visible pairs of so many tokens, not decreasing.
    """

    pair: float = 1.0
    token: float = 0.0
    pairs: Callable[[int], float] = causal_pairs

    def __call__(self, tokens: int) -> float:
        """Of so many tokens."""
        if self.pairs is causal_pairs:  # without a call: this is most of a schedule's arithmetic
            return (self.pair * (tokens + 1) / 2 + self.token) * tokens
        return self.pair * self.pairs(tokens) + self.token * tokens


@dataclass(frozen=True)
class Schedule:
    """What each rank computes in each micro-batch.

    Attributes:
        micro_batches: For each micro-batch and rank the parts of documents, as (document, first
            token, one past the last token).
    """

    micro_batches: tuple[tuple[tuple[Part, ...], ...], ...]

    def degrees(self) -> dict[int, int]:
        """On how many ranks each document lies: its context degree."""
        held = {
            (document, rank)
            for ranks in self.micro_batches
            for rank, parts in enumerate(ranks)
            for document, _, _ in parts
        }
        return Counter(document for document, _ in held)

    def loads(self, cost: Callable[[int], float]) -> list[list[float]]:
        """Work of each rank in each micro-batch."""
        return [
            [sum(cost(last) - cost(first) for _, first, last in parts) for parts in ranks]
            for ranks in self.micro_batches
        ]

    def balance(self, cost: Callable[[int], float]) -> float:
        """Useful work, as a share of what all ranks could do until the slowest is done."""
        loads = self.loads(cost)
        spent = sum(max(ranks) * len(ranks) for ranks in loads)
        return sum(sum(ranks) for ranks in loads) / spent if spent else 1.0


def schedule(
    lengths: Sequence[int], ranks: int, capacity: int, cost: Callable[[int], float]
) -> Schedule:
    """Spreads documents over micro-batches and ranks so that ranks wait little for each other.

    There are as few micro-batches as the tokens need, and more only where the documents, which
    stay within one micro-batch, do not fit. Documents of similar length meet: then long ones lie
    on the fewest ranks, and micro-batches of short ones need no communication.

    Args:
        lengths: Tokens of each document; none is possible.
        ranks: Ranks that share the documents.
        capacity: Tokens that a rank can hold at a time.
        cost: Work of the first n tokens of a document, such as `DocumentCost`.

    Raises:
        ValueError: No ranks or no capacity.
        LongspanError: A document that all ranks together cannot hold.
    """
    if ranks < 1 or capacity < 1:
        raise ValueError(f"{ranks} ranks of {capacity} tokens cannot hold anything")
    room = ranks * capacity
    longest = max(lengths, default=0)
    if longest > room:
        raise LongspanError(
            f"document {list(lengths).index(longest)} has {longest} tokens, but {ranks} ranks of "
            f"{capacity} tokens hold {room}",
            fix=f"use {-(-longest // capacity)} ranks or more, or cut documents at {room} tokens",
        )
    micro_batches: list[tuple[tuple[Part, ...], ...]] = []
    for documents in _together(lengths, room):
        shares = share([lengths[d] for d in documents], cost, [capacity] * ranks)
        named = (tuple((documents[d], first, last) for d, first, last in parts) for parts in shares)
        micro_batches.append(tuple(named))
    return Schedule(tuple(micro_batches))


def _together(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The documents of each micro-batch."""
    order = sorted((d for d, n in enumerate(lengths) if n), key=lambda d: (-lengths[d], d))
    total = sum(lengths)
    count = -(-total // room)
    if not order:
        return []
    level = max(lengths[order[0]], int(ROOM * total / count) + 1)
    for most in (min(level, room), room):
        groups = _first_fit(lengths, order, most)
        if len(groups) == count:
            break
    return groups


def _first_fit(lengths: Sequence[int], order: Sequence[int], most: int) -> list[list[int]]:
    """Documents in groups of at most so many tokens, each in the first that has room for it."""
    groups, left = list[list[int]](), list[int]()
    for document in order:
        size = lengths[document]
        for at, room in enumerate(left):
            if size <= room:
                groups[at].append(document)
                left[at] = room - size
                break
        else:
            groups.append([document])
            left.append(most - size)
    return groups
