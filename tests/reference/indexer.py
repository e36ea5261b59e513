"""The specification of index scores and of what they choose. Read by tests only.

Shapes: T query rows, S keys, B blocks, C block heads, J index heads, E key heads, D index dim.
"""

from itertools import pairwise

import torch
from torch import Tensor


def naive_index_scores(
    q_TCJD: Tensor,
    k_SED: Tensor,
    weight_TCJ: Tensor | None = None,
    scale: float = 1.0,
    relu: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """scale * sum_j weight * relu(q . k), [C, T, S]."""
    k_SCD = k_SED.to(dtype).expand(-1, q_TCJD.shape[1], -1)
    products_CJTS = torch.einsum("tcjd,scd->cjts", q_TCJD.to(dtype), k_SCD)
    if relu:
        products_CJTS = products_CJTS.relu()
    if weight_TCJ is not None:
        products_CJTS = products_CJTS * weight_TCJ.to(dtype).permute(1, 2, 0).unsqueeze(-1)
    return scale * products_CJTS.sum(1)


def naive_block_scores(scores_CTS: Tensor, visible_TS: Tensor, starts_B1: Tensor) -> Tensor:
    """The largest score of each block's visible keys, [C, T, B]; -inf without one."""
    hidden_CTS = scores_CTS.masked_fill(~visible_TS, float("-inf"))
    bounds = starts_B1.tolist()
    empty_CT = hidden_CTS.new_full(hidden_CTS.shape[:2], float("-inf"))
    blocks = [
        hidden_CTS[..., start:stop].amax(-1) if start < stop else empty_CT
        for start, stop in pairwise(bounds)
    ]
    return torch.stack(blocks, dim=-1) if blocks else hidden_CTS[..., :0]


def naive_choice(scores_CTB: Tensor, count: int) -> list[list[list[int]]]:
    """The largest finite scores, ties to the lowest number: ascending, per row and head."""
    chosen = []
    for row_CB in scores_CTB.transpose(0, 1).tolist():
        chosen.append([])
        for scores in row_CB:
            order = sorted(range(len(scores)), key=lambda b, s=scores: (-s[b], b))
            chosen[-1].append(sorted(b for b in order[:count] if scores[b] > float("-inf")))
    return chosen
