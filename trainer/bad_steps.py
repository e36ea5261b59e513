"""BadSteps: what a run does about steps that are not finite or spike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import RunError
from .recovery_settings import RecoverySettings


@dataclass(frozen=True)
class BadStep:
    """A step that no rank applied.

    Attributes:
        step: Its number in the run.
        stage: The stage's name.
        stage_step: Its number there.
        next_sample: The sequence of the stage that follows its last one.
        reason: What is bad.
        loss: Mean loss per token; may be NaN.
        grad_norm: Of all gradients, before clipping; may be NaN.
    """

    step: int
    stage: str
    stage_step: int
    next_sample: int
    reason: Literal["not finite", "spike"]
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        return (
            f"step {self.step} (stage {self.stage}, step {self.stage_step}; loss {self.loss:.4g}, "
            f"gradient norm {self.grad_norm:.4g})"
        )


class BadSteps:
    """Decides what follows a bad step. All ranks read the same sums, so all decide alike.

    Args:
        settings: The policies.
        in_a_row: The steps skipped just before, from a checkpoint.
    """

    def __init__(self, settings: RecoverySettings, in_a_row: Iterable[int] = ()) -> None:
        self._settings = settings
        self.in_a_row = list(in_a_row)

    def applied(self) -> None:
        """A step was good."""
        self.in_a_row.clear()

    def decide(self, bad: BadStep) -> Literal["skip", "rewind"]:
        """What follows a step.

        Raises:
            RunError: The run ends here: by its policy, or after too many skips in a row.
        """
        settings = self._settings
        policy = settings.nonfinite if bad.reason == "not finite" else settings.spike
        if policy == "rewind":
            return "rewind"
        if policy != "skip":
            raise RunError(
                f"the loss or a gradient of {bad} is not finite; no rank applied it",
                "lower the learning rate or look at that step's data, then start again: the "
                "newest checkpoint is from before it; recovery.nonfinite can skip such steps",
            )
        self.in_a_row.append(bad.step)
        if len(self.in_a_row) > settings.max_skips:
            raise RunError(
                f"{len(self.in_a_row)} steps in a row were skipped, {self.in_a_row[0]} to "
                f"{bad.step}: recovery.max_skips is {settings.max_skips}. The last one is {bad}: "
                f"{bad.reason}",
                "lower the learning rate or look at the data of these steps, then start again",
            )
        return "skip"
