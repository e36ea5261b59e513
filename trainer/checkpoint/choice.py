"""Choice: which checkpoint a launch goes on from, looked at before any rank is started."""

from __future__ import annotations

from ...errors import RunError
from ..rewinds import forget_rewinds_after
from ..run_directory import RunDirectory
from ..settings import RunSettings
from .files import CheckpointFiles
from .folders import step_of
from .manifest import read_manifest
from .store import Store


def newest_step(store: Store) -> int | None:
    """The step of the newest committed checkpoint, for messages."""
    names = store.committed()
    return step_of(names[-1]) if names else None


def set_aside_newer(directory: RunDirectory, run: RunSettings, store: Store, step: int) -> None:
    """Make the checkpoint of `step` the newest; newer ones are kept, and never chosen again.

    What the run says of later steps (rewinds, reports of stages) goes with them.

    Raises:
        RunError: There is no such checkpoint; nothing was changed.
        CheckpointError: It cannot be read; nothing was changed.
    """
    names = store.committed()
    steps = [step_of(name) for name in names]
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise RunError(
            f"{store} has no complete checkpoint of step {step}", f"there are those of: {known}"
        )
    files = CheckpointFiles(store, names[steps.index(step)])
    stage = read_manifest(files).cursor.stage
    for name in reversed(names):
        if step_of(name) > step:
            store.set_aside(name)
    forget_rewinds_after(directory.rewinds, step)
    for later in run.stages[stage:]:
        (directory.evaluations / f"{later.name}.json").unlink(missing_ok=True)


def refuse_complete(directory: RunDirectory, step: int | None) -> None:
    """Refuse to go back in a run that is over.

    Raises:
        RunError: A step is asked for.
    """
    if step is not None:
        raise RunError(
            f"{directory} is complete: there is nothing to go on with from step {step}",
            f"leave out --from, or delete {directory.complete.name} there to train its end again",
        )
