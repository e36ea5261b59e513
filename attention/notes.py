"""Notes: what layers leave behind for the report of a step, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Notes:
    """Sums and their weights by name, over layers and micro-batches; waits for no device.

    Attributes:
        sums: Per name the sum and the weight, fp64 [2].
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Add to a sum.

        Args:
            name: Of what is added.
            total: A sum, one number.
            weight: What to divide by in the end.
        """
        weight = torch.as_tensor(weight, dtype=torch.float64, device=total.device)
        pair = torch.stack([total.detach().double(), weight.detach().double()])
        held = self.sums.get(name)
        self.sums[name] = pair if held is None else held + pair
