"""By block, backward: dq where query groups are small. See `sparse_blocks`."""

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
from .sparse_blocks import ROWS_OF_A_MERGE, chunks, launch, row_tile
from .sparse_shape import TUNED_BY, Inputs
from .sparse_steps import (
    add_bias,
    bounds_of,
    choices_of_rows,
    level_of,
    list_of_rows,
    load_rows,
    part_of,
    rows_of_choices,
    store_rows,
)
from .sparse_work import take
from .steps import logits_of, narrow, product, slope_of, within
from .tuning import autotuned


def options(constants: dict[str, Any]) -> Sequence[triton.Config]:
    """Row tiles to try."""
    if constants["BYTES"] > 2:
        return [row_tile(16, 8, 1)]
    if max(constants["DP"], constants["VP"]) > 128:
        return [row_tile(32, 4, 1), row_tile(64, 4, 1)]
    return [row_tile(64, 4, 2), row_tile(64, 4, 1), row_tile(128, 8, 1)]


def queries(inputs: Inputs, blocks: Blocks, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dq [T, H, D] in fp32; see `sparse_rows_backward.queries`.

    Partial sums are in bf16 for inputs in bf16, else in fp32.
    """
    q, shape = inputs.q, inputs.shape
    dq = torch.empty_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    entries = shape.width * shape.key_tiles
    owners = inputs.where[1] if blocks.group_T is None else blocks.group_T.on(q.device)
    # Not in fp16, whose range the gradient may leave before it is scaled.
    dtype = q.dtype if q.dtype == torch.bfloat16 else torch.float32
    part = None
    for chunk in chunks(shape, blocks, entries * shape.dim * dtype.itemsize):
        rows = (chunk.last - chunk.first) * shape.heads
        if part is None or part.shape[0] < rows:
            part = None  # freed before more is asked for
            part = q.new_empty(rows, entries, shape.dim, dtype=dtype)
        launch(
            _parts, inputs, blocks, chunk.work, (dout, lse, delta, part),
            (chunk.first, dout.stride(0), dout.stride(1)),
            KT=shape.key_tiles, BK=shape.key_tile,
        )  # fmt: skip
        height = ROWS_OF_A_MERGE if inputs.constants["DP"] <= 128 else 1
        _sum[(triton.cdiv(rows, height),)](
            part, inputs.where[0], owners, dq, chunk.first, rows, inputs.score[0],
            C=shape.chooser, H=shape.heads, N=shape.width, KT=shape.key_tiles, D=shape.dim,
            DP=inputs.constants["DP"], GROUPED=blocks.group_T is not None,
            ROWS=height, TILE=16, num_warps=1,
        )  # fmt: skip
    return dq


@autotuned(options, key=TUNED_BY)
@triton.jit(do_not_specialize=["split", "blocks", "segments", "token0", "query_class"])
def _parts(
    q, k, v, bias, dout, lse, delta, part, order, starts, groups, first, last,
    segment_I, item_Z, begin_Z, end_Z, split, blocks, segments, token0, ot, oh,
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
        dout_MV = narrow(
            load_rows(dout, token_M * ot + head_M * oh, live_M, V, VP), k.dtype.element_ty
        )
        row_M = token_M * heads + head_M
        level_M, delta_M = level_of(lse, delta, row_M, live_M)
        first_M, last_M = bounds_of(first, last, token_M, live_M)
        last_M = tl.minimum(last_M, stop)
        seen_MN = within(first_M[:, None], last_M[:, None], key_N[None, :])
        capped_MN = logits_of(product(q_MD, tl.trans(k_ND)), scale, softcap, CAP)
        logits_MN = add_bias(capped_MN, bias, head_M, key_N, seen_MN, bt, bh, BIASED)
        weights_MN = tl.where(seen_MN, tl.exp2(logits_MN - level_M[:, None]), 0.0)
        dlogits_MN = weights_MN * (product(dout_MV, tl.trans(v_NV)) - delta_M[:, None])
        if CAP:
            dlogits_MN *= slope_of(capped_MN, softcap)
        dq_MD = product(narrow(dlogits_MN, k_ND.dtype), k_ND)
        to_M = part_of(token_M - token0, head_M, entry_M * KT + tile, heads, N * KT)
        store_rows(part, to_M * D, live_M, dq_MD, D, DP, READ_ONCE=True)


@triton.jit(do_not_specialize=["token0", "rows"])
def _sum(
    part, ids, owners, dq, token0, rows, scale,
    C: tl.constexpr, H: tl.constexpr, N: tl.constexpr, KT: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live_M = row_M < rows
    near_M, head_M = (row_M // H).to(tl.int64), row_M % H
    token_M = token0 + near_M
    list_M = list_of_rows(ids, owners, token_M, head_M, live_M, C, H, N, GROUPED)
    at = tl.arange(0, DP)
    acc_MD = tl.zeros([ROWS, DP], tl.float32)
    for first in range(0, N * KT, TILE):
        entry_E = first + tl.arange(0, TILE)
        # Nobody wrote what belongs to no block.
        there_ME = live_M[:, None] & (entry_E < N * KT)[None, :]
        block_ME = tl.load(list_M[:, None] + (entry_E // KT)[None, :], mask=there_ME, other=-1)
        from_ME = part_of(near_M[:, None], head_M[:, None], entry_E[None, :], H, N * KT)
        live_MED = (block_ME >= 0)[:, :, None] & (at < D)[None, None, :]
        from_MED = part + from_ME[:, :, None] * D + at
        part_MED = tl.load(from_MED, mask=live_MED, other=0.0, eviction_policy="evict_first")
        acc_MD += tl.sum(part_MED.to(tl.float32), 1)
    to_M = token_M * H + head_M
    store_rows(dq, to_M * D, live_M, acc_MD * scale, D, DP)
