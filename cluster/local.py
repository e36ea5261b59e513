"""Local runs: recorded like those on a cluster, so that the same verbs find them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LongspanError
from ..trainer.run_directory import RunDirectory
from .registry import Record, Registry, new_id


@contextmanager
def recorded(recipe: str, run_dir: Path) -> Iterator[None]:
    """Keep a record of a run that is trained here; whatever goes wrong with that, it is trained.

    Args:
        recipe: The name of the recipe.
        run_dir: The run's folder.
    """
    record = None
    # Of the ranks that torchrun starts, the first one does it.
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError, LongspanError):
            record = _record(recipe, RunDirectory(run_dir))
    try:
        yield
    finally:
        if record is not None and not record.directory.is_run():
            with suppress(OSError):
                Registry().forget(record.id)


def _record(recipe: str, directory: RunDirectory) -> Record | None:
    """A new record; None where the folder has one."""
    registry = Registry()
    if registry.of_folder(directory.path) is not None:
        return None
    created = directory.read_environment().get("created", time.time())
    record = Record(new_id(recipe), recipe, float(created), str(directory.path))
    registry.write(record, new=True)
    return record
