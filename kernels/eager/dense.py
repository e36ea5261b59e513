"""Attention over a reach alone: its pieces, one operator call each, merged.

Shapes: T query rows, S keys, H query heads, G key-value heads (H is a multiple of G), D key dim,
V value dim, W the larger of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..merge import merge
from ..pieces import RowGroup
from ..precision import wide
from ..reach import Reach
from ..scoring import Gradients, Scoring, delta
from . import cpu, plain


def forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, reach: Reach, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H], both in the dtype of the accumulators."""
    flash = uses_flash(q_THD, scoring)
    width = max(q_THD.shape[2], v_SGV.shape[2]) if flash else 0
    q, k, v = (ready(x, width) for x in (q_THD, k_SGD, v_SGV))
    groups = reach.pieces
    if len(groups) == 1 and groups[0].stop - groups[0].start == len(q):
        out_THW, lse_TH = _attend_group(q, k, v, reach, groups[0], scoring)
    else:
        out_THW = q.new_zeros(*q.shape[:2], v.shape[2])
        lse_TH = q.new_full(q.shape[:2], float("-inf"))
        for group in groups:
            rows = slice(group.start, group.stop)
            out_THW[rows], lse_TH[rows] = _attend_group(q, k, v, reach, group, scoring)
    return out_THW[..., : v_SGV.shape[2]], lse_TH


def backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    dlse_TH: Tensor | None,
    reach: Reach,
    scoring: Scoring,
) -> Gradients:
    """Gradients in the dtype of the accumulators; see `attend_backward`."""
    if not uses_flash(q_THD, scoring):
        return _plain_backward(
            dout_THV, q_THD, k_SGD, v_SGV, out_THV, lse_TH, dlse_TH, reach, scoring
        )
    dim, value_dim = q_THD.shape[2], v_SGV.shape[2]
    width = max(dim, value_dim + (dlse_TH is not None))
    q, k, v, dout, out = (ready(x, width) for x in (q_THD, k_SGD, v_SGV, dout_THV, out_THV))
    if dlse_TH is not None:
        # Softmax gradients subtract dout . out from every score's; one more column, which no
        # value has, makes that dout . out - dlse.
        dout[..., value_dim] = 1.0
        out[..., value_dim] = -dlse_TH
    lse_TH = lse_TH.to(q.dtype)
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    for rows, keys, how in chain.from_iterable(_calls(reach, g, q) for g in reach.pieces):
        parts = cpu.backward(
            dout[rows],
            q[rows],
            k[keys],
            v[keys],
            out[rows],
            lse_TH[rows],
            scale=scoring.scale,
            **how,
        )
        if len(parts[0]) == len(q) and len(parts[1]) == len(k):
            sums = parts  # All rows and all keys: there is no other piece.
            break
        sums = sums or (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        for total, part, at in zip(sums, parts, (rows, keys, keys), strict=True):
            total[at] += part
    dq, dk, dv = sums or (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    return Gradients(dq[..., :dim], dk[..., :dim], dv[..., :value_dim])


def uses_flash(x: Tensor, scoring: Scoring) -> bool:
    """Whether the CPU's flash operator can compute this."""
    return x.device.type == "cpu" and scoring.softcap is None and scoring.key_bias_SH is None


def ready(x: Tensor, width: int = 0) -> Tensor:
    """`x` in the dtype of the accumulators, its last dim dense and padded with zeros to width."""
    x = wide(x)
    if x.shape[-1] < width:
        return pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain_backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    dlse_TH: Tensor | None,
    reach: Reach,
    scoring: Scoring,
) -> Gradients:
    """The same with matrix products."""
    q, k, v, dout, out = (ready(x) for x in (q_THD, k_SGD, v_SGV, dout_THV, out_THV))
    delta_TH, lse_TH = delta(dout, out, dlse_TH), lse_TH.to(q.dtype)
    bias_SH = scoring.key_bias_SH
    dbias_SH = None if bias_SH is None else q.new_zeros(bias_SH.shape)
    sums = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dbias_SH)
    for rows, keys, how in chain.from_iterable(_calls(reach, g, q) for g in reach.pieces):
        inputs = dout[rows], q[rows], k[keys], v[keys], delta_TH[rows], lse_TH[rows]
        parts = plain.backward(*inputs, scoring=at_keys(scoring, keys), **how)
        for total, part, at in zip(sums, parts, (rows, keys, keys, keys), strict=True):
            if total is not None and part is not None:
                total[at] += part
    return Gradients(*sums[:3], dkey_bias_SH=dbias_SH)


def at_keys(scoring: Scoring, keys: slice) -> Scoring:
    """The scoring of a range of keys."""
    if scoring.key_bias_SH is None:
        return scoring
    return replace(scoring, key_bias_SH=scoring.key_bias_SH[keys])


def _attend_group(
    q: Tensor, k: Tensor, v: Tensor, reach: Reach, group: RowGroup, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Output and lse of the group's rows: its pieces, merged."""
    parts = []
    for rows, keys, how in _calls(reach, group, q):
        if uses_flash(q, scoring):
            parts.append(cpu.forward(q[rows], k[keys], v[keys], scale=scoring.scale, **how))
        else:
            part = plain.forward(q[rows], k[keys], v[keys], scoring=at_keys(scoring, keys), **how)
            parts.append(part)
    return reduce(lambda a, b: merge(*a, *b), parts)


def _calls(
    reach: Reach, group: RowGroup, like: Tensor
) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Rows, keys and the operator's options for each piece of a group."""
    for piece in group.pieces:
        mask_TS = None
        if piece.kind == "masked":
            at = slice(group.start, group.stop)
            first_T, last_T = (x.on(like.device)[at] for x in (reach.first, reach.last))
            mask_TS = mask(first_T, last_T, slice(piece.first, piece.last), like)
        how = {"causal": piece.kind == "causal", "mask_TS": mask_TS}
        yield slice(group.start, group.stop), slice(piece.first, piece.last), how


def mask(first_T: Tensor, last_T: Tensor, keys: slice, like: Tensor) -> Tensor:
    """The additive mask of some rows over some keys: 0 where visible, -inf elsewhere."""
    key_S = torch.arange(keys.start, keys.stop, device=like.device)
    visible_TS = (key_S >= first_T[:, None]) & (key_S < last_T[:, None])
    return like.new_zeros(visible_TS.shape).masked_fill_(~visible_TS, float("-inf"))
