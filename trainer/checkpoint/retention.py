"""Retention: which of the committed checkpoints may go."""

from __future__ import annotations

from collections.abc import Mapping

from .settings import CheckpointSettings

_HOUR_S = 3600.0


def expendable(
    ages: Mapping[int, float | None], settings: CheckpointSettings, *, reread: bool
) -> list[int]:
    """Steps of the checkpoints that may be removed.

    Args:
        ages: Seconds since each committed checkpoint was saved, by its step. None, and less than
            0 where a clock went backwards, are young: what is in doubt stays.
        settings: How many stay, and which.
        reread: Whether the newest was read again after it was committed, and found intact. Until
            then nothing may go: it may have to be loaded from one of the others.

    Returns:
        Steps, oldest first.
    """
    if not reread:
        return []
    steps = sorted(ages)[: -settings.keep]
    return [step for step in steps if not _stays(step, ages[step], settings)]


def _stays(step: int, age: float | None, settings: CheckpointSettings) -> bool:
    """Whether one beyond the newest stays."""
    if settings.keep_every and step % settings.keep_every == 0:
        return True
    if settings.keep_hours is None:
        return False
    return age is None or age < settings.keep_hours * _HOUR_S
