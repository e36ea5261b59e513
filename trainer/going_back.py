"""GoingBack: takes a run back to a checkpoint after a bad step, and leaves out the data since."""

from __future__ import annotations

from dataclasses import replace

from ..errors import CheckpointError, RunError
from .bad_steps import BadStep
from .checkpoint.agreement import on_first_rank
from .checkpoint.cursor import Cursor
from .checkpoint.folders import step_of
from .checkpoint.loader import Checkpoint, chosen, refuse_damaged
from .checkpoint.store import Store
from .recovery_settings import RecoverySettings
from .rewinds import Rewind, next_sample_after, read_rewinds, step_to_go_back_to, write_rewinds
from .run_directory import RunDirectory


class GoingBack:
    """The rewinds of a run, the same on all ranks.

    A crash at any moment ends in the same state: newer checkpoints are removed first, then the
    rewind is recorded. Without the record the run meets the bad step again, with it it goes on
    behind that step's data, from the same checkpoint either way.

    Args:
        directory: The run's folder; only rank 0 reads and writes there.
        store: The place of its checkpoints.
        settings: How far and how often.
    """

    def __init__(self, directory: RunDirectory, store: Store, settings: RecoverySettings) -> None:
        self._directory, self._store, self._settings = directory, store, settings
        self._rewinds = on_first_rank(lambda: read_rewinds(directory.rewinds))

    def where(self, cursor: Cursor) -> Cursor:
        """A checkpoint's cursor, behind the data that a rewind to it leaves out."""
        behind = next_sample_after(self._rewinds, cursor.stage, cursor.step)
        return cursor if behind is None else replace(cursor, next_sample=behind)

    def go_back(self, bad: BadStep, stage: int, begin: int) -> tuple[Checkpoint | None, Rewind]:
        """Make an older checkpoint the newest one. All ranks call it.

        Args:
            bad: The step because of which.
            stage: Index of its stage.
            begin: Step of the run at which the stage began.

        Returns:
            The checkpoint to go on from, None: the start of the run; and what was left out.

        Raises:
            RunError: The run went back too often.
            CheckpointError: There is nothing to go back to.
        """
        if len(self._rewinds) >= self._settings.max_rewinds:
            raise RunError(
                f"the run went back {len(self._rewinds)} times (recovery.max_rewinds) and now "
                f"{bad} is bad: {bad.reason}",
                "lower the learning rate or look at that step's data, then start again",
            )
        checkpoint = chosen(self._store, lambda names: self._choose(names, begin))
        if checkpoint is None and stage > 0:
            raise CheckpointError(
                f"{bad} is bad ({bad.reason}) and its stage has no checkpoint to go back to",
                f"restore the one at step {begin}, with which the stage began",
            )
        if checkpoint is not None:
            refuse_damaged(checkpoint, str(self._directory))
        at = Cursor() if checkpoint is None else checkpoint.cursor
        if at.stage != stage:
            at = replace(at, stage=stage, stage_step=0, next_sample=0)
        left_out = bad.next_sample - self.where(at).next_sample
        rewind = Rewind(bad.step, at.step, stage, bad.next_sample, left_out)
        self._rewinds.append(rewind)
        on_first_rank(lambda: self._leave(at.step))
        return checkpoint, rewind

    def _choose(self, names: list[str], begin: int) -> str | None:
        """The checkpoint to go back to."""
        steps = [step_of(name) for name in names]
        step = step_to_go_back_to(steps, begin, self._settings.back)
        return None if step is None else names[steps.index(step)]

    def _leave(self, step: int) -> None:
        """Remove the checkpoints that are newer, the newest first, and record the rewind."""
        for name in reversed(self._store.committed()):
            if step_of(name) > step:
                self._store.remove(name)
        write_rewinds(self._directory.rewinds, self._rewinds)
