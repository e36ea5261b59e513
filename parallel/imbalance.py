"""Imbalance: how much attention each context rank has of a micro-batch. On the host.

Shapes: T tokens of a rank, N runs of neighbouring tokens within a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import Layout

Pairs = Callable[[int], float]


def loads_of(layout: Layout, cu_seqlens: Tensor | Sequence[int], pairs: Pairs) -> list[float]:
    """The visible (query, key) pairs of each rank's tokens.

    Args:
        layout: Which tokens each rank owns.
        cu_seqlens: Boundaries of the documents, ascending from 0.
        pairs: The visible pairs of a document's first tokens, by their number.
    """
    cu = torch.as_tensor(cu_seqlens, dtype=torch.int64)
    return [_load(layout.index(rank), cu, pairs) for rank in range(layout.ranks)]


def _load(index_T: Tensor, cu: Tensor, pairs: Pairs) -> float:
    if not len(index_T):
        return 0.0
    document_T = torch.searchsorted(cu, index_T, right=True) - 1
    place_T = index_T - cu[document_T]
    # A token goes on with a run unless its predecessor is another rank's, or another document's.
    begins_T = torch.ones(len(index_T), dtype=torch.bool)
    begins_T[1:] = (index_T.diff() != 1) | (place_T[1:] == 0)
    first_N = place_T[begins_T]
    last_N = place_T[begins_T.roll(-1)] + 1
    runs = zip(first_N.tolist(), last_N.tolist(), strict=True)
    return sum(pairs(last) - pairs(first) for first, last in runs)
