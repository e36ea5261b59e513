"""Checkpoint settings: when checkpoints are written, where, and which of them stay."""

from __future__ import annotations

from pydantic import Field

from ...settings import Settings
from ..exactness import Level


class CheckpointSettings(Settings):
    """When checkpoints are written, where, and which of them stay."""

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints; the end of a stage is always saved."""

    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay."""

    keep_every: int = Field(default=0, ge=0)
    """Those whose step is a multiple of this stay for ever; 0: none. A multiple of `every`."""

    keep_hours: float | None = Field(default=None, gt=0)
    """Those that are younger stay as well."""

    where: str = "checkpoints"
    """A folder in the run's, an absolute path, or a URL such as s3://bucket/prefix."""

    asynchronous: bool = True
    """Write while training goes on. false: training waits until a checkpoint is complete."""

    tries: int = Field(default=3, ge=1)
    """Attempts at one save before it counts as a miss; the waits between them grow."""

    misses: int = Field(default=3, ge=1)
    """Saves in a row that may fail before the run ends with an error."""

    exactness: Level | None = None
    """The least that a resume may keep: E2 bit-exact, E1 the same data and schedule under any
    layout, E0 weights and moments only. Left out: what the run declared when it began."""
