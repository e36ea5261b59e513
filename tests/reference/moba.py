"""The specification of MoBA's choice in float64, head by head. Read by tests only.

Shapes: T tokens, H query heads, G key-value heads, D head dim.
"""

from itertools import pairwise

import torch
from torch import Tensor


def naive_seen(q_THD: Tensor, k_TGD: Tensor, cu, block: int, count: int) -> Tensor:
    """Which keys each query head sees, [H, T, T]; q and k have turned."""
    tokens, heads = q_THD.shape[:2]
    share = heads // k_TGD.shape[1]
    seen_HTT = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for begin, end in pairwise(cu):
        for t in range(begin, end):
            own = (t - begin) // block
            for h in range(heads):
                gate = {own: float("inf")}
                for b in range(own):
                    keys = k_TGD[begin + b * block : begin + (b + 1) * block, h // share]
                    gate[b] = float(q_THD[t, h] @ keys.mean(0))
                for b in sorted(gate, key=lambda b, x=gate: (-x[b], b))[:count]:
                    first = begin + b * block
                    seen_HTT[h, t, first : min(first + block, t + 1)] = True
    return seen_HTT
