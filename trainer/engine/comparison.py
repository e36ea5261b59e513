"""Comparison: what context ranks computed together, beside what each of them computed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...attention.pairs import budget
from ...errors import RunError
from ..settings import RunSettings, StageSettings

Pair = tuple[float, float]
"""Together, and alone."""


@dataclass(frozen=True)
class Tolerance:
    """How far rounding may take two passes apart, relative to the pass alone.

    Attributes:
        loss: Of a mean loss.
        gradient: Norm of the difference of the gradients, over their norm.
        chosen: The same where keys or experts are chosen: a score that rounds the other way is
            another choice.
    """

    loss: float
    gradient: float
    chosen: float


# 12 layers of 128 channels on 1K tokens, weights of 0.02 and 0.1, differ by at most 7e-7, 2e-6 and
# 7e-4 in fp32; in bf16 by 2e-3, 2e-2 and 7e-2, or 2e-1 with experts. Without the keys of other
# ranks gradients differ by 7e-1, with positions off by one on a rank by 3e-2 to 3e-1.
TOLERANCES = {
    "fp32": Tolerance(loss=1e-4, gradient=1e-4, chosen=2e-2),
    "bf16": Tolerance(loss=1e-2, gradient=5e-2, chosen=4e-1),
}


@dataclass(frozen=True)
class Comparison:
    """Two passes over the same tokens.

    Attributes:
        exchange: That of the context ranks.
        tokens: Of each data rank.
        weights: Sums of the loss weights, over all data ranks.
        losses: By name the means of the model's `loss` and of those that mechanisms add.
        grad_norm: Norms of the mean loss's gradient.
        grad_difference: Norm of the difference of the gradients, over that of the gradient alone.
        seconds: That both passes took.
    """

    exchange: str
    tokens: int
    weights: Pair
    losses: dict[str, Pair]
    grad_norm: Pair
    grad_difference: float
    seconds: float

    @property
    def values(self) -> dict[str, Any]:
        """All of it, in plain numbers for the log."""
        losses = dict(self.losses)
        together, alone = losses.pop("loss")
        return {
            "exchange": self.exchange,
            "tokens": self.tokens,
            "loss": together,
            "loss_alone": alone,
            "grad_norm": self.grad_norm[0],
            "grad_norm_alone": self.grad_norm[1],
            "grad_difference": self.grad_difference,
            "losses": {name: list(pair) for name, pair in losses.items()},
            "seconds": self.seconds,
        }

    def demand(self, run: RunSettings, stage: StageSettings) -> None:
        """Accept the two passes as one but for rounding.

        A pass alone that is not finite proves nothing about context ranks, and the first step says
        so.

        Args:
            run: The run's settings.
            stage: The stage's.

        Raises:
            RunError: They differ.
        """
        alone = [self.grad_norm[1], *(pair[1] for pair in self.losses.values())]
        wrong = [*self._differences(TOLERANCES[run.precision], _chooses(run, stage))]
        if not wrong or not all(map(math.isfinite, alone)):
            return
        parallel, at = stage.parallel, f"stages.{run.stages.index(stage)}.parallel"
        (loss, loss_alone), (norm, norm_alone) = self.losses["loss"], self.grad_norm
        raise RunError(
            f"{at}: {parallel.context} context ranks (exchange {self.exchange}, layout "
            f"{parallel.layout}) do not compute what each of them computes alone on "
            f"{self.tokens:,} tokens of the first micro-batch: loss {loss:.6g} and alone "
            f"{loss_alone:.6g}, gradient norm {norm:.6g} and alone {norm_alone:.6g}, difference "
            f"of the gradients {self.grad_difference:.3g} of it; beyond rounding: "
            + ", ".join(wrong),
            f"another {at}.exchange or {at}.layout, or {at}.context: 1; code of the run that was "
            f"changed is the usual cause. {at}.canary: false trains without the comparison",
        )

    def _differences(self, most: Tolerance, chosen: bool) -> Iterator[str]:
        """What is not equal, in words."""
        together, alone = self.weights
        if together != alone:
            yield f"sum of loss weights ({together:.0f} and {alone:.0f})"
        for name, (together, alone) in self.losses.items():
            # Not finite is not within.
            if not abs(together - alone) <= most.loss * abs(alone):
                yield f"{name} ({together:.6g} and {alone:.6g}, tolerance {most.loss:g})"
        tolerance = most.chosen if chosen else most.gradient
        if not self.grad_difference <= tolerance:
            yield f"gradient (tolerance {tolerance:g})"


def _chooses(run: RunSettings, stage: StageSettings) -> bool:
    """Whether a last bit can decide which keys, or which experts, a token meets."""
    mechanisms = stage.attention.mechanisms(run.model.layers)
    return run.model.moe is not None or any(budget(kind) is not None for kind in mechanisms)
