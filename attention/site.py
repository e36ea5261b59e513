"""Site: where a mechanism works in the model, and which of its heads are on this tensor rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Site:
    """A layer's place and shape. Heads are split over the tensor ranks in order, whole groups each.

    Attributes:
        layer: Number of the layer, from 0 over the whole model.
        layers_alike: Layers of the whole model that have this kind of mechanism.
        hidden: Width of the layer's input.
        heads: Query heads on this rank.
        groups: Key-value heads on this rank.
        dim: Width of a head.
        first_head: Number of this rank's first query head in the whole layer.
        all_heads: Query heads of the whole layer.
        dtype: Of the parameters.
        total: Adds a tensor up over the tensor ranks; carries no gradient.
        largest: The elementwise largest over the tensor ranks; carries no gradient.
        shared: Returns a tensor that is the same on all tensor ranks, for use by each rank's own
            heads: its gradient is added up over the ranks.
    """

    layer: int
    layers_alike: int
    hidden: int
    heads: int
    groups: int
    dim: int
    first_head: int
    all_heads: int
    dtype: torch.dtype = torch.float32
    total: Callable[[Tensor], Tensor] = _same
    largest: Callable[[Tensor], Tensor] = _same
    shared: Callable[[Tensor], Tensor] = _same

    @property
    def share(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.groups

    @property
    def all_groups(self) -> int:
        """Key-value heads of the whole layer."""
        return self.all_heads // self.share

    def parameter(
        self, *shape: int, start: float | None = None, by_head: bool = False
    ) -> nn.Parameter:
        """A parameter, filled later from the run's seed and its name.

        Args:
            shape: Of this rank's part.
            start: Its constant first value; None for normal numbers of the model's `init_std`.
            by_head: Its first dimension is split over the tensor ranks like the heads; otherwise
                every rank has all of it, and all must compute the same gradient.
        """
        parameter = nn.Parameter(torch.empty(*shape, dtype=self.dtype))
        setattr(parameter, "start", start)  # noqa: B010
        setattr(parameter, "by_head", by_head)  # noqa: B010
        return parameter
