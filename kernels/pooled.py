"""Pooled: keys with the windows that they were pooled from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .windows import Windows


@dataclass(frozen=True, eq=False)
class Pooled:
    """Pooled keys of a packed sequence.

    Attributes:
        k_PGD: One key per window: P windows, G key-value heads, D head dim.
        windows: The windows.
    """

    k_PGD: Tensor
    windows: Windows

    def __post_init__(self) -> None:
        if self.k_PGD.ndim != 3 or len(self.k_PGD) != len(self.windows):
            raise ValueError(f"{len(self.windows)} windows have one key [G, D] each, "
                             f"not {list(self.k_PGD.shape)}")  # fmt: skip
