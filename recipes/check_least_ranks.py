"""The rules of the fewest ranks: a range that begins where every stage can be laid out."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..trainer.gang_sizes import fits, misfit
from ..trainer.settings import RunSettings
from .fixes import either

_PATH = "ranks_at_least"


def check_least_ranks(run: RunSettings) -> Iterator[Problem]:
    """What is wrong with the fewest ranks that a run may go on with."""
    least, most = run.ranks_at_least, run.ranks
    if least is None:
        return
    if most is None:
        expected = "no such setting: without ranks it has no effect"
        yield Problem(_PATH, str(least), expected, "set ranks as well, or remove it")
    elif least > most:
        fix = f"{_PATH}: {most} or less, or ranks: {least} or more"
        yield Problem(_PATH, str(least), f"at most ranks ({most})", fix)
    else:
        yield from _check_layouts(run, least, most)


def _check_layouts(run: RunSettings, least: int, most: int) -> Iterator[Problem]:
    reasons = [
        f"stages.{index} ({stage.name}) needs {reason}"
        for index, stage in enumerate(run.stages)
        if (reason := misfit(stage, least))
    ]
    if not reasons:
        return
    below = next((ranks for ranks in range(least - 1, 0, -1) if fits(run, ranks)), None)
    above = next((ranks for ranks in range(least + 1, most + 1) if fits(run, ranks)), None)
    nearest = [ranks for ranks in (below, above) if ranks]
    fix = f"{_PATH}: {either(nearest)}" if nearest else "first mend what is wrong with ranks"
    expected = f"ranks for every stage; {'; '.join(reasons)}"
    yield Problem(_PATH, str(least), expected, fix)
