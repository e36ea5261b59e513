"""What a run does about bad steps, stops and lost ranks. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Seconds, Settings


class RetrySettings(Settings):
    """How often a cluster may start a run's ranks again; a user's mistake ends the run at once."""

    infrastructure: int = Field(default=10, ge=0)
    """Times after a lost node, a dead or a hanging rank; one more ends the run."""

    preemption: int | None = Field(default=None, ge=0)
    """Times after nodes that were taken back with a notice; left out: as often as it happens."""


class HangSettings(Settings):
    """How long a rank on a cluster may be at one thing before that is a hang.

    What it has done before may take ten times the longest that it took, in this and in earlier
    attempts; a save no less than `first`, as it may wait for storage, nor what each attempt may
    have to compile kernels for: a stage's canary, first step and first evaluation."""

    least: Seconds = Field(default=300.0, gt=0)
    """Seconds that anything may take, however short it was before."""

    first: Seconds = Field(default=1800.0, gt=0)
    """Seconds for what was not done before: a first step, which compiles kernels, or a save."""

    data: Seconds = Field(default=7200.0, gt=0)
    """Seconds for opening a stage, which may tokenise its data, and for a first evaluation or
    proof."""


class RecoverySettings(Settings):
    """Bad steps, the time to save at a stop, and on a cluster hangs, waits and new starts."""

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

    retries: RetrySettings = RetrySettings()

    wait: Seconds = Field(default=300.0, ge=0)
    """Seconds that a cluster's driver waits for nodes; then fewer ranks have to do, where they
    may, or the run ends. A cluster that grows needs as long as its nodes take to start."""

    hang: HangSettings = HangSettings()

    @property
    def policies(self) -> tuple[str, str]:
        """Of steps that are not finite, and of spikes."""
        return self.nonfinite, self.spike
