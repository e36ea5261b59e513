"""What a stage will run, from its settings alone: steps, micro-batches, data-parallel ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .settings import RunSettings, StageSettings


@dataclass(frozen=True)
class StagePlan:
    """The arithmetic of one stage.

    Attributes:
        steps: Optimizer steps.
        sequences_per_step: Sequences per optimizer step over all ranks.
        data: Data-parallel ranks.
        micro_batches: Micro-batches per step on each data-parallel rank.
    """

    steps: int
    sequences_per_step: int
    data: int
    micro_batches: int


def model_ranks(stage: StageSettings) -> int:
    """Ranks that hold one replica: TP x PP x CP."""
    return stage.parallel.tensor * stage.parallel.pipeline * stage.parallel.context


def run_ranks(run: RunSettings, gpus: int) -> int:
    """Processes of a run: as the recipe says, one per GPU, or the fewest that fit on a CPU."""
    return run.ranks or gpus or math.lcm(*map(model_ranks, run.stages))


def plan_stage(stage: StageSettings, ranks: int) -> StagePlan:
    """The stage's arithmetic; call only on a recipe that passed its checks."""
    data = ranks // model_ranks(stage)
    sequences = stage.batch_tokens // stage.length
    return StagePlan(
        steps=-(-stage.tokens // stage.batch_tokens),
        sequences_per_step=sequences,
        data=data,
        micro_batches=sequences // (data * stage.micro_batch),
    )
