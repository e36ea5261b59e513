"""KeyCache: what generation keeps of the tokens before, per layer.

Shapes: S tokens so far, G key-value heads, D head width, E hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KeyCache:
    """Keys before RoPE, values and, where a mechanism reads them, layer inputs of all tokens."""

    layers: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    def extend(
        self, layer: int, k_SGD: Tensor, v_SGD: Tensor, hidden_SE: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds a layer's new tokens, and returns all of them."""
        new = k_SGD, v_SGD, hidden_SE
        if layer in self.layers:
            pairs = zip(self.layers[layer], new, strict=True)
            new = tuple(
                None if old is None or more is None else torch.cat([old, more])
                for old, more in pairs
            )
        self.layers[layer] = new  # type: ignore[assignment]
        return self.layers[layer]
