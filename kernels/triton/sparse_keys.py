"""Keys: gradients of keys, values and biases, block by block.

A program serves a split of the rows that chose a block: the first block of a document may be chosen
by every row. What fits one split is written directly; other splits write partial sums in fp32,
which a second kernel adds in order. No atomics: the same sums in every run.

Shapes: P choices, Z segments.
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

from ..blocks import Blocks
from .sparse_blocks import launch, row_tile
from .sparse_shape import TUNED_BY, Inputs, Shape
from .sparse_steps import (
    bounds_of,
    choices_of_rows,
    level_of,
    load_rows,
    rows_of_choices,
    store_rows,
)
from .sparse_work import Work, splits_of, take
from .steps import LOG2E, dot, logits_of, narrow, product, slope_of, within
from .tuning import autotuned, one_warp_group

BUFFER = 2**31
"""Bytes of partial sums."""

LEAST_ROWS = 512
"""Of a split."""

MOST_PROGRAMS = 1024
"""As many as keep a GPU busy; more only where there are more segments."""


def options(constants: dict[str, Any]) -> Sequence[triton.Config]:
    """Row tiles to try; the key tile is given, since it decides what partial sums are."""
    if constants["BYTES"] > 2:
        return [row_tile(16, 8, 1)]
    narrowest = min(constants["DP"], constants["VP"])
    wide = constants["BK"] * (constants["DP"] + constants["VP"]) > 16384
    if constants["BIASED"]:  # Their product has few columns; see `one_warp_group`.
        return [row_tile(32, 4, 1 if wide else 2), row_tile(16, 4, 1)]
    if wide:
        tiles = [row_tile(32, 8, 1), row_tile(64, 8, 2), row_tile(64, 8, 1)]
        return one_warp_group(tiles, narrowest)
    return [row_tile(64, 4, 2), row_tile(32, 4, 2), row_tile(64, 4, 1)]


def keys(
    inputs: Inputs, blocks: Blocks, dout: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk [S, G, D], dv [S, G, V] and those of the biases [S, H] (None without biases), in fp32."""
    shape, end = inputs.shape, int(blocks.grid.starts_B1[-1])
    wide = {"dtype": torch.float32, "device": inputs.q.device}
    length, per_head = len(inputs.k), shape.heads // shape.groups
    biased = inputs.constants["BIASED"]
    sums = [
        torch.empty(length, shape.groups, shape.dim, **wide),
        torch.empty(length, shape.groups, shape.value_dim, **wide),
        torch.empty(length, shape.groups, per_head if biased else 1, **wide),
    ]
    for total in sums:
        total[end:] = 0.0
    split = split_of(shape)
    starts_Z1 = blocks.inverse_over(shape.segment_heads).starts_CB1
    work = Work.of(starts_Z1[:-1], starts_Z1[1:], split, shape.choices)
    splits_Z = splits_of(work.begin_Z, work.end_Z, split)
    several_Z = splits_Z.masked_fill(splits_Z == 1, 0)
    slot_Z = several_Z.cumsum(0) - several_Z
    # More than `split` choices make fewer than 2 / split splits each.
    slots = min(2 * shape.choices // split, len(work))
    tiles = (slots, shape.served, shape.key_tiles, shape.key_tile)
    parts = [torch.empty(*tiles, total.shape[2], **wide) for total in sums]
    constants = {"HG": per_head, "HP": max(16, triton.next_power_of_2(per_head))}
    launch(
        _keys, inputs, blocks, work, (dout, lse, delta, slot_Z, *sums, *parts),
        (dout.stride(0), dout.stride(1)), **constants,
        KT=shape.key_tiles, BK=shape.key_tile,
    )  # fmt: skip
    columns = 64
    for total, part in zip(sums if biased else sums[:2], parts, strict=False):
        _sum[(shape.segments, shape.served * shape.key_tiles, triton.cdiv(part.shape[4], columns))](
            total, part, slot_Z, several_Z, inputs.where[1], shape.blocks, part.shape[4],
            SERVED=shape.served, G=shape.groups, KT=shape.key_tiles, BK=shape.key_tile,
            TILE=columns, num_warps=4,
        )  # fmt: skip
    return sums[0], sums[1], sums[2].flatten(1) if biased else None


def split_of(shape: Shape) -> int:
    """Choices of a program.

    Twice the average of the segments, so that most write directly; fewer where there are few
    segments; as many as it takes for partial sums to fit into `BUFFER`.
    """
    rows, tiles = shape.choices * shape.rows_of_choice, shape.served * shape.key_tiles
    busy = rows * tiles // MOST_PROGRAMS
    target = max(LEAST_ROWS, min(2 * rows // shape.segments, busy))
    part = tiles * shape.key_tile * (shape.dim + shape.value_dim) * 4
    return max(1, target // shape.rows_of_choice, -(-2 * shape.choices * part // BUFFER))


@autotuned(options, key=TUNED_BY)
@triton.jit(do_not_specialize=["split", "blocks", "segments", "query_class"])
def _keys(
    q, k, v, bias, dout, lse, delta, slot_Z, dk, dv, dbias, dk_part, dv_part, dbias_part,
    order, starts, groups, first, last,
    segment_I, item_Z, begin_Z, end_Z, split, blocks, segments, ot, oh,
    qt, qh, kt, kh, vt, vh, bt, bh, scale, softcap, query_class,
    C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    CAP: tl.constexpr, BIASED: tl.constexpr, GROUPED: tl.constexpr, BYTES: tl.constexpr,
    LONG: tl.constexpr, PLAIN: tl.constexpr,
    HG: tl.constexpr, HP: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    work = take(segment_I, item_Z, begin_Z, end_Z, split, blocks, segments)
    segment, head, block, begin, count, number = work
    if segment >= segments:
        return
    heads: tl.constexpr = G * HG
    served: tl.constexpr = G // C if G > C else 1
    kv, tile = head * served + tl.program_id(1), tl.program_id(2)
    key_N = tl.load(starts + block) + tile * BK + tl.arange(0, BK)
    stop = tl.load(starts + block + 1)
    exists_N = key_N < stop
    at_N = key_N.to(tl.int64)
    k_ND = load_rows(k + kv.to(tl.int64) * kh, at_N * kt, exists_N, D, DP)
    v_NV = load_rows(v + kv.to(tl.int64) * vh, at_N * vt, exists_N, V, VP)
    dk_ND = tl.zeros([BK, DP], tl.float32)
    dv_NV = tl.zeros([BK, VP], tl.float32)
    if BIASED:
        dbias_NH = tl.zeros([BK, HP], tl.float32)
    flat_M = choices_of_rows(order, begin, count, 0, R, M, BM)
    for row0 in range(0, count * (M * R), BM):
        token_M, head_M, _, live_M = rows_of_choices(
            flat_M, groups, count, row0, kv, C, G, N, R, M, GROUPED, LONG, BM
        )
        flat_M = choices_of_rows(order, begin, count, row0 + BM, R, M, BM)
        q_MD = load_rows(q, token_M * qt + head_M * qh, live_M, D, DP)
        dout_MV = load_rows(dout, token_M * ot + head_M * oh, live_M, V, VP)
        dout_MV = narrow(dout_MV, k.dtype.element_ty)
        level_M, delta_M = level_of(lse, delta, token_M * heads + head_M, live_M)
        first_M, last_M = bounds_of(first, last, token_M, live_M)
        capped_NM = logits_of(product(k_ND, tl.trans(q_MD)), scale, softcap, CAP)
        last_M = tl.minimum(last_M, stop)
        seen_NM = within(first_M[None, :], last_M[None, :], key_N[:, None])
        at_NM = at_N[:, None] * bt + head_M.to(tl.int64)[None, :] * bh
        weights_NM = _weights(capped_NM, seen_NM, level_M, bias + at_NM if BIASED else 0, BIASED)
        dv_NV = dot(narrow(weights_NM, v_NV.dtype), dout_MV, dv_NV)
        dlogits_NM = weights_NM * (product(v_NV, tl.trans(dout_MV)) - delta_M[None, :])
        if BIASED:
            whose_MH = (head_M - kv * HG)[:, None] == tl.arange(0, HP)[None, :]
            dbias_NH = dot(narrow(dlogits_NM, k_ND.dtype), narrow(whose_MH, k_ND.dtype), dbias_NH)
        if CAP:
            dlogits_NM *= slope_of(capped_NM, softcap)
        dk_ND = dot(narrow(dlogits_NM, k_ND.dtype), q_MD, dk_ND)
    at_N = at_N * G + kv
    if tl.load(end_Z + segment) - tl.load(begin_Z + segment) > split:
        slot = tl.load(slot_Z + segment) + number
        at_N = ((slot * served + tl.program_id(1)) * KT + tile) * BK + tl.arange(0, BK)
        dk, dv, dbias = dk_part, dv_part, dbias_part
    store_rows(dk, at_N * D, exists_N, dk_ND * scale, D, DP)
    store_rows(dv, at_N * V, exists_N, dv_NV, V, VP)
    if BIASED:
        store_rows(dbias, at_N * HG, exists_N, dbias_NH, HG, HP)


@triton.jit
def _weights(capped_NM, seen_NM, level_M, bias_NM, BIASED: tl.constexpr):
    """Softmax weights of keys, from logits and pointers to biases."""
    logits_NM = capped_NM
    if BIASED:
        logits_NM += tl.load(bias_NM, mask=seen_NM, other=0.0).to(tl.float32) * LOG2E
    return tl.where(seen_NM, tl.exp2(logits_NM - level_M[None, :]), 0.0)


@triton.jit(do_not_specialize=["blocks"])
def _sum(
    total, part, slot_Z, several_Z, starts, blocks, size,
    SERVED: tl.constexpr, G: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    splits = tl.load(several_Z + segment)
    if splits == 0:
        return
    served, tile = tl.program_id(1) // KT, tl.program_id(1) % KT
    block = segment % blocks
    kv = segment // blocks * SERVED + served
    row_N = tl.arange(0, BK)
    key_N = tl.load(starts + block) + tile * BK + row_N
    column_X = tl.program_id(2) * TILE + tl.arange(0, TILE)
    live = (key_N < tl.load(starts + block + 1))[:, None] & (column_X < size)[None, :]
    slot = tl.load(slot_Z + segment)
    acc_NX = tl.zeros([BK, TILE], tl.float32)
    for number in range(splits):
        at_N = (((slot + number) * SERVED + served) * KT + tile) * BK + row_N
        acc_NX += tl.load(part + at_N[:, None] * size + column_X[None, :], live, other=0.0)
    at_N = key_N.to(tl.int64) * G + kv
    tl.store(total + at_N[:, None] * size + column_X[None, :], acc_NX, mask=live)
