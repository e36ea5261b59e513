"""Reference: a checkpoint as a user names it: `runs/a@200`, or `runs/a` for its newest one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..run_directory import RunDirectory
from ..settings import RunSettings
from .files import CheckpointFiles
from .store import Store, open_store
from .survey import committed_at


@dataclass(frozen=True)
class RunStore:
    """A run's folder, settings and checkpoints."""

    directory: RunDirectory
    settings: RunSettings
    store: Store

    @classmethod
    def of(cls, run_dir: Path) -> RunStore:
        """Those of a folder.

        Raises:
            RunError: It holds no run, or a package is missing.
        """
        directory = RunDirectory(run_dir)
        settings = directory.load_settings()
        return cls(directory, settings, open_store(settings.checkpoint.where, directory.path))


@dataclass(frozen=True)
class Reference:
    """A run and a step; None: its newest checkpoint."""

    run_dir: Path
    step: int | None = None

    @classmethod
    def parse(
        cls, text: str, other: Reference | None = None, folder: Callable[[str], Path] = Path
    ) -> Reference:
        """What a user typed.

        Args:
            text: `RUN`, `RUN@STEP`, or the step alone.
            other: The reference whose run a step alone is of.
            folder: Of a run, by what the user calls it.
        """
        if other is not None and text.isdecimal():
            return cls(other.run_dir, int(text))
        path, at, step = text.rpartition("@")
        if at and path and step.isdecimal():
            return cls(folder(path), int(step))
        return cls(folder(text))

    def find(self) -> tuple[RunStore, CheckpointFiles]:
        """The run, and the checkpoint's files.

        Raises:
            LongspanError: There is no such run or checkpoint.
        """
        run = RunStore.of(self.run_dir)
        return run, committed_at(run.store, self.step)
