"""Top: the numbers of the largest scores, the same ones on every device and layout.

Shapes: R rows, X candidates, N of them chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_ids(scores_RX: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each row; of equal ones the lowest numbers.

    Needs 8 bytes per score: callers bound the rows of a call.

    Args:
        scores_RX: Scores in fp32; -inf for what must not be chosen, +inf for what must be.
        count: How many to choose.

    Returns:
        Their numbers, int32 [R, count], ascending; -1 fills up where a row has too few.
    """
    rows, candidates = scores_RX.shape
    width = min(count, candidates)
    number_X = torch.arange(candidates - 1, -1, -1, device=scores_RX.device)
    # The score, then the number: no two keys are equal.
    top_RN = (
        ((sortable(scores_RX).long() << 32) | number_X).topk(width, dim=-1, sorted=False).values
    )
    ids_RN = candidates - 1 - (top_RN & 0xFFFFFFFF)
    hidden_RN = scores_RX.gather(1, ids_RN) == float("-inf")
    ids_RN = ids_RN.masked_fill(hidden_RN, candidates).sort(dim=-1).values
    chosen = torch.full((rows, count), -1, dtype=torch.int32, device=scores_RX.device)
    chosen[:, :width] = ids_RN.masked_fill(ids_RN == candidates, -1)
    return chosen


def sortable(scores: Tensor) -> Tensor:
    """Scores in fp32 as int32 in the same order; -0.0 and 0.0 are the tie that they are."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
