"""Notes: what layers leave behind for the report of a step, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Notes:
    """Sums and their weights by name, over layers and micro-batches; waits for no device.

    A sum may have terms that are the same on all tensor ranks, and terms that are this rank's part.
    """

    def __init__(self) -> None:
        self._shared: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}

    @property
    def sums(self) -> dict[str, Tensor]:
        """Per name the sum and the weight as this rank knows them, fp64 [2]."""
        known = dict(self._shared)
        for name, pair in self._parts.items():
            known[name] = known[name] + pair if name in known else pair
        return known

    @property
    def parts(self) -> set[str]:
        """Names of sums that have parts."""
        return set(self._parts)

    def add(self, name: str, total: Tensor, weight: Tensor | float, *, part: bool = False) -> None:
        """Add to a sum.

        Args:
            name: Of what is added.
            total: A sum, one number.
            weight: What to divide by in the end; the same on all tensor ranks.
            part: Whether the sums of the tensor ranks add up.
        """
        total = total.detach().double()
        # Filled there: a copy from the host would wait.
        known = weight.detach() if isinstance(weight, Tensor) else torch.full_like(total, weight)
        pair = torch.stack([total, known.double()])
        into = self._parts if part else self._shared
        into[name] = pair if name not in into else into[name] + pair

    def share(self, name: str, first: bool) -> Tensor | None:
        """A rank's share of a sum and its weight, so that those of the tensor ranks add up.

        Args:
            name: Of the sum.
            first: Whether this is the first tensor rank, which alone counts what all have.
        """
        shared, part = self._shared.get(name), self._parts.get(name)
        if shared is not None and not first:
            shared = shared * 0.0
        if part is not None and not first:
            part = torch.stack([part[0], part[1] * 0.0])
        if shared is None or part is None:
            return part if shared is None else shared
        return shared + part
