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

    exchange: Literal["auto", "all_gather", "ring", "double_ring", "fetch", "ulysses", "two_d"] = (
        "auto"
    )
    """How keys and values meet the queries of other context ranks: all gathered, head by head
    (all_gather); going round while the ones before are computed (ring), also inside of nodes and
    between them (double_ring); only those that some query of a rank reaches (fetch); every rank
    with some heads of all tokens (ulysses), or of those of its node (two_d). auto takes the one
    that is predicted to be the fastest; `longspan check` says which, and why."""

    inner: int | None = Field(default=None, ge=2)
    """For double_ring and two_d: neighbouring context ranks that share a node."""

    across: Literal["ring", "all_gather"] | None = None
    """For two_d: how keys and values travel between nodes; ring where left out."""

    keep_keys: bool = False
    """Keep the other ranks' keys and values from a layer's forward to its backward: they travel
    once less, and take the memory of a whole sequence."""

    layout: Literal["zigzag", "contiguous", "striped", "balanced"] = "zigzag"
    """Which tokens a context rank owns. Zigzag gives every rank equal causal work over one long
    document, striped against every other rank's keys as well; balanced looks at each micro-batch's
    documents and gives equal work over them, with few of them on several ranks."""

    canary: bool = True
    """Before its first step, compute some tokens over the context ranks and on each of them alone,
    and stop if losses or gradients differ. false: do not compare."""
