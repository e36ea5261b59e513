"""Attention over chosen single keys, row by row: each row gathers the keys it chose.

For grids of blocks too small to be worth a product of their own.
Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim; M rows of a
tile, C block heads, L keys chosen by a row, g key-value heads of a block head, R query heads of a
key-value head (of a block head, where there are more block heads than key-value heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import Blocks
from ..precision import finite
from ..reach import Reach
from ..scoring import Gradients, Scoring, delta
from ..slots import Slots
from .dense import ready

# Elements of the gathered keys that exist at once.
MAX_GATHERED = 2**22


@dataclass(frozen=True)
class Tile:
    """Some rows of one block head.

    Attributes:
        rows: The rows.
        heads: Their query heads.
        groups: The key-value heads of those.
        keys_ML: The keys that each row chose; 0 where it sees none.
        seen_ML: Which of them it sees.
    """

    rows: slice
    heads: slice
    groups: slice
    keys_ML: Tensor
    seen_ML: Tensor


def forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, reach: Reach, blocks: Blocks, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H], both in the dtype of the accumulators."""
    q, k, v = (ready(x) for x in (q_THD, k_SGD, v_SGV))
    out_THV = q.new_zeros(*q.shape[:2], v.shape[2])
    lse_TH = q.new_full(q.shape[:2], float("-inf"))
    for tile in _tiles(q, k, reach, blocks):
        scores_MgRL, _ = _scores(q, k, tile, scoring)
        lse_MgR = scores_MgRL.logsumexp(-1)
        weights_MgRL = scores_MgRL.sub_(finite(lse_MgR).unsqueeze(-1)).exp_()
        out_MgRV = weights_MgRL @ _gather(v, tile)
        out_THV[tile.rows, tile.heads] = out_MgRV.flatten(1, 2)
        lse_TH[tile.rows, tile.heads] = lse_MgR.flatten(1, 2)
    return out_THV, lse_TH


def backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    dlse_TH: Tensor | None,
    reach: Reach,
    blocks: Blocks,
    scoring: Scoring,
) -> Gradients:
    """Gradients in the dtype of the accumulators; see `attend_backward`."""
    q, k, v, dout, out = (ready(x) for x in (q_THD, k_SGD, v_SGV, dout_THV, out_THV))
    delta_TH, lse_TH = delta(dout, out, dlse_TH), finite(lse_TH.to(q.dtype))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    bias_SH = scoring.key_bias_SH
    dbias = None if bias_SH is None else q.new_zeros(bias_SH.shape)
    for tile in _tiles(q, k, reach, blocks):
        q_MgRD, dout_MgRV, delta_MgR, lse_MgR = (
            _rows(x, tile) for x in (q, dout, delta_TH, lse_TH)
        )
        scores_MgRL, slope_MgRL = _scores(q, k, tile, scoring)
        weights_MgRL = scores_MgRL.sub_(lse_MgR.unsqueeze(-1)).exp_()
        k_MgLD, v_MgLV = _gather(k, tile), _gather(v, tile)
        dscores = (dout_MgRV @ v_MgLV.mT).sub_(delta_MgR.unsqueeze(-1)).mul_(weights_MgRL)
        if dbias is not None:
            _scatter(dbias[:, tile.heads], dscores.flatten(1, 2).mT, tile)
        dscores.mul_(scoring.scale)
        if slope_MgRL is not None:
            dscores.mul_(slope_MgRL)
        dq[tile.rows, tile.heads] = (dscores @ k_MgLD).flatten(1, 2)
        _scatter(dk[:, tile.groups], (dscores.mT @ q_MgRD).transpose(1, 2), tile)
        _scatter(dv[:, tile.groups], (weights_MgRL.mT @ dout_MgRV).transpose(1, 2), tile)
    return Gradients(dq, dk, dv, dkey_bias_SH=dbias)


def _tiles(q_THD: Tensor, k_SGD: Tensor, reach: Reach, blocks: Blocks) -> Iterator[Tile]:
    """Every row of every block head in one tile."""
    heads, groups, count = q_THD.shape[1], k_SGD.shape[1], blocks.ids_QCN.shape[1]
    keys = blocks.ids_QCN.shape[2] * max(1, blocks.grid.largest)
    step = max(1, MAX_GATHERED // max(1, keys * max(1, groups // count) * q_THD.shape[2]))
    for start in range(0, len(q_THD), step):
        slots = Slots.chosen(slice(start, min(start + step, len(q_THD))), blocks, reach)
        assert isinstance(slots.keys, Tensor)
        for at in range(count):
            first = at * groups // count
            query_heads = slice(at * heads // count, (at + 1) * heads // count)
            key_heads = slice(first, first + max(1, groups // count))
            seen_ML = slots.seen_CMUZ[at].flatten(1)
            yield Tile(slots.rows, query_heads, key_heads, slots.keys[at], seen_ML)


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """The tile's rows and heads of `x`, [M, g, R, ...]."""
    groups = tile.groups.stop - tile.groups.start
    return x[tile.rows, tile.heads].unflatten(1, (groups, -1))


def _gather(x_SGD: Tensor, tile: Tile) -> Tensor:
    """The chosen keys or values, [M, g, L, D]."""
    if not len(x_SGD):
        return x_SGD.new_zeros(*tile.keys_ML.shape, *x_SGD[:, tile.groups].shape[1:]).transpose(
            1, 2
        )
    return x_SGD[:, tile.groups][tile.keys_ML].transpose(1, 2)


def _scatter(total_SgX: Tensor, part_MLgX: Tensor, tile: Tile) -> None:
    """Adds parts of chosen keys; those not seen are zero."""
    if len(total_SgX):
        total_SgX.index_add_(0, tile.keys_ML.flatten(), part_MLgX.flatten(0, 1))


def _scores(q: Tensor, k: Tensor, tile: Tile, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Scores [M, g, R, L], -inf where not seen, and the slope of the cap (None without a cap)."""
    scores = (_rows(q, tile) @ _gather(k, tile).mT).mul_(scoring.scale)
    slope = None
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(scoring.softcap)
    if scoring.key_bias_SH is not None and len(k):
        bias_MLR = scoring.key_bias_SH[:, tile.heads][tile.keys_ML].to(scores.dtype)
        scores += bias_MLR.mT.unflatten(1, (scores.shape[1], -1))
    return scores.masked_fill_(~tile.seen_ML[:, None, None], float("-inf")), slope
