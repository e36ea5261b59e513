"""Top: the numbers of the largest scores, the same ones on every device and layout.

Shapes: R rows, X candidates, N of them chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda.standing import serves
from .cuda.top import top_ids as cuda_top_ids


def top_ids(scores_RX: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each row; of equal ones the lowest numbers.

    Needs 8 bytes per score: callers bound the rows of a call.

    Args:
        scores_RX: Scores in fp32; -inf for what must not be chosen, +inf for what must be. NaN of
            either sign is above +inf: what is broken is chosen, so that it shows in the output.
        count: How many to choose.

    Returns:
        Their numbers, int32 [R, count], ascending; -1 fills up where a row has too few.
    """
    if serves("top", scores_RX):
        return cuda_top_ids(scores_RX, count)
    rows, candidates = scores_RX.shape
    width = min(count, candidates)
    # Order of fp32 as order of int32, then the number: no two keys are equal. Adding 0.0 makes
    # -0.0 and 0.0 the tie that they are; the NaN of a CPU and of a GPU differ in sign.
    bits_RX = (scores_RX.float() + 0.0).masked_fill_(scores_RX.isnan(), torch.nan).view(torch.int32)
    bits_RX = bits_RX ^ ((bits_RX >> 31) & 0x7FFFFFFF)
    number_X = torch.arange(candidates - 1, -1, -1, device=scores_RX.device)
    top_RN = ((bits_RX.long() << 32) | number_X).topk(width, dim=-1, sorted=False).values
    ids_RN = candidates - 1 - (top_RN & 0xFFFFFFFF)
    hidden_RN = scores_RX.gather(1, ids_RN) == float("-inf")
    ids_RN = ids_RN.masked_fill(hidden_RN, candidates).sort(dim=-1).values
    chosen = torch.full((rows, count), -1, dtype=torch.int32, device=scores_RX.device)
    chosen[:, :width] = ids_RN.masked_fill(ids_RN == candidates, -1)
    return chosen
