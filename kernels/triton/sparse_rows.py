"""By row, forward: each query group walks through the keys of its blocks.

A program holds rows of one query group and one unit: tokens times query heads that share a block
head and a key-value head. The keys of its list of blocks lie side by side in slots, so one loop
serves every block size down to 1.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse_shape import TUNED_BY, Inputs
from .sparse_steps import (
    add_bias,
    bounds_of,
    keys_of_slots,
    load_rows,
    rows_of_group,
    store_rows,
)
from .steps import absorb, finish, logits_of, product, within
from .tuning import autotuned


def options(constants: dict[str, Any]) -> Sequence[triton.Config]:
    """Row tiles that hold a query group where they can, and key tiles to try; best guess first."""
    return row_options(constants, 128)


def row_options(constants: dict[str, Any], highest: int) -> Sequence[triton.Config]:
    """The same for at most so many rows of 128 dims of 2 bytes."""
    wide = max(constants["DP"], constants["VP"])
    if constants["BYTES"] > 2:
        return [_config(16, 32 if wide <= 128 else 16, 8, 1)]
    height = triton.next_power_of_2(constants["M"] * constants["R"])
    height = min(max(16, height), highest if wide <= 128 else highest // 2)
    keys = 64 if wide <= 128 else 32
    if height > 32:
        warps = height // 16
        return [_config(height, keys, warps, 2), _config(height, keys, warps, 3)]
    # Few rows: all that counts is how many keys are on their way from the L2 cache.
    return [
        _config(height, keys, 4, 2),
        _config(height, keys, 4, 3),
        _config(height, keys, 2, 2),
        _config(height, keys // 2, 2, 3),
    ]


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BM": rows, "BN": keys}, num_warps=warps, num_stages=stages)


def forward(inputs: Inputs, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and natural-log lse [T, H]."""
    q = inputs.q
    out = q.new_empty(*q.shape[:2], inputs.v.shape[2], dtype=out_dtype)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    _forward[grid(inputs)](
        q, inputs.k, inputs.v, inputs.bias, out, lse, *inputs.where, *inputs.strides,
        *inputs.score, **inputs.constants,
    )  # fmt: skip
    return out, lse


def grid(inputs: Inputs) -> Any:
    """A program per row tile of a query group, and unit.

    Neighbours share a key-value head, whose keys then stay in the L2 cache.
    """
    shape = inputs.shape
    return lambda meta: (
        shape.queries * triton.cdiv(shape.rows_of_choice, meta["BM"]),
        shape.units,
    )


@autotuned(options, key=TUNED_BY)
@triton.jit(do_not_specialize=["query_class"])
def _forward(
    q, k, v, bias, out, lse, ids, starts, groups, first, last,
    qt, qh, kt, kh, vt, vh, bt, bh, scale, softcap, query_class,
    C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    CAP: tl.constexpr, BIASED: tl.constexpr, GROUPED: tl.constexpr, BYTES: tl.constexpr,
    LONG: tl.constexpr, PLAIN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (M * R + BM - 1) // BM
    units: tl.constexpr = C if C > G else G
    group, unit = tl.program_id(0) // tiles, tl.program_id(1)
    row0 = tl.program_id(0) % tiles * BM
    chooser, kv = unit // (units // C), unit // (units // G)
    token_M, head_M, live_M = rows_of_group(groups, group, row0, unit, R, GROUPED, LONG, BM)
    ids += (group.to(tl.int64) * C + chooser) * N
    k += kv.to(tl.int64) * kh
    v += kv.to(tl.int64) * vh
    q_MD = load_rows(q, token_M * qt + head_M * qh, live_M, D, DP)
    first_M, last_M = bounds_of(first, last, token_M, live_M)
    peak_M = tl.full([BM], float("-inf"), tl.float32)
    sum_M = tl.zeros([BM], tl.float32)
    acc_MV = tl.zeros([BM, VP], tl.float32)
    for j in range(0, N * L, BN):
        key_N, exists_N = keys_of_slots(ids, starts, j, N, L, BN)
        at_N = key_N.to(tl.int64)
        k_ND = load_rows(k, at_N * kt, exists_N, D, DP)
        v_NV = load_rows(v, at_N * vt, exists_N, V, VP)
        seen_MN = exists_N[None, :] & within(first_M[:, None], last_M[:, None], key_N[None, :])
        logits_MN = logits_of(product(q_MD, tl.trans(k_ND)), scale, softcap, CAP)
        logits_MN = add_bias(logits_MN, bias, head_M, key_N, seen_MN, bt, bh, BIASED)
        logits_MN = tl.where(seen_MN, logits_MN, float("-inf"))
        acc_MV, sum_M, peak_M = absorb(acc_MV, sum_M, peak_M, logits_MN, 1.0, v_NV, True)
    out_MV, lse_M = finish(acc_MV, sum_M, peak_M)
    heads: tl.constexpr = units * R
    store_rows(out, (token_M * heads + head_M) * V, live_M, out_MV, V, VP)
    tl.store(lse + token_M * heads + head_M, lse_M, mask=live_M)
