"""Workspace: buffers that a loop uses again; large fresh ones cost page faults on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Buffers by name, each as large as the largest that was asked for so far, or twice that."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, valid until the name is taken again."""
        size = math.prod(shape)
        flat = self._flat.get(name, self._like)
        if len(flat) < size:
            # The old buffer goes before the new one comes.
            grown = min(2 * len(flat), 2 * size)
            self._flat.pop(name, None)
            del flat
            flat = self._flat[name] = self._like.new_empty(max(size, grown))
        return flat[:size].view(shape)
