"""By block, forward: each block gathers the rows that chose it; their partial results are merged.

For few rows per query group: products are as large as the crowd of a block, whatever the number of
heads. A partial result lies at the place of its choice in a buffer of bounded size, so that queries
go through in chunks; partial outputs have the dtype of the output.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Blocks
from .sparse_shape import TUNED_BY, Inputs, Shape
from .sparse_steps import (
    add_bias,
    bounds_of,
    choices_of_rows,
    list_of_rows,
    load_rows,
    part_of,
    rows_of_choices,
    store_rows,
)
from .sparse_work import Work, cut, take
from .steps import LN2, LOG2E, logits_of, narrow, product, within
from .tuning import autotuned

BUFFER = 2**31
"""Bytes of partial results that exist at once. Half of it was 2% slower on an H200 and 2% faster on
an H100, a quarter slower on both."""

ROWS_OF_A_PROGRAM = 2048
"""What a program waits for before its first row (its work, keys and values) takes as long as one or
two hundred rows."""


ROWS_OF_A_MERGE = 2
"""With 16 parts of 128 dims each: what a warp can have on its way."""


@dataclass(frozen=True)
class Chunk:
    """Some query groups and the work on their choices.

    Attributes:
        first: Their first token.
        last: One past the last.
        work: Programs.
    """

    first: int
    last: int
    work: Work


def chunks(shape: Shape, blocks: Blocks, bytes_of_row: int) -> Iterator[Chunk]:
    """Query groups in order, as many at once as the buffer can hold.

    Args:
        shape: Sizes.
        blocks: The choices.
        bytes_of_row: Of the partial results of one query head of a token.
    """
    inverse = blocks.inverse_over(shape.segment_heads)
    starts_Z1 = inverse.starts_CB1
    step = max(1, BUFFER // (bytes_of_row * shape.heads * shape.tokens))
    split = max(1, ROWS_OF_A_PROGRAM // shape.rows_of_choice)
    per_group = shape.chooser * shape.width
    begin_Z = starts_Z1[:-1]
    for group in range(0, shape.queries, step):
        stop = min(group + step, shape.queries)
        end_Z = starts_Z1[1:]
        if stop < shape.queries:
            end_Z = cut(inverse.order_P, starts_Z1, stop * per_group)
        first, last = group, stop
        if blocks.query_starts is not None:
            first, last = int(blocks.query_starts[group]), int(blocks.query_starts[stop])
        yield Chunk(first, last, Work.of(begin_Z, end_Z, split, (stop - group) * per_group))
        begin_Z = end_Z


def options(constants: dict[str, Any]) -> Sequence[triton.Config]:
    """Row tiles to try; the key tile is given, since it decides what is in the buffer."""
    if constants["BYTES"] > 2:
        return [row_tile(16, 8, 1)]
    if max(constants["DP"], constants["VP"]) > 128:
        return [row_tile(64, 4, 1), row_tile(64, 4, 2)]
    return [row_tile(64, 4, 2), row_tile(64, 4, 3), row_tile(128, 8, 2)]


def row_tile(rows: int, warps: int, stages: int) -> triton.Config:
    """A configuration."""
    return triton.Config({"BM": rows}, num_warps=warps, num_stages=stages)


def forward(inputs: Inputs, blocks: Blocks, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and natural-log lse [T, H]."""
    q, shape = inputs.q, inputs.shape
    out = q.new_empty(*q.shape[:2], shape.value_dim, dtype=out_dtype)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    entries = shape.width * shape.key_tiles
    bytes_of_row = entries * (shape.value_dim * out_dtype.itemsize + 4)
    owners = inputs.where[1] if blocks.group_T is None else blocks.group_T.on(q.device)
    part = sums = None
    for chunk in chunks(shape, blocks, bytes_of_row):
        rows = (chunk.last - chunk.first) * shape.heads
        if part is None or part.shape[0] < rows:
            part = sums = None  # freed before more is asked for
            part = q.new_empty(rows, entries, shape.value_dim, dtype=out_dtype)
            sums = q.new_empty(rows, entries, dtype=torch.float32)
        launch(
            _parts, inputs, blocks, chunk.work, (part, sums), (chunk.first,),
            KT=shape.key_tiles, BK=shape.key_tile,
        )  # fmt: skip
        height = ROWS_OF_A_MERGE if inputs.constants["VP"] <= 128 else 1
        _merge[(triton.cdiv(rows, height),)](
            part, sums, inputs.where[0], owners, out, lse, chunk.first, rows,
            C=shape.chooser, H=shape.heads, N=shape.width, KT=shape.key_tiles, V=shape.value_dim,
            VP=inputs.constants["VP"], GROUPED=blocks.group_T is not None,
            ROWS=height, TILE=16, num_warps=1,
        )  # fmt: skip
    return out, lse


def launch(
    kernel: Any, inputs: Inputs, blocks: Blocks, work: Work, tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...], **constants: Any,
) -> None:  # fmt: skip
    """Runs a kernel that serves `work`, on every key-value head and key tile of each item."""
    shape = inputs.shape
    inverse = blocks.inverse_over(shape.segment_heads)
    _, *where = inputs.where
    kernel[(len(work), shape.served, shape.key_tiles)](
        inputs.q, inputs.k, inputs.v, inputs.bias, *tensors, inverse.order_P, *where,
        *work.tensors, work.split, shape.blocks, shape.segments, *numbers,
        *inputs.strides, *inputs.score, **inputs.constants, **constants,
    )  # fmt: skip


