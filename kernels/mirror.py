"""Mirror: a tensor that is planned on the host, and its copies on devices."""

from __future__ import annotations

import torch
from torch import Tensor

from .once import Once
from .transfer import to_device


class Mirror(Once):
    """Copies of a host tensor as int32 on devices, each made once and without waiting.

    Attributes:
        host: The tensor.
    """

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The copy on `device`."""
        copy = self._copies.get(device)
        if copy is None:
            copy = self._copies[device] = to_device(self.host.int(), device)
        return copy
