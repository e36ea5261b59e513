"""The specification of InfLLM-V2's choice in float64, query by query. Read by tests only.

Shapes: L tokens of a document, R query heads of a group, T tokens, H query heads, G key-value
heads, D head dim, M pooled keys.
"""

from itertools import pairwise

import torch
from torch import Tensor


def pooled(k_LD: Tensor, length: int, stride: int) -> Tensor:
    """Means over complete windows of a document's keys."""
    starts = range(0, len(k_LD) - length + 1, stride)
    means = [k_LD[at : at + length].mean(0) for at in starts]
    return torch.stack(means) if means else k_LD[:0]


def shares(q_RD: Tensor, fine_MD: Tensor, far_MD: Tensor, position: int, s, scale) -> list[float]:
    """What a group's heads think together of the windows that end before or at the query."""

    def logits(k_MD: Tensor, times: int) -> Tensor:
        ends = [m * times * s.compress_stride + times * s.compress_length for m in range(len(k_MD))]
        return q_RD @ k_MD[: sum(end <= position + 1 for end in ends)].T * scale

    fine_RM, far_RM = logits(fine_MD, 1), logits(far_MD, s.coarse)
    normal = far_RM if far_RM.shape[1] else fine_RM
    return (fine_RM - normal.logsumexp(-1, keepdim=True)).exp().sum(0).tolist()


def best_blocks(share: list[float], own: int, s) -> list[int]:
    """The blocks of a query in block `own`, with what its group thinks of each window."""
    score = dict.fromkeys(range(own + 1), 0.0)
    for m, value in enumerate(share):
        first = m * s.compress_stride
        for b in range(first // s.block, (first + s.compress_length - 1) // s.block + 1):
            if b <= own:
                score[b] = max(score[b], value)
    forced = {b for b in score if b < s.initial or b > own - s.local}
    rest = sorted(set(score) - forced, key=lambda b: (-score[b], b))
    return [*forced, *rest[: s.count]]


def naive_seen(q_THD: Tensor, k_TGD: Tensor, cu, s, scale: float) -> Tensor:
    """Which keys each query sees, [H, T, T], by the settings `s`; q and k have turned."""
    tokens, groups, share = len(q_THD), k_TGD.shape[1], q_THD.shape[1] // k_TGD.shape[1]
    seen_GTT = torch.zeros(groups, tokens, tokens, dtype=torch.bool)
    for (begin, end), g in ((pair, g) for pair in pairwise(cu) for g in range(groups)):
        k_LD, c, dense = k_TGD[begin:end, g], s.coarse, end - begin < s.dense_below
        fine = pooled(k_LD, s.compress_length, s.compress_stride)
        far = pooled(k_LD, c * s.compress_length, c * s.compress_stride) if c else fine[:0]
        for t in range(begin, end):
            seen_GTT[g, t, begin : t + 1] = dense
            q_RD, own = q_THD[t, g * share : (g + 1) * share], (t - begin) // s.block
            values = shares(q_RD, fine, far, t - begin, s, scale) if len(fine) else []
            for b in best_blocks(values, own, s) if not dense else ():
                seen_GTT[g, t, begin + b * s.block : min(begin + (b + 1) * s.block, t + 1)] = True
    return seen_GTT.repeat_interleave(share, dim=0)
