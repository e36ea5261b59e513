"""Backward of attention over a reach alone, without atomics.

Three kernels: what the others need of each row; dq, one program per tile of rows and query head;
dk, dv and the gradient of the biases, one program per tile of keys and key-value head, which meets
the rows of all query heads of its group in one order, so that sums are always the same.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim; M rows and
N keys of a tile.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reach import Reach
from ..scoring import Gradients, Scoring
from .launch import constants, dense_rows, scalars
from .row_ranges import PLAN_KEYS, row_ranges
from .steps import (
    LOG2E,
    dot,
    key_range,
    load_tile,
    logits_of,
    narrow,
    product,
    slope_of,
    split,
    store_tile,
    within,
)
from .tuning import INTERPRETED, autotuned, one_warp_group, size_class

NEVER: tl.constexpr = tl.constexpr(2**31 - 1)
ROWS_AT_ONCE = 64


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)


def _query_options(launch: dict[str, Any]) -> list[triton.Config]:
    """For dq; best guesses first, by the dims and the bytes of an element."""
    if INTERPRETED:
        return [_config(32, 32, 4, 1)]
    width = max(launch["BLOCK_D"], launch["BLOCK_V"])
    if launch["BYTES"] > 2:
        return [_config(32, 32, 4, 1)]
    if width <= 128:
        return [_config(128, 64, 8, 3), _config(128, 128, 8, 2), _config(64, 64, 4, 2)]
    return [_config(128, 32, 8, 2), _config(64, 32, 4, 1)]


def _key_options(launch: dict[str, Any]) -> list[triton.Config]:
    """For dk and dv; KEYS is a multiple of PLAN_KEYS."""
    if INTERPRETED:
        return [_config(32, 64, 4, 1)]
    width = max(launch["BLOCK_D"], launch["BLOCK_V"])
    if launch["BYTES"] > 2:
        return [_config(32, 32, 4, 1)]
    if width <= 64:
        return [_config(64, 128, 8, 2), _config(32, 128, 4, 3), _config(64, 64, 4, 2)]
    if width <= 128:
        return [_config(64, 128, 8, 2), _config(32, 128, 8, 3), _config(64, 64, 4, 2)]
    narrowest = min(launch["BLOCK_D"], launch["BLOCK_V"])
    return one_warp_group([_config(32, 64, 8, 2), _config(32, 32, 4, 1)], narrowest)


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
    """Gradients in fp32; see `attend_backward`."""
    bias = scoring.key_bias_SH
    if reach.empty:
        zeros = [torch.zeros_like(x, dtype=torch.float32) for x in (q_THD, k_SGD, v_SGV)]
        dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        return Gradients(*zeros, dkey_bias_SH=dbias)
    q, k, v, dout = (dense_rows(x) for x in (q_THD, k_SGD, v_SGV, dout_THV))
    (rows, heads, _), (keys, groups, _) = q.shape, k.shape
    dq, dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    dbias = None if bias is None else bias.new_empty(bias.shape, dtype=torch.float32)
    first, last = reach.first.on(q.device), reach.last.on(q.device)
    row_terms = _row_terms(dout, out_THV, lse_TH, dlse_TH, first, last)
    inputs = (q, k, v, bias, dout, *row_terms, first, last)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2],
               *(bias.stride() if bias is not None else (0, 0)))  # fmt: skip
    seen = reach.area() // rows
    sizes = (rows, keys, *scalars(scoring), size_class(rows), size_class(seen))
    fixed = constants(q, k, v, scoring)
    _query_kernel[lambda meta: (triton.cdiv(rows, meta["ROWS"]), heads)](
        *inputs, dq, *strides, *sizes, **fixed
    )
    plan = row_ranges(reach, keys).on(q.device)
    _key_kernel[lambda meta: (triton.cdiv(keys, meta["KEYS"]), groups)](
        *inputs, plan, dk, dv, dbias, *strides, *sizes, **fixed, PLAN=PLAN_KEYS
    )
    return Gradients(dq, dk, dv, dkey_bias_SH=dbias)


def _row_terms(
    dout_THV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    dlse_TH: Tensor | None,
    first_T: Tensor,
    last_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """Two terms per row, [H, T] so that a tile's lie together; see `_row_kernel`."""
    out, lse = dense_rows(out_THV), lse_TH.contiguous()
    dlse = None if dlse_TH is None else dlse_TH.contiguous()
    rows, heads, value_dim = out.shape
    level_HT = lse.new_empty(heads, rows, dtype=torch.float32)
    delta_HT = torch.empty_like(level_HT)
    _row_kernel[triton.cdiv(rows, ROWS_AT_ONCE), heads](
        dout_THV, out, lse, dlse, first_T, last_T, level_HT, delta_HT,
        *dout_THV.stride()[:2], *out.stride()[:2], rows,
        VALUE_DIM=value_dim, BLOCK_V=triton.next_power_of_2(value_dim),
        DLSE=dlse is not None, ROWS=ROWS_AT_ONCE,
    )  # fmt: skip
    return level_HT, delta_HT


