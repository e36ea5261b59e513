"""Balance: which tokens of packed documents each rank owns, so that all have equal work.

Importing this needs no torch. How documents are divided is in `shares.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from .layout import merged
from .shares import share


def balanced_chunks(
    cu_seqlens: Sequence[int], ranks: int, pairs: Callable[[int], float]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The tokens of packed documents that each rank owns.

    All ranks own equally many tokens, or one more. Those of a long document lie on neighbouring
    ranks, those of most short ones on one rank. No rank has more pairs than 1.05 times the mean
    and one token. The same arguments give the same answer on every rank.

    Args:
        cu_seqlens: Boundaries of the documents, ascending from 0; some may be empty.
        ranks: Context ranks; those beyond the number of tokens own nothing.
        pairs: Visible (query, key) pairs of the first n tokens of a document. It must not
            decrease; it is asked once for each n that matters.

    Returns:
        For each rank its half-open ranges (start, stop), ascending, never adjacent.

    Raises:
        ValueError: No ranks, or boundaries that do not ascend from 0.
    """
    if ranks < 1:
        raise ValueError(f"tokens need at least one rank that owns them, not {ranks}")
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    if not cu_seqlens or cu_seqlens[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must ascend from 0, not {list(cu_seqlens)}")
    most, rest = divmod(cu_seqlens[-1], ranks)
    rooms = [most + (rank < rest) for rank in range(ranks)]
    owned: list[tuple[tuple[int, int], ...]] = []
    for parts in share(lengths, pairs, rooms):
        ranges = [(cu_seqlens[d] + first, cu_seqlens[d] + last) for d, first, last in parts]
        owned.append(merged(ranges))
    return tuple(owned)
