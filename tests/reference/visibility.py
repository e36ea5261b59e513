"""The specification of reach and blocks: which query sees which key, as one mask.

Shapes: T query rows, S keys, H query heads, Q query groups, C block heads, N blocks per choice.
"""

import torch
from torch import Tensor


def visible_in(first_T: Tensor, last_T: Tensor, keys: int) -> Tensor:
    """Which keys the reach lets each row see, [1, T, S]."""
    key_S = torch.arange(keys)
    return ((key_S >= first_T[:, None]) & (key_S < last_T[:, None]))[None]


def chosen(ids_QCN: Tensor, starts_B1: Tensor, group_T: Tensor, heads: int, keys: int) -> Tensor:
    """Which keys lie in a block that the row's group chose, [H, T, S]."""
    queries, block_heads, _ = ids_QCN.shape
    picked_QCS = torch.zeros(queries, block_heads, keys, dtype=torch.bool)
    for query in range(queries):
        for head in range(block_heads):
            for block in ids_QCN[query, head].tolist():
                if block >= 0:
                    picked_QCS[query, head, int(starts_B1[block]) : int(starts_B1[block + 1])] = (
                        True
                    )
    return picked_QCS[group_T].transpose(0, 1).repeat_interleave(heads // block_heads, dim=0)
