"""The specification of a layer's attention: one mask, one softmax. Read by tests only.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D head dim.
"""

import math
from itertools import pairwise

import torch
from reference.attention import naive_attend
from support.mechanisms import positions_of, turned
from torch import Tensor


def naive_window(cu, window: int, first: int = 0) -> Tensor:
    """The last `window` tokens of the same document and its first ones, [1, S, S]."""
    seen_SS = torch.zeros(cu[-1], cu[-1], dtype=torch.bool)
    for begin, end in pairwise(cu):
        for t in range(begin, end):
            for s in range(begin, t + 1):
                seen_SS[t, s] = t - s < window or s - begin < first
    return seen_SS[None]


def naive_layer(hidden_SE, q_SHD, k_SGD, v_SGD, cu, seen, *, scale=None, sink_H=None,
                log_scale_from=None, output_gate="none", weight=None) -> Tensor:  # fmt: skip
    """Output [S, H, D] from queries and keys before RoPE.

    `seen` makes the mask, [H or 1, S, S], from turned queries and keys and the scale.
    """
    position_S = positions_of(cu)
    if log_scale_from is not None:
        growth = [math.log(p + 1) / math.log(log_scale_from) for p in position_S.tolist()]
        q_SHD = (
            q_SHD * torch.tensor([max(1.0, x) for x in growth], dtype=q_SHD.dtype)[:, None, None]
        )
    scale = q_SHD.shape[-1] ** -0.5 if scale is None else scale
    q, k = turned(q_SHD, position_S), turned(k_SGD, position_S)
    seen_HSS = seen(q.detach(), k.detach(), scale)
    out_SHD, _ = naive_attend(q, k, v_SGD, seen_HSS, scale, sink_H=sink_H, dtype=q.dtype)
    if output_gate == "none":
        return out_SHD
    gate = torch.sigmoid(hidden_SE @ weight.T)
    return out_SHD * gate.view(*out_SHD.shape[:2], -1)
