"""Seen: which keys queries see, and how scores are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.blocks import Blocks
from ..kernels.reach import Reach
from .heads import Share, of_share


@dataclass(frozen=True, eq=False)
class Seen:
    """What a call of an exchange asks for, beside queries, keys and values.

    Attributes:
        reach: For each query the visible keys, as global positions.
        blocks: The blocks that each query chose; None for all that it reaches.
        scale: Of the scores.
        sink_H: The score of one more key per head, with value 0; None for none.
    """

    reach: Reach
    blocks: Blocks | None
    scale: float
    sink_H: Tensor | None = None

    def of(self, share: Share, heads: int, groups: int) -> Seen:
        """What some heads see.

        Args:
            share: The heads.
            heads: All query heads.
            groups: All key-value heads.
        """
        blocks, sink_H = self.blocks, self.sink_H
        if blocks is not None and blocks.ids_QCN.shape[1] > 1:
            # Once: what is sorted in a forward is used again in its backward.
            key, all_ids = ("share", *share.bounds, heads, groups), blocks.ids_QCN
            grid, starts = blocks.grid, blocks.query_starts
            blocks = blocks.once(
                key, lambda: Blocks(of_share(all_ids, share, heads, groups), grid, starts)
            )
        if sink_H is not None:
            sink_H = sink_H[share.heads]
        return Seen(self.reach, blocks, self.scale, sink_H)