@autotuned(options, key=TUNED_BY)
@triton.jit(do_not_specialize=["split", "blocks", "segments", "token0", "query_class"])
def _parts(
    q, k, v, bias, part, sums, order, starts, groups, first, last,
    segment_I, item_Z, begin_Z, end_Z, split, blocks, segments, token0,
    qt, qh, kt, kh, vt, vh, bt, bh, scale, softcap, query_class,
    C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    CAP: tl.constexpr, BIASED: tl.constexpr, GROUPED: tl.constexpr, BYTES: tl.constexpr,
    LONG: tl.constexpr, PLAIN: tl.constexpr,
    KT: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    segment, head, block, begin, count, _ = take(
        segment_I, item_Z, begin_Z, end_Z, split, blocks, segments
    )
    if (segment >= segments) | (count <= 0):
        return
    heads: tl.constexpr = R * (C if C > G else G)
    served: tl.constexpr = G // C if G > C else 1
    kv = head * served + tl.program_id(1)
    tile = tl.program_id(2)
    key_N = tl.load(starts + block) + tile * BK + tl.arange(0, BK)
    stop = tl.load(starts + block + 1)
    exists_N = key_N < stop
    at_N = key_N.to(tl.int64)
    k_ND = load_rows(k + kv.to(tl.int64) * kh, at_N * kt, exists_N, D, DP)
    v_NV = load_rows(v + kv.to(tl.int64) * vh, at_N * vt, exists_N, V, VP)
    flat_M = choices_of_rows(order, begin, count, 0, R, M, BM)
    for row0 in range(0, count * (M * R), BM):
        token_M, head_M, entry_M, live_M = rows_of_choices(
            flat_M, groups, count, row0, kv, C, G, N, R, M, GROUPED, LONG, BM
        )
        flat_M = choices_of_rows(order, begin, count, row0 + BM, R, M, BM)
        q_MD = load_rows(q, token_M * qt + head_M * qh, live_M, D, DP)
        first_M, last_M = bounds_of(first, last, token_M, live_M)
        last_M = tl.minimum(last_M, stop)
        seen_MN = within(first_M[:, None], last_M[:, None], key_N[None, :])
        logits_MN = product(q_MD, tl.trans(k_ND))
        unit = scale * LOG2E
        if not PLAIN:
            unit = 1.0
            logits_MN = logits_of(logits_MN, scale, softcap, CAP)
            logits_MN = add_bias(logits_MN, bias, head_M, key_N, seen_MN, bt, bh, BIASED)
        logits_MN = tl.where(seen_MN, logits_MN, float("-inf"))
        peak_M = tl.max(logits_MN, 1) * unit
        level_M = tl.where(peak_M == float("-inf"), 0.0, peak_M)
        weights_MN = tl.exp2(logits_MN * unit - level_M[:, None])
        sum_M = tl.sum(weights_MN, 1)
        share_M = 1.0 / tl.where(sum_M == 0.0, 1.0, sum_M)
        # Not the output: it has more dims than there are keys, and another layout.
        weights_MN = narrow(weights_MN * share_M[:, None], v_NV.dtype)
        out_MV = product(weights_MN, v_NV)
        to_M = part_of(token_M - token0, head_M, entry_M * KT + tile, heads, N * KT)
        store_rows(part, to_M * V, live_M, out_MV, V, VP, READ_ONCE=True)
        tl.store(sums + to_M, peak_M + tl.log2(sum_M), mask=live_M)


@triton.jit(do_not_specialize=["token0", "rows"])
def _merge(
    part, sums, ids, owners, out, lse, token0, rows,
    C: tl.constexpr, H: tl.constexpr, N: tl.constexpr, KT: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live_M = row_M < rows
    near_M, head_M = (row_M // H).to(tl.int64), row_M % H
    token_M = token0 + near_M
    list_M = list_of_rows(ids, owners, token_M, head_M, live_M, C, H, N, GROUPED)
    at = tl.arange(0, VP)
    peak_M = tl.full([ROWS], float("-inf"), tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    acc_MV = tl.zeros([ROWS, VP], tl.float32)
    for first in range(0, N * KT, TILE):
        entry_E = first + tl.arange(0, TILE)
        # Nobody wrote what belongs to no block.
        there_ME = live_M[:, None] & (entry_E < N * KT)[None, :]
        block_ME = tl.load(list_M[:, None] + (entry_E // KT)[None, :], mask=there_ME, other=-1)
        from_ME = part_of(near_M[:, None], head_M[:, None], entry_E[None, :], H, N * KT)
        sum_ME = tl.load(sums + from_ME, mask=block_ME >= 0, other=float("-inf"))
        live_MEV = (sum_ME > float("-inf"))[:, :, None] & (at < V)[None, None, :]
        from_MEV = part + from_ME[:, :, None] * V + at
        # Read once: what others read again may stay in the L2 cache.
        part_MEV = tl.load(from_MEV, mask=live_MEV, other=0.0, eviction_policy="evict_first")
        new_M = tl.maximum(peak_M, tl.max(sum_ME, 1))
        level_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weight_ME = tl.exp2(sum_ME - level_M[:, None])
        fade_M = tl.exp2(peak_M - level_M)
        more_MV = tl.sum(part_MEV.to(tl.float32) * weight_ME[:, :, None], 1)
        acc_MV = acc_MV * fade_M[:, None] + more_MV
        total_M = total_M * fade_M + tl.sum(weight_ME, 1)
        peak_M = new_M
    nothing_M = total_M == 0.0
    total_M = tl.where(nothing_M, 1.0, total_M)
    to_M = token_M * H + head_M
    store_rows(out, to_M * V, live_M, acc_MV / total_M[:, None], V, VP)
    lse_M = tl.where(nothing_M, float("-inf"), (peak_M + tl.log2(total_M)) * LN2)
    tl.store(lse + to_M, lse_M, mask=live_M)
