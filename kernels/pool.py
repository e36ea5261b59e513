"""Pool: one key per window, and the gradient of that.

Deterministic: gradients are gathered, each key from the few windows that hold it.
Shapes: S keys, G heads, D their dim, P windows, L keys in a complete window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from .precision import wide_dtype
from .windows import Windows

How = Literal["mean", "max", "min", "weighted"]
"""How the keys of a window become one; `weighted` is a sum with learned weights."""


@torch.no_grad()
def pool(x_SGD: Tensor, windows: Windows, how: How, weight_GL: Tensor | None = None) -> Tensor:
    """Each window's keys as one. Not differentiable; see `pool_backward`.

    Args:
        x_SGD: Keys (or values).
        windows: Which keys go together.
        how: See `How`. A NaN in a window makes its mean and its extremes NaN.
        weight_GL: For `weighted`: the weight of each place in a window. A shorter window has the
            first of them, not made to add up to what all do.

    Returns:
        [P, G, D] in the dtype of `x_SGD`; sums are in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: Shapes that contradict each other, or weights where none are used.
    """
    _check(x_SGD, windows, how, weight_GL)
    if how == "mean":
        pooled = _sum(x_SGD, windows).div_(_sizes(windows, x_SGD))
    elif how == "weighted":
        assert weight_GL is not None
        pooled = _zeros(x_SGD, windows)
        for place, x_PGD, _ in _places(x_SGD, windows):
            pooled.addcmul_(x_PGD.to(pooled.dtype), weight_GL[:, place, None].to(pooled.dtype))
    else:
        pooled, _ = _extreme(x_SGD, windows, how)
    return pooled.to(x_SGD.dtype)


@torch.no_grad()
def pool_backward(
    dpooled_PGD: Tensor,
    x_SGD: Tensor,
    windows: Windows,
    how: How,
    weight_GL: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `pool` with respect to the keys and the weights.

    Args:
        dpooled_PGD: Gradient of the pooled keys.
        x_SGD: Of `pool`, like the rest.
        windows: Which keys go together.
        how: Of equal extremes the lowest key has the gradient.
        weight_GL: Of `weighted`.

    Returns:
        dx [S, G, D] and dweight [G, L] (None without weights) in fp32, fp64 for fp64 inputs.

    Raises:
        ValueError: Shapes that contradict each other, or weights where none are used.
    """
    _check(x_SGD, windows, how, weight_GL)
    if dpooled_PGD.shape != (len(windows), *x_SGD.shape[1:]):
        raise ValueError(f"the gradient of {len(windows)} pooled keys of {list(x_SGD.shape[1:])} "
                         f"cannot be {list(dpooled_PGD.shape)}")  # fmt: skip
    dpooled_PGD = dpooled_PGD.to(wide_dtype(x_SGD))
    dx_SGD = torch.zeros(x_SGD.shape, dtype=wide_dtype(x_SGD), device=x_SGD.device)
    if how == "mean":
        share_PGD = dpooled_PGD / _sizes(windows, dpooled_PGD)
        for part_SGD, _, held_S11 in _holders(share_PGD, windows):
            dx_SGD += part_SGD.masked_fill_(~held_S11, 0.0)
    elif how == "weighted":
        assert weight_GL is not None
        weight_LG1 = weight_GL.to(dpooled_PGD.dtype).T.unsqueeze(-1)
        for part_SGD, place_S, held_S11 in _holders(dpooled_PGD, windows):
            dx_SGD += part_SGD.mul_(weight_LG1[place_S]).masked_fill_(~held_S11, 0.0)
        return dx_SGD, _dweight(dpooled_PGD, x_SGD, windows, weight_GL)
    else:
        _, won_PGD = _extreme(x_SGD, windows, how)
        owner = windows.first_of_key.on(x_SGD.device)
        for step, (part_SGD, place_S, held_S11) in enumerate(_holders(dpooled_PGD, windows)):
            at_S = (owner + step).clamp(max=len(windows) - 1)
            mine_SGD = won_PGD.index_select(0, at_S) == place_S[:, None, None]
            dx_SGD += part_SGD.masked_fill_(~(mine_SGD & held_S11), 0.0)
    return dx_SGD, None


