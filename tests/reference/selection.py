"""The specification of a selection in float64, choice by choice. Read by tests only.

Shapes: T query rows, H query heads, P pooled keys, G key-value heads, D head dim.
"""

import math

import torch
from torch import Tensor


def naive_lse(q_THD: Tensor, k_PGD: Tensor, windows, reach, scale: float) -> Tensor:
    """The lse of each query and head over the windows wholly in its reach, [T, H]."""
    share = q_THD.shape[1] // k_PGD.shape[1]
    lse_TH = torch.full(q_THD.shape[:2], -math.inf, dtype=torch.float64)
    for row, (first, last) in enumerate(reach):
        seen = [p for p, (start, stop) in enumerate(windows) if first <= start and stop <= last]
        for head in range(q_THD.shape[1]) if seen else ():
            products = k_PGD[seen, head // share].double() @ q_THD[row, head].double()
            lse_TH[row, head] = (products * scale).logsumexp(0)
    return lse_TH


def naive_choice(q, k, windows, starts, reach, groups, rule, scale, lse, stride, kv_head, heads):
    """The blocks that a range of rows `groups` chooses with some heads, ascending.

    `windows` and `reach` are lists of (first, past the last); `starts` are the blocks' boundaries.
    """
    parts: dict[int, list[float]] = {}
    met, own = [], []
    for row in range(*groups):
        first, last = reach[row]
        if first >= last:
            continue
        met.append(max(b for b in range(len(starts) - 1) if starts[b] <= first))
        own.append(max(b for b in range(len(starts) - 1) if starts[b] < last))
        for p, (start, stop) in enumerate(windows):
            if first <= start and stop <= last:
                for head in heads:
                    score = float(q[row, head].double() @ k[p, kv_head].double()) * scale
                    if rule.statistic == "probability":
                        score = math.exp(score - float(lse[row, head]))
                    parts.setdefault(p, []).append(score)
    merge = max if rule.heads == "max" else sum
    scores = {}
    for block in range(min(met), max(own) + 1) if met else ():
        overlaps = {p: min(windows[p][1], starts[block + 1]) - max(windows[p][0], starts[block])
                    for p in parts}  # fmt: skip
        inside = [(merge(parts[p]), size / stride) for p, size in overlaps.items() if size > 0]
        if not inside:
            score = 0.0 if rule.statistic == "probability" else -3.4e38
        elif rule.mapping == "overlap_sum":
            score = sum(value * weight for value, weight in inside)
        else:
            score = max(value for value, _ in inside)
        forced = block < min(met) + rule.initial or (rule.local and block > min(own) - rule.local)
        scores[block] = math.inf if forced else float(torch.tensor(score, dtype=torch.float32))
    best = sorted(scores, key=lambda block: (-scores[block], block))
    return sorted(best[: rule.total])
