"""The news of a run, and what everything that listens to it can hear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, in plain numbers (no tensors).

    Attributes:
        step: Steps of the run so far, this one included.
        steps: Steps of the whole run.
        stage: The stage's name.
        stage_step: Steps of the stage so far, this one included.
        stage_steps: Steps of the stage.
        tokens: Tokens trained on so far in the run.
        loss: Mean loss per token of this step's batch, in nats.
        grad_norm: Global gradient norm before clipping.
        lr: Learning rate of this step.
        tokens_per_s: Tokens of this step over its time, all ranks together.
        step_s: Seconds that the step took.
        data_s: Seconds of them in which this rank waited for its batches.
        losses: Mean per token and layer of each loss that mechanisms add, before its weight.
        tflops_per_s: 10^12 operations that the model needs for the step's documents (nothing that
            is computed again), over its time, all ranks together.
        mfu: Their share of what the GPUs could do at most; None where that is not known.
        context_bytes: What this rank sent to the other context ranks for it.
        context_wait_s: How long this rank's computation stood still for what they sent.
        imbalance: Attention of the busiest context rank over that of the mean one, in visible
            (query, key) pairs; None with one context rank.
        peak_bytes: Most that tensors took of this rank's GPU in this stage so far, in bytes; None
            on a CPU.
    """

    step: int
    steps: int
    stage: str
    stage_step: int
    stage_steps: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_s: float
    step_s: float
    data_s: float = 0.0
    losses: Mapping[str, float] = field(default_factory=dict)
    tflops_per_s: float = 0.0
    mfu: float | None = None
    context_bytes: int = 0
    context_wait_s: float = 0.0
    imbalance: float | None = None
    peak_bytes: int | None = None


class Sink:
    """Where news goes; every method does nothing here."""

    def run_started(self, info: Mapping[str, Any]) -> None:
        """The run or a further attempt begins.

        `info["stages"]`, a list of `{"name", "steps", "tokens"}`, lets the time that is left
        account for the length of the later stages.
        """

    def stage_started(self, name: str, index: int, info: Mapping[str, Any]) -> None:
        """A stage begins or goes on; `index` counts from 0."""

    def step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done."""

    def observed(self, step: int, layers: Sequence[Mapping[str, float]]) -> None:
        """What each layer's attention looks at, measured in a step."""

    def compared(self, step: int, values: Mapping[str, Any]) -> None:
        """The canary is over: context ranks beside one rank alone, after `step`."""

    def alarm(self, name: str, step: int, text: str) -> None:
        """A measurement that cannot be right; the run goes on."""

    def skipped(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        """A step was not applied, and the run goes on behind it; `loss` and norm may be NaN."""

    def rewound(self, step: int, to: int, sequences: int, reason: str) -> None:
        """Because of `step` the run goes back to the checkpoint at step `to`, 0: to its start.

        It goes on without the data between, of which it leaves out `sequences` more than before.
        """

    def evaluated(self, name: str, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """An evaluation took `seconds`; the plain numbers in `values` are shown and tracked."""

    def saving(self, step: int, stall_s: float) -> None:
        """A save has begun, for which training waited `stall_s`."""

    def saved(self, step: int, path: Path, seconds: float) -> None:
        """A checkpoint is complete, `seconds` after it was begun."""

    def restored(self, step: int, path: Path, seconds: float) -> None:
        """A checkpoint was loaded; the steps after `step`, if there were any, are lost."""

    def message(self, text: str) -> None:
        """Something to know."""

    def warning(self, text: str) -> None:
        """Something to act on, though the run goes on."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is complete; `summary` is what `render_summary` takes."""

    def stopped(self, step: int, reason: str) -> None:
        """The run ends before its time, after `step`."""

    def close(self) -> None:
        """Nothing follows."""


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers among an evaluation's values."""
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and v is not True}
