"""Mechanism: the part of a layer between its projections; made from the settings."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .context import Context
from .dense import Dense
from .settings import AttentionSettings


class Mechanism(Protocol):
    """An `nn.Module` that decides which keys each query sees; it knows nothing of ranks.

    Attributes:
        needs_hidden: Whether it reads the layer's normalised input.
    """

    needs_hidden: bool

    def __call__(
        self,
        hidden_TE: Tensor | None,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V] from queries and keys before RoPE."""
        ...


def make_mechanism(settings: AttentionSettings) -> Dense:
    """The mechanism that the settings name, one per layer."""
    return {"dense": Dense}[settings.mechanism]()
