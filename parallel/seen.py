"""Seen: which keys the local queries see, and how scores are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.blocks import Blocks
from ..kernels.reach import Reach


@dataclass(frozen=True, eq=False)
class Seen:
    """What a call of an exchange asks for, beside queries, keys and values.

    Attributes:
        reach: For each local query the visible keys, as global positions.
        blocks: The blocks that each local query chose; None for all that it reaches.
        scale: Of the scores.
        sink_H: The score of one more key per head, with value 0; None for none.
    """

    reach: Reach
    blocks: Blocks | None
    scale: float
    sink_H: Tensor | None = None