def _check(x_SGD: Tensor, windows: Windows, how: How, weight_GL: Tensor | None) -> None:
    if x_SGD.ndim != 3 or len(x_SGD) != windows.keys:
        raise ValueError(f"windows over {windows.keys} keys cannot pool {list(x_SGD.shape)}; "
                         "keys are [S, G, D]")  # fmt: skip
    if how not in ("mean", "max", "min", "weighted"):
        raise ValueError(f"pooling is by mean, max, min or weighted, not {how!r}")
    if (how == "weighted") != (weight_GL is not None):
        raise ValueError("weighted pooling needs weights, and no other has any")
    if weight_GL is not None and weight_GL.shape != (x_SGD.shape[1], windows.length):
        raise ValueError(f"pooling weights must be [G, L] = [{x_SGD.shape[1]}, {windows.length}], "
                         f"not {list(weight_GL.shape)}")  # fmt: skip


def _zeros(x_SGD: Tensor, windows: Windows) -> Tensor:
    shape = len(windows), *x_SGD.shape[1:]
    return torch.zeros(shape, dtype=wide_dtype(x_SGD), device=x_SGD.device)


def _sizes(windows: Windows, like: Tensor) -> Tensor:
    """Keys in each window, [P, 1, 1]."""
    sizes_P = windows.stops.on(like.device) - windows.starts.on(like.device)
    return sizes_P.to(wide_dtype(like))[:, None, None]


def _sum(x_SGD: Tensor, windows: Windows) -> Tensor:
    """Sums of windows from those of their cells."""
    total = _zeros(x_SGD, windows)
    if not len(windows):
        return total
    cells, device = windows.cells, x_SGD.device
    sums = torch.segment_reduce(
        x_SGD.to(total.dtype), "sum", offsets=cells.cuts.on(device).long(), unsafe=True
    )
    first_P, last_P = cells.first.on(device), cells.last.on(device)
    for step in range(cells.most):
        at_P = first_P + step
        part = sums.index_select(0, at_P.clamp(max=len(sums) - 1))
        total += part.masked_fill_((at_P >= last_P)[:, None, None], 0.0)
    return total


def _places(x_SGD: Tensor, windows: Windows) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """For each place in a window: every window's key there.

    Yields:
        The place, the keys [P, G, D], 0 where a window is too short, and which windows are long
        enough [P, 1, 1] (None for all).
    """
    if not len(windows):
        return
    starts_P, stops_P = windows.starts.on(x_SGD.device), windows.stops.on(x_SGD.device)
    for place in range(windows.length):
        at_P = starts_P + place
        if not windows.ragged:
            yield place, x_SGD.index_select(0, at_P), None
            continue
        inside_P11 = (at_P < stops_P)[:, None, None]
        x_PGD = x_SGD.index_select(0, at_P.clamp(max=len(x_SGD) - 1))
        yield place, x_PGD.masked_fill_(~inside_P11, 0.0), inside_P11


def _dweight(dpooled_PGD: Tensor, x_SGD: Tensor, windows: Windows, weight_GL: Tensor) -> Tensor:
    dweight_GL = dpooled_PGD.new_zeros(weight_GL.shape)
    for place, x_PGD, _ in _places(x_SGD, windows):
        dweight_GL[:, place] = (dpooled_PGD * x_PGD).sum((0, 2))
    return dweight_GL


def _extreme(x_SGD: Tensor, windows: Windows, how: How) -> tuple[Tensor, Tensor]:
    """The largest (smallest) entries of each window and the first places where they are."""
    best = x_SGD.new_zeros(len(windows), *x_SGD.shape[1:])
    won_PGD = torch.zeros(best.shape, dtype=torch.int32, device=x_SGD.device)
    for place, x_PGD, inside_P11 in _places(x_SGD, windows):
        if place == 0:
            best = x_PGD
            continue
        better = (x_PGD > best) if how == "max" else (x_PGD < best)
        better |= (x_PGD != x_PGD) & (best == best)
        if inside_P11 is not None:
            better &= inside_P11
        best = torch.where(better, x_PGD, best)
        won_PGD.masked_fill_(better, place)
    return best, won_PGD


def _holders(parts_PGD: Tensor, windows: Windows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every key's first window, then its second, and so on.

    Yields:
        That window's part [S, G, D], the key's place in it [S] (0 where it is in none), and
        whether the key is in it [S, 1, 1].
    """
    device = parts_PGD.device
    first_S, last_S = windows.first_of_key.on(device), windows.last_of_key.on(device)
    key_S = torch.arange(windows.keys, dtype=torch.int32, device=device)
    for step in range(-(-windows.length // windows.stride) if len(windows) else 0):
        at_S = first_S + step
        held_S = at_S < last_S
        at_S = at_S.clamp(max=len(windows) - 1)
        place_S = (key_S - windows.starts.on(device)[at_S]).masked_fill(~held_S, 0)
        yield parts_PGD.index_select(0, at_S), place_S, held_S[:, None, None]
