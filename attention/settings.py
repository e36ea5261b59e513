"""Which keys a query sees, and how positions enter the scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Settings


class AttentionSettings(Settings):
    """The attention mechanism of every layer."""

    mechanism: Literal["dense"] = "dense"
    """`dense`: every earlier token of the same document."""


class RopeSettings(Settings):
    """Rotary position embedding; positions count from the start of each document."""

    base: float = Field(default=10_000.0, gt=1)
    """Theta: the wavelength base. A larger base stretches a model to a longer context."""
