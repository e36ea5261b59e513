"""Saves: the checkpoints of a run at work, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checkpoint.agreement import on_first_rank
from .checkpoint.cursor import Cursor
from .checkpoint.loader import Checkpoint, newest, refuse_damaged
from .checkpoint.saver import Outcome, Saver, State
from .checkpoint.store import open_store
from .engine.checkpoint import model_dtype, state_pieces, state_steps
from .engine.engine import Engine
from .observe.observer import Observer
from .run_directory import RunDirectory
from .settings import RunSettings


class Saves:
    """Finds, begins and reports checkpoints. All ranks make it, and call it alike.

    Args:
        directory: The run's folder.
        run: Its settings.
        observer: Told how each save ends.
    """

    def __init__(self, directory: RunDirectory, run: RunSettings, observer: Observer) -> None:
        self.store = open_store(run.checkpoint.where, directory.path)
        self._saver = Saver(self.store, run.checkpoint)
        self._observer, self._run = observer, str(directory)
        self.last = ""
        """Where the newest checkpoint is."""

    def found(self) -> Checkpoint | None:
        """The newest checkpoint, every byte of which is what was written.

        What an attempt that was killed left half-written is removed, and what it did not come to
        remove; and the pointer is set right.

        Raises:
            CheckpointError: The newest is damaged.
            RunError: The store is another run's.
        """
        on_first_rank(self.store.claim)
        checkpoint = newest(self.store, self._run)
        if checkpoint is not None:
            refuse_damaged(checkpoint, self._run)
            self.last = str(checkpoint.files)
        self.going_on_from(checkpoint)
        if problem := on_first_rank(lambda: self._tidy(checkpoint)):
            self._observer.warning(f"leftovers of an earlier attempt stay: {problem}")
        return checkpoint

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, which this attempt has written."""
        return newest(self.store)

    def going_on_from(self, checkpoint: Checkpoint | None) -> None:
        """The run stands at this checkpoint: it need not be saved again."""
        self._saver.committed = None if checkpoint is None else checkpoint.cursor.step

    def save(self, engine: Engine, cursor: Cursor, info: Mapping[str, Any], *, wait: bool) -> None:
        """Begin to save, after the save before it has ended; or save.

        Raises:
            CheckpointError: Too many saves in a row have failed, or this one was waited for.
        """
        begun = time.monotonic()
        self.settle()

        def state() -> State:
            return State(state_pieces(engine), model_dtype(engine), state_steps(engine))

        self._saver.save(state, cursor, info, wait=wait)
        self._observer.saving(cursor.step, time.monotonic() - begun)
        if wait:
            outcome = self.settle()
            if outcome is not None and outcome.error is not None:
                raise outcome.error

    def poll(self) -> None:
        """Tell how the save in flight ended, if it has."""
        self._tell(self._saver.poll())

    def settle(self) -> Outcome | None:
        """Wait for the save in flight, and tell how it ended."""
        outcome = self._saver.wait()
        self._tell(outcome)
        return outcome

    def close(self) -> None:
        """Give the save in flight, if there is one, the time to end; the run is over."""
        self._saver.close()

    def _tidy(self, newest: Checkpoint | None) -> str:
        """Remove what a killed attempt left; on rank 0 only. Returns what cannot be removed."""
        try:
            for folder in self.store.unfinished():
                self.store.remove(folder)
            if newest is not None:
                self.store.point(newest.name)
                self._saver.prune()
        except CheckpointError as error:
            return error.what
        return ""

    def _tell(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        step = outcome.cursor.step
        if outcome.error is not None:
            self._observer.alarm("checkpoint", step, f"not saved: {outcome.error}")
            return
        self.last = f"{self.store}/{outcome.name}"
        self._observer.saved(step, Path(self.last), outcome.seconds)
        if outcome.warning:
            self._observer.warning(f"after the checkpoint of step {step}: {outcome.warning}")
