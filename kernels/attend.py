"""Attend: exact softmax attention of queries over the keys that a reach lets them see.

Shapes: T query rows, S keys, H query heads, G key-value heads (H is a multiple of G), D key dim,
V value dim, W the larger of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import cpu, plain
from .pieces import Piece, RowGroup
from .reach import Reach


def attend(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    reach: Reach,
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its natural-log normaliser. Not differentiable; see `attend_backward`.

    Args:
        q_THD: Queries.
        k_SGD: Keys; query heads h * H / G to (h + 1) * H / G - 1 share key-value head h.
        v_SGV: Values; V may differ from D.
        reach: The keys that each query sees.
        scale: Of the scores.
        out_dtype: Of the output; the queries' when left out.

    Returns:
        The output [T, H, V] and the lse [T, H] in fp32 (fp64 for fp64 inputs). A query that sees
        nothing has output 0 and lse -inf.
    """
    _check(q_THD, k_SGD, v_SGV, reach)
    out_dtype = out_dtype or q_THD.dtype
    width = max(q_THD.shape[2], v_SGV.shape[2])
    q, k, v = (_ready(x, width) for x in (q_THD, k_SGD, v_SGV))
    groups = reach.pieces
    if len(groups) == 1 and groups[0].stop - groups[0].start == len(q):
        out_THW, lse_TH = _attend_group(q, k, v, reach, groups[0], scale)
    else:
        out_THW, lse_TH = torch.zeros_like(q), q.new_full(q.shape[:2], float("-inf"))
        for group in groups:
            rows = slice(group.start, group.stop)
            out_THW[rows], lse_TH[rows] = _attend_group(q, k, v, reach, group, scale)
    return out_THW[..., : v_SGV.shape[2]].to(out_dtype).contiguous(), lse_TH


def attend_backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    reach: Reach,
    *,
    scale: float,
    dlse_TH: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` with respect to queries, keys and values.

    Keys may be a shard of those that the queries see: with the output and lse over all shards,
    the dq of the shards add up, and each shard's dk and dv are complete.

    Args:
        dout_THV: Gradient of the output.
        q_THD: Queries.
        k_SGD: Keys of this shard.
        v_SGV: Values of this shard.
        out_THV: Output over all keys.
        lse_TH: Natural-log lse over all keys.
        reach: The keys of this shard that each query sees.
        scale: Of the scores.
        dlse_TH: Gradient of the lse; None for zero.

    Returns:
        dq [T, H, D], dk [S, G, D] and dv [S, G, V] in fp32 (fp64 for fp64 inputs).
    """
    _check(q_THD, k_SGD, v_SGV, reach)
    dim, value_dim = q_THD.shape[2], v_SGV.shape[2]
    width = max(dim, value_dim + (dlse_TH is not None))
    q, k, v, dout, out = (_ready(x, width) for x in (q_THD, k_SGD, v_SGV, dout_THV, out_THV))
    if dlse_TH is not None:
        # Softmax gradients subtract dout . out from every score's; one more column, which no
        # value has, makes that dout . out - dlse.
        dout[..., value_dim] = 1.0
        out[..., value_dim] = -dlse_TH
    lse_TH = lse_TH.to(q.dtype)
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    for rows, keys, how in chain.from_iterable(_calls(reach, g, q) for g in reach.pieces):
        parts = kernel_for(q).backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], lse_TH[rows], scale=scale, **how
        )
        if len(parts[0]) == len(q) and len(parts[1]) == len(k):
            sums = parts  # All rows and all keys: there is no other piece.
            break
        sums = sums or (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        for total, part, at in zip(sums, parts, (rows, keys, keys), strict=True):
            total[at] += part
    dq, dk, dv = sums or (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint keys as one; exact where either saw nothing.

    Args:
        out_a: Output [T, H, V] over some keys.
        lse_a: Its natural-log lse [T, H].
        out_b: Output over other keys, of the same dtype.
        lse_b: Its lse.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf minus -inf is NaN; any finite stand-in gives weight 0 to a side that saw nothing.
    weight_b = (lse_b - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    return torch.lerp(out_a, out_b, weight_b.unsqueeze(-1)), lse


def _check(q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, reach: Reach) -> None:
    assert len(q_THD) == len(reach) and len(k_SGD) == len(v_SGV), (q_THD.shape, k_SGD.shape)
    assert q_THD.shape[1] % k_SGD.shape[1] == 0, (q_THD.shape, k_SGD.shape)
    assert k_SGD.shape[1] == v_SGV.shape[1] and q_THD.shape[2] == k_SGD.shape[2], v_SGV.shape


def kernel_for(x: Tensor) -> ModuleType:
    """The module that computes attention for tensors on the device of `x`."""
    return cpu if x.device.type == "cpu" else plain


def _ready(x: Tensor, width: int) -> Tensor:
    """`x` in the dtype of the accumulators, its last dim dense and padded with zeros to width."""
    x = x if x.dtype == torch.float64 else x.float()
    if x.shape[-1] < width:
        return pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend_group(
    q: Tensor, k: Tensor, v: Tensor, reach: Reach, group: RowGroup, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse of the group's rows: its pieces, merged."""
    parts = [
        kernel_for(q).forward(q[rows], k[keys], v[keys], scale=scale, **how)
        for rows, keys, how in _calls(reach, group, q)
    ]
    return reduce(lambda a, b: merge(*a, *b), parts)


def _calls(
    reach: Reach, group: RowGroup, like: Tensor
) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Rows, keys and the kernel's options for each piece of a group."""
    for piece in group.pieces:
        mask_TS = _mask(reach, group, piece, like) if piece.kind == "masked" else None
        how = {"causal": piece.kind == "causal", "mask_TS": mask_TS}
        yield slice(group.start, group.stop), slice(piece.first, piece.last), how


def _mask(reach: Reach, group: RowGroup, piece: Piece, like: Tensor) -> Tensor:
    """The additive mask of a masked piece: 0 where visible, -inf elsewhere."""
    first_T1 = reach.first_T[group.start : group.stop, None].to(like.device)
    last_T1 = reach.last_T[group.start : group.stop, None].to(like.device)
    key_S = torch.arange(piece.first, piece.last, device=like.device)
    visible_TS = (key_S >= first_T1) & (key_S < last_T1)
    return like.new_zeros(visible_TS.shape).masked_fill_(~visible_TS, float("-inf"))
