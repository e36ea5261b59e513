"""Scores of windows as scores of blocks: one pass over a chunk, forced and hidden blocks included.

Shapes: C heads that choose, Q query groups of the chunk, W windows in sight, K windows that
overlap a block; M query groups and B blocks of a tile.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection_plan import Chunk, SelectionPlan
from ..selection_rule import LAST, SelectionRule

ROWS = 16
BLOCKS = 64

MOST_AT_ONCE = 6
"""Overlapping windows of a block whose scores are loaded together."""


class BlockScores:
    """Scores of blocks for one selection, chunk by chunk; see the eager one."""

    def __init__(
        self, todo: SelectionPlan, rule: SelectionRule, device: torch.device, dtype: torch.dtype
    ) -> None:
        del dtype
        self._rule, self._stride, self._blocks = rule, float(todo.windows.stride), len(todo.grid)
        windows, keys = (x.on(device) for x in todo.overlaps)
        seen, choosable, over = todo.seen_by, todo.choosable, todo.overlapping
        self._bounds = tuple(
            x.on(device) for x in (seen.first, seen.last, choosable.first, choosable.last,
                                   todo.own_first)
        )  # fmt: skip
        self._where = windows, keys, over.first.on(device), over.last.on(device)

    def __call__(self, chunk: Chunk, scores_CQW: Tensor) -> Tensor:
        """Scores of the chunk's blocks, [C, Q, B]."""
        count, size, width = scores_CQW.shape
        blocks, rule = chunk.blocks, self._rule
        out_CQB = scores_CQW.new_empty(count, size, blocks.stop - blocks.start)
        _kernel[triton.cdiv(size, ROWS), triton.cdiv(out_CQB.shape[2], BLOCKS), count](
            scores_CQW.contiguous(), out_CQB, *self._where,
            *(bound[chunk.groups] for bound in self._bounds),
            size, chunk.sight.windows.start, width, blocks.start, out_CQB.shape[2], self._blocks,
            len(self._where[0]), 1.0 / self._stride, rule.initial,
            LOCAL=rule.local, LOGIT=rule.statistic == "logit", MAX=rule.mapping == "overlap_max",
            LOWEST=LAST, AT_ONCE=min(max(1, len(self._where[0])), MOST_AT_ONCE),
            ROWS=ROWS, BLOCKS=BLOCKS,
        )  # fmt: skip
        return out_CQB


COUNTS = ["queries", "window0", "width", "block0", "count", "blocks", "overlaps", "initial"]


@triton.jit(do_not_specialize=COUNTS)
def _kernel(
    scores, out, windows, keys, over_first, over_last,
    seen_first, seen_last, first, last, own,
    queries, window0, width, block0, count, blocks, overlaps, unit, initial,
    LOCAL: tl.constexpr, LOGIT: tl.constexpr, MAX: tl.constexpr, LOWEST: tl.constexpr,
    AT_ONCE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    query_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at_B = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    live_M, there_B = query_M < queries, at_B < count
    block_B = block0 + at_B
    row_M = tl.program_id(2).to(tl.int64) * queries + query_M
    seen_first_M = tl.load(seen_first + query_M, mask=live_M, other=0)
    seen_last_M = tl.load(seen_last + query_M, mask=live_M, other=0)
    fill = 0.0
    if LOGIT and MAX:
        fill = float("-inf")
    total_MB = tl.full([ROWS, BLOCKS], fill, tl.float32)
    for some in range(0, overlaps, AT_ONCE):
        for more in tl.static_range(AT_ONCE):
            overlap = some + more
            known_B = at_B < tl.where(overlap < overlaps, count, 0)
            window_B = tl.load(windows + overlap * blocks + block_B, mask=known_B, other=0)
            keys_B = tl.load(keys + overlap * blocks + block_B, mask=known_B, other=0)
            known_B = (keys_B > 0) & (window_B >= window0) & (window_B < window0 + width)
            known_MB = live_M[:, None] & known_B[None, :]
            if LOGIT:
                known_MB &= window_B[None, :] >= seen_first_M[:, None]
                known_MB &= window_B[None, :] < seen_last_M[:, None]
            from_MB = scores + row_M[:, None] * width + (window_B - window0)[None, :]
            score_MB = tl.load(from_MB, mask=known_MB, other=fill)
            if MAX:
                total_MB = tl.maximum(total_MB, score_MB, propagate_nan=tl.PropagateNan.ALL)
            else:
                total_MB += score_MB * (keys_B.to(tl.float32) * unit)[None, :]
    if LOGIT:
        from_B = tl.load(over_first + block_B, mask=there_B, other=0)
        to_B = tl.load(over_last + block_B, mask=there_B, other=0)
        from_MB = tl.maximum(from_B[None, :], seen_first_M[:, None])
        to_MB = tl.minimum(to_B[None, :], seen_last_M[:, None])
        total_MB = tl.where(from_MB >= to_MB, LOWEST, total_MB)
    first_M = tl.load(first + query_M, mask=live_M, other=0)
    last_M = tl.load(last + query_M, mask=live_M, other=0)
    forced_MB = block_B[None, :] < first_M[:, None] + initial
    if LOCAL:
        own_M = tl.load(own + query_M, mask=live_M, other=0)
        forced_MB |= block_B[None, :] > own_M[:, None] - LOCAL
    # A share of an approximate lse may overflow, and must not tie with what is forced.
    total_MB = tl.minimum(total_MB, -LOWEST, propagate_nan=tl.PropagateNan.ALL)
    total_MB = tl.where(forced_MB, float("inf"), total_MB)
    out_MB = (block_B[None, :] < first_M[:, None]) | (block_B[None, :] >= last_M[:, None])
    total_MB = tl.where(out_MB, float("-inf"), total_MB)
    to_MB = out + row_M[:, None] * count + at_B[None, :]
    tl.store(to_MB, total_MB, mask=live_M[:, None] & there_B[None, :])
