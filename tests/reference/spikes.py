"""Which steps spike, in plain numpy over lists."""

import numpy as np


def spikes(losses, norms, window: int, sigma: float) -> list[bool]:
    """Whether each step lies above the mean and deviation of the last `window` applied ones."""
    applied: list[tuple[float, float]] = []
    found = []
    for pair in zip(losses, norms, strict=True):
        finite, spike = bool(np.isfinite(pair).all()), False
        if finite and len(applied) >= window:
            last = np.array(applied[-window:], dtype=np.float64)
            mean, deviation = last.mean(axis=0), last.std(axis=0, ddof=1)
            deviation = np.maximum(deviation, 1e-6 * np.abs(mean))
            spike = bool((np.array(pair) > mean + sigma * deviation).any())
        if finite and not spike:
            applied.append(pair)
        found.append(spike)
    return found