@triton.jit
def _row_kernel(
    dout, out, lse, dlse, first, last, level, delta,
    dout_row, dout_head, out_row, out_head, rows,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, DLSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The lse in the units of logits, and delta = dout . out - dlse.

    Rows that see nothing get an lse of +inf, so that all their weights are 0 without a mask.
    """
    start = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    row_M = start + tl.arange(0, ROWS)
    inside_M = row_M < rows
    dout += head.to(tl.int64) * dout_head
    out += head.to(tl.int64) * out_head
    dout_MV = load_tile(dout, start, dout_row, rows, ROWS, VALUE_DIM, BLOCK_V, EDGE=True)
    out_MV = load_tile(out, start, out_row, rows, ROWS, VALUE_DIM, BLOCK_V, EDGE=True)
    delta_M = tl.sum(dout_MV.to(tl.float32) * out_MV.to(tl.float32), 1)
    at_M = row_M.to(tl.int64) * tl.num_programs(1) + head
    lse_M = tl.load(lse + at_M, mask=inside_M, other=0.0).to(tl.float32)
    if DLSE:
        delta_M -= tl.load(dlse + at_M, mask=inside_M, other=0.0).to(tl.float32)
    first_M = tl.load(first + row_M, mask=inside_M, other=0)
    last_M = tl.load(last + row_M, mask=inside_M, other=0)
    sees_M = (first_M < last_M) & (lse_M != float("-inf"))
    to_M = head.to(tl.int64) * rows + row_M
    tl.store(level + to_M, tl.where(sees_M, lse_M * LOG2E, float("inf")), mask=inside_M)
    tl.store(delta + to_M, delta_M, mask=inside_M)


@autotuned(
    _query_options, ["GROUP", "BLOCK_D", "BLOCK_V", "CAP", "BIAS", "row_class", "seen_class"]
)
@triton.jit(do_not_specialize=["row_class", "seen_class"])
def _query_kernel(
    q, k, v, bias, dout, level, delta, first, last, dq,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, bias_row, bias_head,
    rows, keys, scale, softcap, row_class, seen_class,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BYTES: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq, over the same tiles of keys as the forward."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    row_M = start + tl.arange(0, ROWS)
    inside_M = row_M < rows
    first_M = tl.load(first + row_M, mask=inside_M, other=0)
    last_M = tl.load(last + row_M, mask=inside_M, other=0)
    low, high, core_low, core_high = key_range(first_M, last_M)
    tiles, left, inside = split(low, high, core_low, core_high, KEYS)

    k += (head // GROUP).to(tl.int64) * k_head
    v += (head // GROUP).to(tl.int64) * v_head
    if BIAS:
        bias += head.to(tl.int64) * bias_head
    q += head.to(tl.int64) * q_head
    dout += head.to(tl.int64) * dout_head
    at_M = head.to(tl.int64) * rows + row_M
    level_M = tl.load(level + at_M, mask=inside_M, other=float("inf"))
    delta_M = tl.load(delta + at_M, mask=inside_M, other=0.0)
    q_MD = load_tile(q, start, q_row, rows, ROWS, DIM, BLOCK_D, EDGE=True)
    dout_MV = load_tile(dout, start, dout_row, rows, ROWS, VALUE_DIM, BLOCK_V, EDGE=True)
    dout_MV = narrow(dout_MV, v.dtype.element_ty)
    dq_MD = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for step in range(inside):
        dq_MD = _query_step(
            dq_MD, q_MD, dout_MV, level_M, delta_M, k, v, bias, low + (left + step) * KEYS,
            first_M, last_M, k_row, v_row, bias_row, high, scale, softcap,
            DIM, BLOCK_D, VALUE_DIM, BLOCK_V, CAP, BIAS, KEYS, EDGE=False,
        )  # fmt: skip
    for step in range(tiles - inside):
        tile = tl.where(step < left, step, step + inside)
        dq_MD = _query_step(
            dq_MD, q_MD, dout_MV, level_M, delta_M, k, v, bias, low + tile * KEYS,
            first_M, last_M, k_row, v_row, bias_row, high, scale, softcap,
            DIM, BLOCK_D, VALUE_DIM, BLOCK_V, CAP, BIAS, KEYS, EDGE=True,
        )  # fmt: skip
    dq += head.to(tl.int64) * DIM
    dq_row = tl.num_programs(1) * DIM
    store_tile(dq, start, dq_row, rows, dq_MD * scale, ROWS, DIM, BLOCK_D)


@triton.jit
def _query_step(
    dq_MD, q_MD, dout_MV, level_M, delta_M, k, v, bias, start, first_M, last_M,
    k_row, v_row, bias_row, stop, scale, softcap,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dq / scale with the share of the keys from `start` on."""
    key_N = start + tl.arange(0, KEYS)
    k_ND = load_tile(k, start, k_row, stop, KEYS, DIM, BLOCK_D, EDGE)
    v_NV = load_tile(v, start, v_row, stop, KEYS, VALUE_DIM, BLOCK_V, EDGE)
    logits_MN = logits_of(product(q_MD, tl.trans(k_ND)), scale, softcap, CAP)
    biased_MN = logits_MN
    if BIAS:
        bias_N = tl.load(bias + key_N.to(tl.int64) * bias_row, mask=key_N < stop, other=0.0)
        biased_MN += bias_N.to(tl.float32)[None, :] * LOG2E
    weights_MN = tl.exp2(biased_MN - level_M[:, None])
    if EDGE:
        visible_MN = within(first_M[:, None], last_M[:, None], key_N[None, :])
        weights_MN = tl.where(visible_MN, weights_MN, 0.0)
    dscores_MN = weights_MN * (product(dout_MV, tl.trans(v_NV)) - delta_M[:, None])
    if CAP:
        dscores_MN *= slope_of(logits_MN, softcap)
    return dot(narrow(dscores_MN, k_ND.dtype), k_ND, dq_MD)


@autotuned(_key_options, ["GROUP", "BLOCK_D", "BLOCK_V", "CAP", "BIAS", "row_class", "seen_class"])
@triton.jit(do_not_specialize=["row_class", "seen_class"])
def _key_kernel(
    q, k, v, bias, dout, level, delta, first, last, plan, dk, dv, dbias,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, bias_row, bias_head,
    rows, keys, scale, softcap, row_class, seen_class,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BYTES: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    PLAIN: tl.constexpr, PLAN: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv and the gradient of the biases, over the rows that the plan names."""
    start, group = tl.program_id(0) * KEYS, tl.program_id(1)
    key_N = start + tl.arange(0, KEYS)
    low, high, core_low, core_high = _planned(plan, keys, PLAN, KEYS)
    tiles, left, inside = split(low, high, core_low, core_high, ROWS)

    k += group.to(tl.int64) * k_head
    v += group.to(tl.int64) * v_head
    k_ND = load_tile(k, start, k_row, keys, KEYS, DIM, BLOCK_D, EDGE=True)
    v_NV = load_tile(v, start, v_row, keys, KEYS, VALUE_DIM, BLOCK_V, EDGE=True)
    dk_ND = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    dv_NV = tl.zeros([KEYS, BLOCK_V], dtype=tl.float32)
    for member in range(GROUP):
        head = (group * GROUP + member).to(tl.int64)
        bias_N = tl.zeros([KEYS], dtype=tl.float32)
        dbias_N = bias_N
        if BIAS:
            at_N = bias + head * bias_head + key_N.to(tl.int64) * bias_row
            bias_N = tl.load(at_N, mask=key_N < keys, other=0.0).to(tl.float32)
        for step in range(inside):
            dk_ND, dv_NV, dbias_N = _key_step(
                dk_ND, dv_NV, dbias_N, k_ND, v_NV, bias_N, key_N, low + (left + step) * ROWS,
                q + head * q_head, dout + head * dout_head, level + head * rows,
                delta + head * rows, first, last, q_row, dout_row, high, scale, softcap,
                DIM, BLOCK_D, VALUE_DIM, BLOCK_V, CAP, BIAS, ROWS, EDGE=False,
            )  # fmt: skip
        # Loads ahead of their use would spill here, and few tiles have an edge.
        for step in tl.range(tiles - inside, num_stages=1):
            tile = tl.where(step < left, step, step + inside)
            dk_ND, dv_NV, dbias_N = _key_step(
                dk_ND, dv_NV, dbias_N, k_ND, v_NV, bias_N, key_N, low + tile * ROWS,
                q + head * q_head, dout + head * dout_head, level + head * rows,
                delta + head * rows, first, last, q_row, dout_row, high, scale, softcap,
                DIM, BLOCK_D, VALUE_DIM, BLOCK_V, CAP, BIAS, ROWS, EDGE=True,
            )  # fmt: skip
        if BIAS:
            at_N = dbias + key_N.to(tl.int64) * (tl.num_programs(1) * GROUP) + head
            tl.store(at_N, dbias_N, mask=key_N < keys)
    groups = tl.num_programs(1)
    dk += group * DIM
    store_tile(dk, start, groups * DIM, keys, dk_ND * scale, KEYS, DIM, BLOCK_D)
    dv += group * VALUE_DIM
    store_tile(dv, start, groups * VALUE_DIM, keys, dv_NV, KEYS, VALUE_DIM, BLOCK_V)


@triton.jit
def _planned(plan, keys, PLAN: tl.constexpr, KEYS: tl.constexpr):
    """The rows for this program's keys, from those for tiles of PLAN keys; see `row_ranges`."""
    tiles = tl.cdiv(keys, PLAN)
    tile_J = tl.program_id(0) * (KEYS // PLAN) + tl.arange(0, KEYS // PLAN)
    there_J = tile_J < tiles
    low = tl.min(tl.load(plan + tile_J, mask=there_J, other=NEVER), 0)
    high = tl.max(tl.load(plan + tiles + tile_J, mask=there_J, other=0), 0)
    core_low = tl.max(tl.load(plan + 2 * tiles + tile_J, mask=there_J, other=0), 0)
    core_high = tl.min(tl.load(plan + 3 * tiles + tile_J, mask=there_J, other=NEVER), 0)
    return low, high, core_low, core_high


@triton.jit
def _key_step(
    dk_ND, dv_NV, dbias_N, k_ND, v_NV, bias_N, key_N, start,
    q, dout, level, delta, first, last, q_row, dout_row, stop, scale, softcap,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk / scale, dv and dbias with the share of one head's rows from `start` on."""
    row_M = start + tl.arange(0, ROWS)
    q_MD = load_tile(q, start, q_row, stop, ROWS, DIM, BLOCK_D, EDGE)
    dout_MV = load_tile(dout, start, dout_row, stop, ROWS, VALUE_DIM, BLOCK_V, EDGE)
    dout_MV = narrow(dout_MV, v_NV.dtype)
    if EDGE:
        inside_M = row_M < stop
        level_M = tl.load(level + row_M, mask=inside_M, other=float("inf"))
        delta_M = tl.load(delta + row_M, mask=inside_M, other=0.0)
    else:
        level_M = tl.load(level + row_M)
        delta_M = tl.load(delta + row_M)
    logits_NM = logits_of(product(k_ND, tl.trans(q_MD)), scale, softcap, CAP)
    weights_NM = tl.exp2(logits_NM + bias_N[:, None] * LOG2E - level_M[None, :])
    if EDGE:
        first_M = tl.load(first + row_M, mask=inside_M, other=0)
        last_M = tl.load(last + row_M, mask=inside_M, other=0)
        visible_NM = within(first_M[None, :], last_M[None, :], key_N[:, None])
        weights_NM = tl.where(visible_NM, weights_NM, 0.0)
    dv_NV = dot(narrow(weights_NM, dout_MV.dtype), dout_MV, dv_NV)
    dscores_NM = weights_NM * (product(v_NV, tl.trans(dout_MV)) - delta_M[None, :])
    if EDGE:  # Keys that no row sees may hold anything, NaN too.
        dscores_NM = tl.where(visible_NM, dscores_NM, 0.0)
    if BIAS:
        dbias_N += tl.sum(dscores_NM, 1)
    if CAP:
        dscores_NM *= slope_of(logits_NM, softcap)
    dk_ND = dot(narrow(dscores_NM, q_MD.dtype), q_MD, dk_ND)
    return dk_ND, dv_NV, dbias_N
