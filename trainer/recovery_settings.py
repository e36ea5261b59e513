"""What a run does about bad steps, and how long it may take to stop. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Seconds, Settings


class RecoverySettings(Settings):
    """Steps whose loss or gradient is not finite or spikes, and the time to save at a stop."""

    nonfinite: Literal["abort", "skip", "rewind"] = "abort"
    """What follows a loss or gradient that is not finite. No rank ever applies such a step. skip:
    go on with the next data; rewind: go back to a checkpoint and leave out the data since."""

    spike: Literal["none", "skip", "rewind"] = "none"
    """The same for a loss or gradient norm far above those of the last steps; none: apply it."""

    sigma: float = Field(default=6.0, gt=0)
    """Standard deviations above the mean of the window that make a spike."""

    window: int = Field(default=128, ge=2)
    """Applied steps that a step is compared with; until a stage has had so many, nothing spikes."""

    max_skips: int = Field(default=10, ge=1)
    """Skipped steps in a row; one more ends the run."""

    back: int = Field(default=1, ge=1)
    """Checkpoints to go back at a rewind, at most to the beginning of the stage."""

    max_rewinds: int = Field(default=3, ge=1)
    """Rewinds in a run; where one more is needed, it ends."""

    grace: Seconds = Field(default=600.0, gt=0)
    """Seconds that ranks have to save when the run is asked to stop."""

    @property
    def policies(self) -> tuple[str, str]:
        """Of steps that are not finite, and of spikes."""
        return self.nonfinite, self.spike
