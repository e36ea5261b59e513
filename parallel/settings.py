"""How tokens, layers, heads and experts are spread over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Settings


class ParallelSettings(Settings):
    """Degrees of parallelism; what is left of the ranks is data parallelism."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share every layer's heads and hidden units (TP)."""

    sequence: bool = False
    """Split norms and residuals over the tensor ranks as well (SP); needs tensor > 1."""

    pipeline: int = Field(default=1, ge=1)
    """Ranks that hold successive groups of layers (PP)."""

    context: int = Field(default=1, ge=1)
    """Ranks that share every sequence's tokens (CP)."""

    expert: int = Field(default=1, ge=1)
    """Ranks that share the experts of a MoE model (EP); divides the data and context ranks."""

    exchange: Literal["ring", "all_gather"] = "all_gather"
    """How keys and values reach the queries of other context ranks."""

    layout: Literal["zigzag", "contiguous", "striped", "balanced"] = "zigzag"
    """Which tokens a context rank owns. Zigzag gives every rank equal causal work, striped against
    every other rank's keys as well, whatever the documents; balanced looks at each micro-batch's
    documents and gives equal work over them, with few of them on several ranks."""
