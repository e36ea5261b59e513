"""Notes: what layers leave behind for the report of a step, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Notes:
    """Sums and their weights by name, over layers and micro-batches; waits for no device.

    Attributes:
        sums: Per name the sum and the weight, fp64 [2].
        parts: Names whose sums are this tensor rank's parts; the others are the same on all.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.parts: set[str] = set()

    def add(self, name: str, total: Tensor, weight: Tensor | float, *, part: bool = False) -> None:
        """Add to a sum.

        Args:
            name: Of what is added.
            total: A sum, one number.
            weight: What to divide by in the end; the same on all tensor ranks.
            part: Whether the sums of the tensor ranks add up.
        """
        weight = torch.as_tensor(weight, device=total.device)
        pair = torch.stack([total.detach().double(), weight.detach().double()])
        held = self.sums.get(name)
        self.sums[name] = pair if held is None else held + pair
        if part:
            self.parts.add(name)

    def take(self, other: Notes) -> None:
        """Add what is in `other`."""
        for name, pair in other.sums.items():
            self.add(name, pair[0], pair[1], part=name in other.parts)
