"""Attention over chosen blocks, key block by key block: the rows that chose it are gathered.

Cost grows with visible pairs, and every product is a large one. Blocks are taken in ascending
order and each row is brought up to date by each of its blocks: deterministic.
Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim; M rows of
one visit, C block heads with r query heads each, g key-value heads of a block head, R = r / g,
X = M * R, B keys of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks
from ..precision import finite
from ..reach import Reach
from ..scoring import Gradients, Scoring, delta
from ..workspace import Workspace
from .dense import ready
from .visits import Visit, visits

# Rows times heads of one visit.
MAX_ROWS = 8192


def forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, reach: Reach, blocks: Blocks, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H], both in the dtype of the accumulators."""
    k, v, count = ready(k_SGD), ready(v_SGV), blocks.ids_QCN.shape[1]
    q_CTrD = _by_head(ready(q_THD), count, scoring.scale)
    sums_CTrV = q_CTrD.new_zeros(*q_CTrD.shape[:3], v.shape[2])
    # The sum of all weights and the largest score so far, which sums and weights are relative to.
    state_CTr2 = q_CTrD.new_zeros(*q_CTrD.shape[:3], 2)
    state_CTr2[..., 1] = float("-inf")
    space = Workspace(k.dtype, k.device)
    for visit in visits(reach, blocks, q_CTrD, _most_rows(q_CTrD)):
        at = _Rows(visit, count, k.shape[1], space)
        k_gBD, v_gBV = at.keys(k), at.keys(v)
        scores_gXB, _ = _scores(at.rows("q", q_CTrD), k_gBD, visit, at, scoring)
        state_gX2 = at.rows("state", state_CTr2)
        total_gX, before_gX = state_gX2.unbind(-1)
        top_gX = torch.maximum(before_gX, scores_gXB.amax(-1))
        # A bias may hide all that a row has seen so far.
        level_gX = finite(top_gX)
        weights_gXB = scores_gXB.sub_(level_gX.unsqueeze(-1)).exp_()
        fade_gX = (before_gX - level_gX).exp_()
        total_gX.mul_(fade_gX).add_(weights_gXB.sum(-1))
        before_gX.copy_(top_gX)
        at.put(state_CTr2, state_gX2)
        sums_gXV = at.rows("sums", sums_CTrV).mul_(fade_gX.unsqueeze(-1))
        at.put(sums_CTrV, sums_gXV.baddbmm_(weights_gXB, v_gBV))
    total_CTr, top_CTr = state_CTr2.unbind(-1)
    lse_TH = _by_row(top_CTr + total_CTr.log())
    total_CTr.masked_fill_(total_CTr == 0, 1.0)
    return _by_row(sums_CTrV, total_CTr.reciprocal().unsqueeze(-1)), lse_TH


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
    q, k, v, dout = (ready(x) for x in (q_THD, k_SGD, v_SGV, dout_THV))
    count, widths = blocks.ids_QCN.shape[1], (q.shape[2], v.shape[2])
    # Side by side, because gathering costs by the row.
    pair_CTrX = q.new_empty(count, len(q), q.shape[1] // count, sum(widths))
    _by_head(q, count, scoring.scale, out=pair_CTrX[..., : widths[0]])
    _by_head(dout, count, out=pair_CTrX[..., widths[0] :])
    delta_TH = delta(dout, ready(out_THV), dlse_TH)
    state_CTr2 = _by_head(torch.stack([finite(lse_TH.to(k.dtype)), delta_TH], -1), count)
    dq_CTrD = pair_CTrX.new_zeros(*pair_CTrX.shape[:3], q.shape[2])
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    bias_SH = scoring.key_bias_SH
    dbias = None if bias_SH is None else k.new_zeros(bias_SH.shape)
    space = Workspace(k.dtype, k.device)
    for visit in visits(reach, blocks, dq_CTrD, _most_rows(dq_CTrD)):
        at = _Rows(visit, count, k.shape[1], space)
        k_gBD, v_gBV = at.keys(k), at.keys(v)
        q_gXD, dout_gXV = at.rows("pair", pair_CTrX).split(widths, -1)
        lse_gX1, delta_gX1 = at.rows("state", state_CTr2).split(1, -1)
        scores_gXB, slope_gXB = _scores(q_gXD, k_gBD, visit, at, scoring)
        weights_gXB = scores_gXB.sub_(lse_gX1).exp_()
        dv[visit.keys, at.groups] += (weights_gXB.mT @ dout_gXV).transpose(0, 1)
        dscores_gXB = at.product("dscores", dout_gXV, v_gBV)
        dscores_gXB.sub_(delta_gX1).mul_(weights_gXB)
        if dbias is not None:
            per_head_gRB = dscores_gXB.unflatten(1, (len(visit.rows_M), -1)).sum(1)
            heads = at.heads(dbias.shape[1])
            dbias[visit.keys, heads] += per_head_gRB.flatten(0, 1).T
        if slope_gXB is not None:
            dscores_gXB.mul_(slope_gXB)
        dk[visit.keys, at.groups] += (dscores_gXB.mT @ q_gXD).transpose(0, 1)
        at.put(dq_CTrD, at.rows("dq", dq_CTrD).baddbmm_(dscores_gXB, k_gBD))
    return Gradients(_by_row(dq_CTrD, scoring.scale), dk, dv, dkey_bias_SH=dbias)


def _most_rows(q_CTrD: Tensor) -> int:
    return max(1, MAX_ROWS // q_CTrD.shape[2])


class _Rows:
    """The rows of a visit, and the heads of its block head.

    Whatever a visit needs lies where the visit before had it, still in the caches: fresh memory
    comes from anywhere in the heap, which takes half as long again in a large process.
    """

    def __init__(self, visit: Visit, count: int, groups: int, space: Workspace) -> None:
        self.visit, self.count, self.space = visit, count, space
        first = visit.block_head * groups // count
        self.groups = slice(first, first + max(1, groups // count))

    def heads(self, heads: int) -> slice:
        """The query heads of the block head."""
        at = self.visit.block_head
        return slice(at * heads // self.count, (at + 1) * heads // self.count)

    def keys(self, x_SGD: Tensor) -> Tensor:
        """The block's keys or values, [g, B, D]."""
        return x_SGD[self.visit.keys, self.groups].transpose(0, 1)

    def rows(self, name: str, x_CTr: Tensor) -> Tensor:
        """A copy of the visit's rows, [g, X, ...]; free to write to, until the next visit."""
        x_Tr, rows_M = x_CTr[self.visit.block_head], self.visit.rows_M
        x_Mr = self.space.take(name, len(rows_M), *x_Tr.shape[1:])
        torch.index_select(x_Tr, 0, rows_M, out=x_Mr)
        groups = self.groups.stop - self.groups.start
        if groups == 1:
            return x_Mr.flatten(0, 1).unsqueeze(0)
        return x_Mr.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)

    def product(self, name: str, x_gXD: Tensor, y_gBD: Tensor) -> Tensor:
        """x y^T, [g, X, B], valid until the next visit."""
        out = self.space.take(name, *x_gXD.shape[:2], y_gBD.shape[1])
        return torch.bmm(x_gXD, y_gBD.mT, out=out)

    def put(self, x_CTr: Tensor, part_gX: Tensor) -> None:
        """Writes the visit's rows back."""
        part_gMR = part_gX.unflatten(1, (len(self.visit.rows_M), -1))
        part_Mr = part_gMR.transpose(0, 1).flatten(1, 2)
        x_CTr[self.visit.block_head].index_copy_(0, self.visit.rows_M, part_Mr)


def _by_head(x_TH: Tensor, count: int, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Scaled rows of each block head side by side, [C, T, r, ...]: to be gathered often."""
    x_CTr = x_TH.unflatten(1, (count, -1)).transpose(0, 1)
    out = x_TH.new_empty(x_CTr.shape) if out is None else out
    # Without temporaries: on a CPU the first touch of new memory costs as much as the copy.
    return torch.mul(x_CTr, scale, out=out)


def _by_row(x_CTr: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """The inverse of `_by_head`; a scale may differ by row."""
    out_THx = x_CTr.new_empty(x_CTr.shape[1], x_CTr.shape[0] * x_CTr.shape[2], *x_CTr.shape[3:])
    torch.mul(x_CTr, scale, out=out_THx.unflatten(1, (len(x_CTr), -1)).transpose(0, 1))
    return out_THx


def _scores(
    q_gXD: Tensor, k_gBD: Tensor, visit: Visit, at: _Rows, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """Scores [g, X, B] of scaled queries, masked, and the slope of the cap (None without)."""
    scores_gXB = at.product("scores", q_gXD, k_gBD)
    slope_gXB = None
    if scoring.softcap is not None:
        scores_gXB.div_(scoring.softcap).tanh_()
        slope_gXB = 1 - scores_gXB.square()
        scores_gXB.mul_(scoring.softcap)
    scores_gMRB = scores_gXB.unflatten(1, (len(visit.rows_M), -1))
    bias_SH = scoring.key_bias_SH
    if bias_SH is not None:
        bias_HB = bias_SH[visit.keys, at.heads(bias_SH.shape[1])].T.to(scores_gXB.dtype)
        scores_gMRB += bias_HB.unflatten(0, (len(scores_gXB), 1, -1))
    if visit.mask_LS is not None:
        scores_gMRB[:, : len(visit.mask_LS)] += visit.mask_LS[:, None]
    return scores_gXB, slope_gXB
