"""Attention of one piece on any device: matrix products and a softmax, in tiles of rows.

Shapes: T query rows, S keys, H query heads, G key-value heads, R = H / G, D key dim, V value dim;
N = R * T rows of one key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..precision import finite
from ..scoring import Scoring

# Scores that exist at once, over all heads.
MAX_SCORES = 2**25


def forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    *,
    causal: bool,
    mask_TS: Tensor | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and natural-log lse [T, H] of one piece; see `cpu.forward`.

    A row that sees no key has output 0 and lse -inf.
    """
    out_THV = q_THD.new_empty(*q_THD.shape[:2], v_SGV.shape[2])
    lse_TH = q_THD.new_empty(q_THD.shape[:2])
    for rows, keys in _tiles(q_THD, k_SGD, causal):
        mask = _tile_mask(rows, keys, causal, mask_TS, q_THD)
        scores_GNS, _ = _scores(q_THD[rows], k_SGD[:keys], mask, scoring)
        lse_GN = scores_GNS.logsumexp(-1, keepdim=True)
        weights_GNS = scores_GNS.sub_(finite(lse_GN)).exp_()
        out_THV[rows] = _ungroup(weights_GNS @ v_SGV[:keys].transpose(0, 1), rows)
        lse_TH[rows] = _ungroup(lse_GN, rows).squeeze(-1)
    return out_THV, lse_TH


def backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    delta_TH: Tensor,
    lse_TH: Tensor,
    *,
    causal: bool,
    mask_TS: Tensor | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients dq [T, H, D], dk [S, G, D], dv [S, G, V] and of the keys' biases [S, H].

    Args:
        dout_THV: Gradient of the output.
        q_THD: Queries.
        k_SGD: Keys.
        v_SGV: Values.
        delta_TH: dout . out - dlse, over all keys that the rows see anywhere.
        lse_TH: Natural-log lse over the same.
        causal: See `cpu.forward`, like the rest.
        mask_TS: Added to the scores.
        scoring: How products become scores.
    """
    groups = k_SGD.shape[1]
    dq_THD = torch.empty_like(q_THD)
    dk_GSD = torch.zeros_like(k_SGD.transpose(0, 1))
    dv_GSV = torch.zeros_like(v_SGV.transpose(0, 1))
    bias_SH = scoring.key_bias_SH
    dbias_SH = None if bias_SH is None else q_THD.new_zeros(bias_SH.shape)
    for rows, keys in _tiles(q_THD, k_SGD, causal):
        mask = _tile_mask(rows, keys, causal, mask_TS, q_THD)
        k_GSD, v_GSV = k_SGD[:keys].transpose(0, 1), v_SGV[:keys].transpose(0, 1)
        lse_GN1 = finite(_group(lse_TH[rows].unsqueeze(-1), groups))
        delta_GN1 = _group(delta_TH[rows].unsqueeze(-1), groups)
        dout_GNV = _group(dout_THV[rows], groups)
        scores_GNS, slope_GNS = _scores(q_THD[rows], k_SGD[:keys], mask, scoring)
        weights_GNS = scores_GNS.sub_(lse_GN1).exp_()
        dv_GSV[:, :keys] += weights_GNS.mT @ dout_GNV
        dscores_GNS = (dout_GNV @ v_GSV.mT).sub_(delta_GN1).mul_(weights_GNS)
        if dbias_SH is not None:
            size = rows.stop - rows.start
            per_head_GRS = dscores_GNS.unflatten(1, (-1, size)).sum(2)
            dbias_SH[:keys] += per_head_GRS.flatten(0, 1).T
        dscores_GNS.mul_(scoring.scale)
        if slope_GNS is not None:
            dscores_GNS.mul_(slope_GNS)
        dk_GSD[:, :keys] += dscores_GNS.mT @ _group(q_THD[rows], groups)
        dq_THD[rows] = _ungroup(dscores_GNS @ k_GSD, rows)
    return dq_THD, dk_GSD.transpose(0, 1), dv_GSV.transpose(0, 1), dbias_SH


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


def _scores(
    q_THD: Tensor, k_SGD: Tensor, mask_TS: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """Scores [G, R * T, S], masked, and the slope of the cap there (None without a cap)."""
    rows, heads = q_THD.shape[:2]
    keys, groups = k_SGD.shape[:2]
    scores_GNS = _group(q_THD, groups) @ k_SGD.permute(1, 2, 0)
    scores_GNS.mul_(scoring.scale)
    slope_GNS = None
    if scoring.softcap is not None:
        scores_GNS.div_(scoring.softcap).tanh_()
        slope_GNS = 1 - scores_GNS.square()
        scores_GNS.mul_(scoring.softcap)
    scores_GRTS = scores_GNS.view(groups, heads // groups, rows, keys)
    if scoring.key_bias_SH is not None:
        bias_HS = scoring.key_bias_SH[:keys].T.to(scores_GNS.dtype)
        scores_GRTS.add_(bias_HS.reshape(groups, -1, 1, keys))
    if mask_TS is not None:
        scores_GRTS.add_(mask_TS)
    return scores_GNS, slope_GNS


def _group(x_THD: Tensor, groups: int) -> Tensor:
    """[T, H, D] as [G, R * T, D]: the query heads of a key-value head are just more rows."""
    rows, _, dim = x_THD.shape
    return x_THD.view(rows, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)


def _ungroup(x_GND: Tensor, rows: slice) -> Tensor:
    """The inverse of `_group`."""
    groups, _, dim = x_GND.shape
    x_GRTD = x_GND.view(groups, -1, rows.stop - rows.start, dim)
    return x_GRTD.permute(2, 0, 1, 3).flatten(1, 2)
