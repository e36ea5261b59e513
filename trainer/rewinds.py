"""Rewinds: the times that a run went back, so that a crash afterwards changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import RunError
from .run_directory import write_atomically


@dataclass(frozen=True)
class Rewind:
    """One time that a run went back.

    Attributes:
        bad: The step that was bad.
        to: The step of the checkpoint that the run went on from; 0 without one.
        stage: Index of the stage of both.
        next_sample: The sequence of the stage that it went on with.
        sequences: How many were left out.
    """

    bad: int
    to: int
    stage: int
    next_sample: int
    sequences: int


def read_rewinds(path: Path) -> list[Rewind]:
    """All rewinds of a run, in their order.

    Raises:
        RunError: The file is damaged; without it the run would go on with the wrong data.
    """
    try:
        return [Rewind(**record) for record in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read: {error}",
            "restore it; if it is deleted, the run trains on data that it had left out",
        ) from error


def write_rewinds(path: Path, rewinds: Sequence[Rewind]) -> None:
    """Record them durably."""
    write_atomically(path, json.dumps([asdict(rewind) for rewind in rewinds], indent=1) + "\n")


def forget_rewinds_after(path: Path, step: int) -> None:
    """Forget the rewinds to later checkpoints, which a run that goes on from `step` leaves."""
    rewinds = read_rewinds(path)
    kept = [rewind for rewind in rewinds if rewind.to <= step]
    if kept != rewinds:
        write_rewinds(path, kept)


def next_sample_after(rewinds: Sequence[Rewind], stage: int, step: int) -> int | None:
    """The sequence to go on with from the checkpoint at `step`; None: the one it names itself.

    The last rewind to it decides. One that went further back later has replaced the checkpoint:
    those before it do not concern the new one.
    """
    for rewind in reversed(rewinds):
        if rewind.to < step:
            return None
        if (rewind.to, rewind.stage) == (step, stage):
            return rewind.next_sample
    return None


def step_to_go_back_to(steps: Sequence[int], begin: int, back: int) -> int | None:
    """The checkpoint that a rewind goes back to.

    Args:
        steps: Of the checkpoints that there are.
        begin: Step of the run at which the stage began.
        back: Checkpoints to go back; where there are fewer, the oldest.

    Returns:
        Its step; None: there is none, so that the stage starts again.
    """
    newest_first = sorted((step for step in steps if step >= begin), reverse=True)
    return newest_first[:back][-1] if newest_first else None
