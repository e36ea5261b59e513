"""Parcel: several tensors of the same tokens in one message.

Shapes: N tokens, X numbers of a token in one of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .transport import Incoming


@dataclass(frozen=True)
class Parcel:
    """Tensors, one after the other in one flat tensor.

    Attributes:
        flat: All numbers.
        shapes: Of a token in each tensor.
    """

    flat: Tensor
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def pack(cls, tensors: Sequence[Tensor], rows: Tensor | None = None) -> Parcel:
        """A copy of tensors of one dtype.

        Args:
            tensors: [N, ...] each.
            rows: Which tokens; None for all.
        """
        assert len({x.dtype for x in tensors}) == 1, [x.dtype for x in tensors]
        shapes = tuple(tuple(x.shape[1:]) for x in tensors)
        if rows is not None:
            tensors = [x.index_select(0, rows) for x in tensors]
        return cls(torch.cat([x.reshape(-1) for x in tensors]), shapes)

    @property
    def width(self) -> int:
        """Numbers of a token, over all tensors."""
        return sum(map(prod, self.shapes))

    def incoming(self, peer: int, tokens: int) -> Incoming:
        """What comes where another rank sends such a parcel of `tokens` tokens."""
        return Incoming(peer, tokens * self.width, self.flat)

    def of(self, flat: Tensor) -> Parcel:
        """Another such parcel, as it came."""
        return Parcel(flat, self.shapes)

    @property
    def tensors(self) -> list[Tensor]:
        """Views of all, [N, ...] each."""
        tokens = self.flat.numel() // max(1, self.width)
        parts = self.flat.split([tokens * prod(shape) for shape in self.shapes])
        return [x.view(tokens, *shape) for x, shape in zip(parts, self.shapes, strict=True)]
