"""Forward of attention over a reach alone: one program per tile of rows and query head.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) over one interval of keys per row: the keys that all
rows of a tile see are taken without masks, the others with one.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim; M rows and
N keys of a tile.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reach import Reach
from ..scoring import Scoring
from .launch import constants, dense_rows, scalars
from .steps import (
    LOG2E,
    absorb,
    finish,
    key_range,
    load_tile,
    logits_of,
    product,
    split,
    store_tile,
    within,
)
from .tuning import INTERPRETED, autotuned, size_class


def _options(launch: dict[str, Any]) -> list[triton.Config]:
    """Best guesses first, by the dims and the bytes of an element."""
    if INTERPRETED:
        return [_config(32, 32, 4, 1)]
    width = max(launch["BLOCK_D"], launch["BLOCK_V"])
    if launch["BYTES"] > 2:
        return [_config(64 if width <= 128 else 32, 32, 4, 2), _config(32, 32, 4, 1)]
    if width <= 64:
        return [_config(128, 128, 8, 3), _config(128, 64, 4, 3), _config(64, 64, 4, 2)]
    if width <= 128:
        return [_config(128, 64, 8, 4), _config(128, 128, 8, 3), _config(64, 64, 4, 3)]
    return [_config(128, 64, 8, 2), _config(64, 32, 4, 2)]


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)


def forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    reach: Reach,
    scoring: Scoring,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] in `out_dtype` and lse [T, H] in fp32; see `attend`."""
    (rows, heads, _), value_dim = q_THD.shape, v_SGV.shape[2]
    if reach.empty:
        nothing_TH = q_THD.new_full((rows, heads), float("-inf"), dtype=torch.float32)
        return q_THD.new_zeros(rows, heads, value_dim, dtype=out_dtype), nothing_TH
    q, k, v = (dense_rows(x) for x in (q_THD, k_SGD, v_SGV))
    out_THV = q.new_empty(rows, heads, value_dim, dtype=out_dtype)
    lse_TH = q.new_empty(rows, heads, dtype=torch.float32)
    bias = scoring.key_bias_SH
    _forward_kernel[lambda meta: (triton.cdiv(rows, meta["ROWS"]), heads)](
        q, k, v, out_THV, lse_TH,
        reach.first.on(q.device), reach.last.on(q.device), bias,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out_THV.stride()[:2],
        *(bias.stride() if bias is not None else (0, 0)),
        rows, len(k), *scalars(scoring), size_class(rows), size_class(reach.area() // rows),
        **constants(q, k, v, scoring),
    )  # fmt: skip
    return out_THV, lse_TH


@autotuned(_options, ["GROUP", "BLOCK_D", "BLOCK_V", "CAP", "BIAS", "row_class", "seen_class"])
@triton.jit(do_not_specialize=["row_class", "seen_class"])
def _forward_kernel(
    q, k, v, out, lse, first, last, bias,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, bias_row, bias_head,
    rows, keys, scale, softcap, row_class, seen_class,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BYTES: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Later rows reach more keys when the reach is causal: the longest programs start first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    row_M = start + tl.arange(0, ROWS)
    first_M = tl.load(first + row_M, mask=row_M < rows, other=0)
    last_M = tl.load(last + row_M, mask=row_M < rows, other=0)
    low, high, core_low, core_high = key_range(first_M, last_M)
    tiles, left, inside = split(low, high, core_low, core_high, KEYS)

    k += (head // GROUP).to(tl.int64) * k_head
    v += (head // GROUP).to(tl.int64) * v_head
    if BIAS:
        bias += head.to(tl.int64) * bias_head
    q += head.to(tl.int64) * q_head
    q_MD = load_tile(q, start, q_row, rows, ROWS, DIM, BLOCK_D, EDGE=True)
    acc_MV = tl.zeros([ROWS, BLOCK_V], dtype=tl.float32)
    sum_M = tl.zeros([ROWS], dtype=tl.float32)
    peak_M = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for step in range(inside):
        acc_MV, sum_M, peak_M = _step(
            acc_MV, sum_M, peak_M, q_MD, k, v, bias, low + (left + step) * KEYS, first_M, last_M,
            k_row, v_row, bias_row, high, scale, softcap,
            DIM, BLOCK_D, VALUE_DIM, BLOCK_V, CAP, BIAS, PLAIN, KEYS, EDGE=False,
        )  # fmt: skip
    for step in range(tiles - inside):
        tile = tl.where(step < left, step, step + inside)
        acc_MV, sum_M, peak_M = _step(
            acc_MV, sum_M, peak_M, q_MD, k, v, bias, low + tile * KEYS, first_M, last_M,
            k_row, v_row, bias_row, high, scale, softcap,
            DIM, BLOCK_D, VALUE_DIM, BLOCK_V, CAP, BIAS, PLAIN, KEYS, EDGE=True,
        )  # fmt: skip

    # Tiles without a mask ask only rows that see something.
    out_MV, lse_M = finish(acc_MV, tl.where(first_M < last_M, sum_M, 0.0), peak_M)
    out += head.to(tl.int64) * out_head
    store_tile(out, start, out_row, rows, out_MV, ROWS, VALUE_DIM, BLOCK_V)
    at_M = lse + row_M.to(tl.int64) * tl.num_programs(1) + head
    tl.store(at_M, lse_M, mask=row_M < rows)


@triton.jit
def _step(
    acc_MV, sum_M, peak_M, q_MD, k, v, bias, start, first_M, last_M,
    k_row, v_row, bias_row, stop, scale, softcap,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    CAP: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr, KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The softmax goes on over the keys from `start` on."""
    key_N = start + tl.arange(0, KEYS)
    k_ND = load_tile(k, start, k_row, stop, KEYS, DIM, BLOCK_D, EDGE)
    logits_MN = product(q_MD, tl.trans(k_ND))
    if not PLAIN:
        logits_MN = logits_of(logits_MN, scale, softcap, CAP)
    if BIAS:
        bias_N = tl.load(bias + key_N.to(tl.int64) * bias_row, mask=key_N < stop, other=0.0)
        logits_MN += bias_N.to(tl.float32)[None, :] * LOG2E
    if EDGE:
        visible_MN = within(first_M[:, None], last_M[:, None], key_N[None, :])
        logits_MN = tl.where(visible_MN, logits_MN, float("-inf"))
    v_NV = load_tile(v, start, v_row, stop, KEYS, VALUE_DIM, BLOCK_V, EDGE)
    unit = 1.0
    if PLAIN:
        unit = scale * LOG2E
    return absorb(acc_MV, sum_M, peak_M, logits_MN, unit, v_NV, SAFE=EDGE or BIAS)
