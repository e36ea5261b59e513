"""Running top: the largest scores of rows whose candidates come in several parts.

Shapes: R rows, X candidates of one part, N to choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .top import sortable

_HIDDEN = -2139095041
"""What `sortable` makes of -inf."""
_LOW = 0xFFFFFFFF


class RunningTop:
    """The choice of `top_ids` over all candidates, whatever the parts that they come in.

    Holds 8 bytes per choice; adding a part needs about 24 bytes per score of it.
    """

    def __init__(self, rows: int, count: int, device: torch.device) -> None:
        # The score in the upper half, below it what makes lower numbers larger: a total order.
        least = torch.iinfo(torch.int64).min
        self._top_RN = torch.full((rows, count), least, dtype=torch.int64, device=device)

    def add(self, scores_RX: Tensor, first: int) -> None:
        """More candidates.

        Args:
            scores_RX: Their scores; -inf for what must not be chosen, +inf for what must be.
            first: Number of the first one; the others follow it.
        """
        candidates, count = scores_RX.shape[1], self._top_RN.shape[1]
        high = _LOW - first
        number_X = torch.arange(high, high - candidates, -1, device=scores_RX.device)
        keys_RX = sortable(scores_RX).long().bitwise_left_shift_(32).bitwise_or_(number_X)
        if candidates > count:
            keys_RX = keys_RX.topk(count, dim=-1, sorted=False).values
        both = torch.cat([self._top_RN, keys_RX], dim=-1)
        self._top_RN = both.topk(count, dim=-1, sorted=False).values

    def ids(self) -> Tensor:
        """The numbers chosen, int32 [R, N], ascending; -1 fills up where a row has too few."""
        hidden_RN = (self._top_RN >> 32) <= _HIDDEN
        ids_RN = (_LOW - (self._top_RN & _LOW)).masked_fill_(hidden_RN, _LOW)
        ids_RN = ids_RN.sort(dim=-1).values
        return ids_RN.masked_fill_(ids_RN == _LOW, -1).int()
