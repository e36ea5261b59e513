"""The specification of S2-Attention's mask, pair by pair. Read by tests only.

Shapes: H heads, T tokens.
"""

from itertools import pairwise

import torch
from torch import Tensor


def sees(qb: int, kb: int, head: int, heads: int, local: int, stride: int) -> bool:
    """Whether the queries of block qb see block kb, as Phi-3-small has it."""
    step = max(1, int(stride / heads))
    return kb <= qb and (qb - kb < local or (kb + head * step + 1) % stride == 0)


def naive_seen(cu, block: int, local: int, stride: int, numbers, heads: int) -> Tensor:
    """Which keys each query head sees, [H, T, T]; `numbers` are the heads' among `heads`."""
    seen_HTT = torch.zeros(len(numbers), cu[-1], cu[-1], dtype=torch.bool)
    for begin, end in pairwise(cu):
        for t in range(begin, end):
            for s in range(begin, t + 1):
                qb, kb = (t - begin) // block, (s - begin) // block
                for at, head in enumerate(numbers):
                    seen_HTT[at, t, s] = sees(qb, kb, head, heads, local, stride)
    return seen_HTT
