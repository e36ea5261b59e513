"""Transfer: a host tensor on a device, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; itself where it is there already.

    Args:
        x: On the host, or on the device.
        device: Where it is wanted.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        # Only a copy from pinned memory does not wait for the device.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
