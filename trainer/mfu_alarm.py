"""MfuAlarm: says once when steps are faster than the GPUs can be."""

from __future__ import annotations

import time
from collections.abc import Callable


class MfuAlarm:
    """Compares FLOPs with what the GPUs could have done since they last had nothing to do.

    A single step's time is when the host handed it over, and can be too short. Everything since an
    idle moment cannot: the alarm is never wrong, but for FLOPs that are not needed.

    Args:
        peak: FLOP/s of all GPUs together; None where it is not known, and nothing is said.
        clock: Seconds that only grow.
    """

    def __init__(self, peak: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._peak, self._clock = peak, clock
        self._said = False
        self.idle()

    def idle(self) -> None:
        """The devices have nothing to do now; work begins after this."""
        self._begun, self._flops = self._clock(), 0.0

    def done(self, flops: float) -> str | None:
        """A step is over, on the devices too.

        Args:
            flops: What the model needs for it, over all ranks.

        Returns:
            What to say, the first time.
        """
        self._flops += flops
        seconds = self._clock() - self._begun
        if self._said or self._peak is None or self._flops <= self._peak * seconds:
            return None
        self._said = True
        mfu = self._flops / self._peak / max(seconds, 1e-9)
        return (
            f"MFU {mfu:.2f} is impossible: the steps took less time than the GPUs need at their "
            "peak for what the model needs, so part of it is probably not computed. Attention "
            "over each context rank's own tokens only is the known cause; parallel.canary finds it"
        )
