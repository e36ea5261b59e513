"""The specification of windows and pooling in float64, window by window. Read by tests only.

Shapes: S keys, G heads, D their dim, P windows, L keys in a complete window.
"""

import torch
from torch import Tensor


def windows_of(lengths: list[int], length: int, stride: int, tail: bool) -> list[tuple[int, int]]:
    """First key and one past the last of each window."""
    windows, begin = [], 0
    for size in lengths:
        at = 0
        while at + length <= size:
            windows.append((begin + at, begin + at + length))
            at += stride
        covered = windows[-1][1] if at else begin
        if tail and covered < begin + size:
            windows.append((begin + at, begin + size))
        begin += size
    return windows


def naive_pool(
    x_SGD: Tensor, windows: list[tuple[int, int]], how: str, weight_GL: Tensor | None = None
) -> Tensor:
    """One key per window, [P, G, D]; differentiable, of equal extremes by the lowest key."""
    pooled = []
    for start, stop in windows:
        keys = x_SGD[start:stop].double()
        if how == "mean":
            pooled.append(keys.mean(0))
        elif how == "weighted":
            weights = weight_GL[:, : stop - start].double()
            pooled.append(torch.einsum("lgd,gl->gd", keys, weights))
        else:
            rows = []
            for head in range(keys.shape[1]):
                columns = []
                for dim in range(keys.shape[2]):
                    column = keys[:, head, dim]
                    values = column.tolist()
                    best = max(values) if how == "max" else min(values)
                    columns.append(column[values.index(best)])
                rows.append(torch.stack(columns))
            pooled.append(torch.stack(rows))
    return torch.stack(pooled) if pooled else x_SGD[:0].double()
