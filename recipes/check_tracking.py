"""The rules that tracking obeys: the project is that of Weights & Biases alone."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..trainer.settings import DEFAULT_PROJECT, TrackingSettings


def check_tracking(settings: TrackingSettings) -> Iterator[Problem]:
    """What is wrong with where metrics go; whether it works here is asked before training.

    Args:
        settings: Of the recipe.
    """
    if settings.wandb == "off" and settings.project != DEFAULT_PROJECT:
        expected = "no such setting: with tracking.wandb off it has no effect"
        fix = "remove it, or set tracking.wandb: online"
        yield Problem("tracking.project", settings.project, expected, fix)
