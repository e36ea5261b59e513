"""Parcel: keys and values of some tokens in one message.

Shapes: N tokens, G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .transport import Incoming


@dataclass(frozen=True)
class Parcel:
    """Keys, then values, one after the other in one flat tensor.

    Attributes:
        flat: All numbers.
        groups: Key-value heads, G.
        widths: D and V.
    """

    flat: Tensor
    groups: int
    widths: tuple[int, int]

    @classmethod
    def pack(cls, k_NGD: Tensor, v_NGV: Tensor, rows: Tensor | None = None) -> Parcel:
        """A copy of keys and values.

        Args:
            k_NGD: Keys.
            v_NGV: Values, of the same dtype.
            rows: Which tokens; None for all.
        """
        assert k_NGD.dtype == v_NGV.dtype, (k_NGD.dtype, v_NGV.dtype)
        groups, widths = k_NGD.shape[1], (k_NGD.shape[2], v_NGV.shape[2])
        parts = (k_NGD, v_NGV)
        if rows is not None:
            parts = tuple(part.index_select(0, rows) for part in parts)
        return cls(torch.cat([part.reshape(-1) for part in parts]), groups, widths)

    def incoming(self, peer: int, tokens: int) -> Incoming:
        """What comes where a rank sends as wide a parcel of `tokens` tokens."""
        return Incoming(peer, tokens * self.groups * sum(self.widths), self.flat)

    def of(self, flat: Tensor) -> Parcel:
        """Another parcel, as it came."""
        return Parcel(flat, self.groups, self.widths)

    @property
    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Views of both."""
        tokens = self.flat.numel() // max(1, self.groups * sum(self.widths))
        k, v = self.flat.split([tokens * self.groups * width for width in self.widths])
        shape = tokens, self.groups
        return k.view(*shape, self.widths[0]), v.view(*shape, self.widths[1])
