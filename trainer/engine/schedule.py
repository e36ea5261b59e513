"""The learning rate as a pure function of the step, so that a checkpoint need not store it."""

from __future__ import annotations

import math

from ..settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Rate of a stage's `step` (counted from 0) out of `steps`.

    It rises linearly over the warm-up, reaching the peak at its last step, and then follows the
    schedule, reaching `min_lr` at the stage's last step.
    """
    peak, low = settings.lr, settings.min_lr
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    first = warmup
    if settings.schedule == "wsd":
        first = max(warmup, steps - round(settings.decay_share * steps))
    if step < first:
        return peak
    done = (step - first + 1) / max(1, steps - first)
    if settings.schedule == "cosine":
        return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2
    return peak + (low - peak) * done
