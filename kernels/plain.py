"""Attention of one piece on any device: matrix products and a softmax, in tiles of rows.

Shapes: T query rows, S keys, H query heads, G key-value heads, R = H / G, D key dim, V value dim;
N = R * T rows of one key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Scores that exist at once, over all heads.
MAX_SCORES = 2**25


def forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    *,
    causal: bool,
    mask_TS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and natural-log lse [T, H] of one piece; see `cpu.forward`."""
    out_THV = q_THD.new_empty(*q_THD.shape[:2], v_SGV.shape[2])
    lse_TH = q_THD.new_empty(q_THD.shape[:2])
    for rows, keys in _tiles(q_THD, k_SGD, causal):
        mask = _tile_mask(rows, keys, causal, mask_TS, q_THD)
        scores_GNS = _scores(q_THD[rows], k_SGD[:keys], mask, scale)
        lse_GN = scores_GNS.logsumexp(-1, keepdim=True)
        weights_GNS = scores_GNS.sub_(lse_GN).exp_()
        out_THV[rows] = _ungroup(weights_GNS @ v_SGV[:keys].transpose(0, 1), rows)
        lse_TH[rows] = _ungroup(lse_GN, rows).squeeze(-1)
    return out_THV, lse_TH


def backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    *,
    causal: bool,
    mask_TS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [T, H, D], dk [S, G, D], dv [S, G, V]; see `cpu.backward`."""
    groups = k_SGD.shape[1]
    dq_THD = torch.empty_like(q_THD)
    dk_GSD = torch.zeros_like(k_SGD.transpose(0, 1))
    dv_GSV = torch.zeros_like(v_SGV.transpose(0, 1))
    for rows, keys in _tiles(q_THD, k_SGD, causal):
        mask = _tile_mask(rows, keys, causal, mask_TS, q_THD)
        k_GSD, v_GSV = k_SGD[:keys].transpose(0, 1), v_SGV[:keys].transpose(0, 1)
        lse_GN1 = _group(lse_TH[rows].unsqueeze(-1), groups)
        dout_GNV = _group(dout_THV[rows], groups)
        delta_GN1 = (dout_GNV * _group(out_THV[rows], groups)).sum(-1, keepdim=True)
        weights_GNS = _scores(q_THD[rows], k_SGD[:keys], mask, scale).sub_(lse_GN1).exp_()
        dv_GSV[:, :keys] += weights_GNS.mT @ dout_GNV
        dscores_GNS = (dout_GNV @ v_GSV.mT).sub_(delta_GN1).mul_(weights_GNS).mul_(scale)
        dk_GSD[:, :keys] += dscores_GNS.mT @ _group(q_THD[rows], groups)
        dq_THD[rows] = _ungroup(dscores_GNS @ k_GSD, rows)
    return dq_THD, dk_GSD.transpose(0, 1), dv_GSV.transpose(0, 1)


def _tiles(q_THD: Tensor, k_SGD: Tensor, causal: bool) -> Iterator[tuple[slice, int]]:
    """Ranges of rows and the number of leading keys that each needs."""
    rows, heads, keys = q_THD.shape[0], q_THD.shape[1], k_SGD.shape[0]
    step = max(1, MAX_SCORES // (heads * keys))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), min(stop, keys) if causal else keys


def _tile_mask(
    rows: slice, keys: int, causal: bool, mask_TS: Tensor | None, like: Tensor
) -> Tensor | None:
    if mask_TS is not None:
        return mask_TS[rows, :keys]
    if not causal:
        return None
    hidden_TS = torch.ones(rows.stop - rows.start, keys, dtype=torch.bool, device=like.device)
    hidden_TS = hidden_TS.triu_(rows.start + 1)
    return like.new_zeros(hidden_TS.shape).masked_fill_(hidden_TS, float("-inf"))


def _scores(q_THD: Tensor, k_SGD: Tensor, mask_TS: Tensor | None, scale: float) -> Tensor:
    """Scaled and masked scores [G, R * T, S]."""
    rows, heads = q_THD.shape[:2]
    keys, groups = k_SGD.shape[:2]
    scores_GNS = _group(q_THD, groups) @ k_SGD.permute(1, 2, 0)
    scores_GNS.mul_(scale)
    if mask_TS is not None:
        scores_GNS.view(groups, heads // groups, rows, keys).add_(mask_TS)
    return scores_GNS


def _group(x_THD: Tensor, groups: int) -> Tensor:
    """[T, H, D] as [G, R * T, D]: the query heads of a key-value head are just more rows."""
    rows, _, dim = x_THD.shape
    return x_THD.view(rows, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)


def _ungroup(x_GND: Tensor, rows: slice) -> Tensor:
    """The inverse of `_group`."""
    groups, _, dim = x_GND.shape
    x_GRTD = x_GND.view(groups, -1, rows.stop - rows.start, dim)
    return x_GRTD.permute(2, 0, 1, 3).flatten(1, 2)
