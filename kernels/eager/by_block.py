"""Attention over chosen blocks, key block by key block: the rows that chose it are gathered.

Cost grows with visible pairs, and every product is a large one. Each partial result is merged into
its rows by lse, in ascending order of the blocks: deterministic.
Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim, M rows of
one visit, R query heads of one block head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..blocks import Blocks
from ..merge import merge
from ..reach import Reach
from ..scoring import Gradients, Scoring
from . import cpu, plain
from .dense import delta, ready, uses_flash
from .visits import Visit, visits


def forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, reach: Reach, blocks: Blocks, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H], both in the dtype of the accumulators."""
    flash = uses_flash(q_THD, scoring)
    width = max(q_THD.shape[2], v_SGV.shape[2]) if flash else 0
    q, k, v = (ready(x, width) for x in (q_THD, k_SGD, v_SGV))
    out_THW = q.new_zeros(*q.shape[:2], v.shape[2])
    lse_TH = q.new_full(q.shape[:2], float("-inf"))
    for visit in visits(reach, blocks, q):
        heads, groups = _heads(visit, blocks, q.shape[1], k.shape[1])
        rows, keys = visit.rows_M, visit.keys
        inputs = q[:, heads].index_select(0, rows), k[keys, groups], v[keys, groups]
        if flash:
            how = {"causal": False, "mask_TS": visit.mask_MS, "scale": scoring.scale}
            part = cpu.forward(*inputs, **how)
        else:
            here = _at(scoring, keys, heads)
            part = plain.forward(*inputs, causal=False, mask_TS=visit.mask_MS, scoring=here)
        out_rows, lse_rows = out_THW[:, heads], lse_TH[:, heads]
        before = out_rows.index_select(0, rows), lse_rows.index_select(0, rows)
        for total, after in zip((out_rows, lse_rows), merge(*before, *part), strict=True):
            total.index_copy_(0, rows, after)
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
    blocks: Blocks,
    scoring: Scoring,
) -> Gradients:
    """Gradients in the dtype of the accumulators; see `attend_backward`."""
    q, k, v, dout, out = (ready(x) for x in (q_THD, k_SGD, v_SGV, dout_THV, out_THV))
    delta_TH, lse_TH = delta(dout, out, dlse_TH), lse_TH.to(q.dtype)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    bias_SH = scoring.key_bias_SH
    dbias = None if bias_SH is None else q.new_zeros(bias_SH.shape)
    for visit in visits(reach, blocks, q):
        heads, groups = _heads(visit, blocks, q.shape[1], k.shape[1])
        rows, keys = visit.rows_M, visit.keys
        dout_M, q_M, delta_M, lse_M = (
            x[:, heads].index_select(0, rows) for x in (dout, q, delta_TH, lse_TH)
        )
        dq_M, dk_keys, dv_keys, dbias_keys = plain.backward(
            dout_M, q_M, k[keys, groups], v[keys, groups], delta_M, lse_M,
            causal=False, mask_TS=visit.mask_MS, scoring=_at(scoring, keys, heads),
        )  # fmt: skip
        dq_rows = dq[:, heads]
        dq_rows.index_copy_(0, rows, dq_rows.index_select(0, rows).add_(dq_M))
        dk[keys, groups] += dk_keys
        dv[keys, groups] += dv_keys
        if dbias is not None and dbias_keys is not None:
            dbias[keys, heads] += dbias_keys
    return Gradients(dq, dk, dv, dkey_bias_SH=dbias)


def _heads(visit: Visit, blocks: Blocks, heads: int, groups: int) -> tuple[slice, slice]:
    """The query heads and the key-value heads of a visit's block head."""
    at, count = visit.block_head, blocks.ids_QCN.shape[1]
    first = at * groups // count
    return (
        slice(at * heads // count, (at + 1) * heads // count),
        slice(first, first + max(1, groups // count)),
    )


def _at(scoring: Scoring, keys: slice, heads: slice) -> Scoring:
    """The scoring of some keys and query heads."""
    if scoring.key_bias_SH is None:
        return scoring
    return replace(scoring, key_bias_SH=scoring.key_bias_SH[keys, heads])
