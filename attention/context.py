"""Context: what a mechanism knows about the micro-batch that it works on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.reach import Reach
from ..parallel.exchange import Exchange
from .rope import Rotation


@dataclass(frozen=True, eq=False)
class Context:
    """One micro-batch of packed documents, as this rank sees it.

    Attributes:
        cp: Attention over all context ranks.
        reach: For each local token the visible keys, as global positions.
        rope: Rotations of the local tokens; none in a layer without RoPE.
        positions_T: Position of each local token within its document, int64.
    """

    cp: Exchange
    reach: Reach
    rope: Rotation
    positions_T: Tensor
