"""GangSizes: the numbers of ranks that a run can have. No torch here."""

from __future__ import annotations

from .plan import model_ranks
from .settings import RunSettings, StageSettings


def misfit(stage: StageSettings, ranks: int) -> str:
    """What a stage needs and so many ranks do not give it; empty if they fit."""
    replica = model_ranks(stage)
    if ranks % replica:
        return f"a multiple of {replica} (tensor x pipeline x context)"
    data = ranks // replica
    if stage.batch_tokens % (stage.length * stage.micro_batch * data):
        sequences = stage.batch_tokens // stage.length
        batches = f" in micro-batches of {stage.micro_batch}" if stage.micro_batch > 1 else ""
        return f"sequences per step that {data} data-parallel ranks share{batches}, not {sequences}"
    replicas, expert = data * stage.parallel.context, stage.parallel.expert
    if replicas % expert:
        return f"data x context ranks that parallel.expert ({expert}) divides, not {replicas}"
    return ""


def fits(run: RunSettings, ranks: int) -> bool:
    """Whether every stage can be laid out on so many ranks."""
    return not any(misfit(stage, ranks) for stage in run.stages)


def gang_sizes(run: RunSettings) -> tuple[int, ...]:
    """The numbers of ranks that a cluster may start a run with, the largest first.

    Args:
        run: A run that passed its checks and says its ranks.
    """
    most = run.ranks or 0
    least = run.ranks_at_least or most
    return tuple(ranks for ranks in range(most, least - 1, -1) if ranks and fits(run, ranks))
