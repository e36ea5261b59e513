"""Cursor: where a run stands between two steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """Where a run stands between two steps. With the recipe it decides everything that follows.

    Attributes:
        step: Steps done in the run.
        stage: Index of the current stage.
        stage_step: Steps done in it.
        next_sample: Index of the stage's next sequence, over all ranks.
        tokens: Tokens trained on in the run.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    next_sample: int = 0
    tokens: int = 0
