"""Scores of windows as scores of blocks, with PyTorch's own operators.

Shapes: C heads that choose, Q query groups of the chunk, R = C * Q, W windows in sight, B blocks
of the chunk, K windows that overlap a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..selection_plan import Chunk, SelectionPlan
from ..selection_rule import LAST, SelectionRule


class BlockScores:
    """Scores of blocks for one selection, chunk by chunk."""

    def __init__(
        self, todo: SelectionPlan, rule: SelectionRule, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._todo, self._rule, self._device = todo, rule, device
        at, keys = todo.overlaps
        self._window_KB = at.on(device)
        self._weight_KB = keys.on(device).to(dtype) / todo.windows.stride

    def __call__(self, chunk: Chunk, scores_CQW: Tensor) -> Tensor:
        """Scores of the chunk's blocks, [C, Q, B]; see `select_blocks`.

        What must be chosen has +inf, what must not -inf. `scores_CQW` may be written to.
        """
        count, size, width = scores_CQW.shape
        if self._rule.statistic == "logit" and width:
            fill = 0.0 if self._rule.mapping == "overlap_sum" else float("-inf")
            at_W = torch.arange(chunk.sight.windows.start, chunk.sight.windows.stop,
                                device=self._device)  # fmt: skip
            first_Q1, last_Q1 = self._bounds(self._todo.seen_by, chunk)
            hidden_QW = (at_W < first_Q1) | (at_W >= last_Q1)
            scores_CQW = scores_CQW.masked_fill_(hidden_QW, fill)
        scores_CQB = self._of_blocks(chunk, scores_CQW.flatten(0, 1)).view(count, size, -1)
        self._force(chunk, scores_CQB)
        return scores_CQB

    def _bounds(self, bounds: Any, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """An interval of the chunk's query groups, [Q, 1]."""
        first_Q, last_Q = bounds.first.on(self._device), bounds.last.on(self._device)
        return first_Q[chunk.groups, None], last_Q[chunk.groups, None]

    def _of_blocks(self, chunk: Chunk, scores_RW: Tensor) -> Tensor:
        blocks, windows = chunk.blocks, chunk.sight.windows
        size = blocks.stop - blocks.start
        total_RB = scores_RW.new_zeros(len(scores_RW), size)
        if len(chunk.sight):
            at_KB = self._window_KB[:, blocks]
            weight_KB = self._weight_KB[:, blocks]
            there_KB = (at_KB >= windows.start) & (at_KB < windows.stop) & (weight_KB > 0)
            weight_KB = weight_KB * there_KB
            at_KB = (at_KB - windows.start).clamp(0, len(chunk.sight) - 1)
            self._add_up(total_RB, scores_RW, at_KB, weight_KB, ~there_KB)
        if self._rule.statistic == "logit":
            first_B, last_B = (x.on(self._device)[blocks] for x in (
                self._todo.overlapping.first, self._todo.overlapping.last))  # fmt: skip
            first_Q1, last_Q1 = self._bounds(self._todo.seen_by, chunk)
            nothing_QB = torch.maximum(first_B, first_Q1) >= torch.minimum(last_B, last_Q1)
            total_RB.view(-1, *nothing_QB.shape).masked_fill_(nothing_QB, LAST)
        return total_RB

    def _add_up(
        self, total_RB: Tensor, scores_RW: Tensor, at_KB: Tensor, weight_KB: Tensor, gone_KB: Tensor
    ) -> None:
        if self._rule.mapping == "overlap_sum":
            for at_B, weight_B in zip(at_KB, weight_KB, strict=True):
                total_RB.addcmul_(scores_RW.index_select(1, at_B), weight_B)
            return
        fill = 0.0 if self._rule.statistic == "probability" else float("-inf")
        total_RB.fill_(fill)
        for at_B, gone_B in zip(at_KB, gone_KB, strict=True):
            part_RB = scores_RW.index_select(1, at_B).masked_fill_(gone_B, fill)
            torch.maximum(total_RB, part_RB, out=total_RB)

    def _force(self, chunk: Chunk, scores_CQB: Tensor) -> None:
        rule, device = self._rule, self._device
        at_B = torch.arange(chunk.blocks.start, chunk.blocks.stop, device=device)
        first_Q1, last_Q1 = self._bounds(self._todo.choosable, chunk)
        forced_QB = at_B < first_Q1 + rule.initial
        if rule.local:
            own_Q1 = self._todo.own_first.on(device)[chunk.groups, None]
            forced_QB |= at_B > own_Q1 - rule.local
        out_QB = (at_B < first_Q1) | (at_B >= last_Q1)
        # A share of an approximate lse may overflow, and must not tie with what is forced.
        scores_CQB.clamp_(max=-LAST).masked_fill_(forced_QB, float("inf"))
        scores_CQB.masked_fill_(out_QB, float("-inf"))
