"""Store: the place of a run's checkpoints; what is not committed is never taken for complete."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .folders import Kind
from .local_store import LocalStore
from .urls import is_url

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Store(Protocol):
    """Folders of checkpoints at one place.

    A save is `begin`, a `write` per file from any rank, and `commit`; rank 0 does all but the
    writing. A process may die between any two operations of any of them: `committed` has a
    checkpoint exactly when all of it is there. No method looks at a clock.

    Every method but `point` raises CheckpointError where the place fails it, and nothing else but
    the RunError of `claim`.
    """

    root: str
    """The place, as a path or a URL; may hold secrets, so print `str(store)` instead."""

    def __str__(self) -> str:
        """The place without secrets."""
        ...

    def claim(self) -> None:
        """Make the place this run's; `begin` does it where nobody did.

        Raises:
            RunError: It is another run's.
        """
        ...

    def begin(self, step: int) -> str:
        """The name of a new empty folder for an attempt to save `step`."""
        ...

    def write(self, folder: str, name: str, parts: Iterable[Buffer]) -> None:
        """Write a new file from its parts. It is durable when this returns."""
        ...

    def read(self, folder: str, name: str, first: int = 0, last: int | None = None) -> bytes:
        """The bytes `first` to `last` of a file, or to its end. Shorter files are an error."""
        ...

    def size(self, folder: str, name: str) -> int:
        """The bytes of a file."""
        ...

    def files(self, folder: str) -> dict[str, int]:
        """Names and sizes of a folder's files."""
        ...

    def commit(self, folder: str, step: int, marker: bytes) -> str:
        """Make an attempt the checkpoint of `step`; what it holds is never changed again.

        Args:
            folder: The attempt; all of its files are written.
            step: What it is of.
            marker: Content of the marker, such as the manifest's hash.

        Returns:
            The folder's name from now on.
        """
        ...

    def point(self, folder: str) -> None:
        """Name a committed folder in the pointer; without it nothing is lost: it never raises."""
        ...

    def listing(self) -> dict[str, Kind]:
        """Every folder of a checkpoint by its name, and what it is; oldest first."""
        ...

    def committed(self) -> list[str]:
        """The complete ones, oldest first."""
        ...

    def unfinished(self) -> list[str]:
        """Attempts that were left behind, and what a removal left."""
        ...

    def remove(self, folder: str) -> None:
        """Delete a folder; one that is half removed is never complete."""
        ...

    def set_aside(self, folder: str) -> str:
        """Keep a folder that nobody shall load or remove. Returns its name from now on."""
        ...

    def free(self) -> int | None:
        """Bytes that can still be written; None where nobody knows."""
        ...


def open_store(where: str, run_dir: Path) -> Store:
    """The store of a run. Nothing is made or written yet.

    Args:
        where: As in `checkpoint.where`: a path, relative to the run's folder, or a URL.
        run_dir: The run's folder. Its lock is enough for what lies in it; any other place gets
            an owner file.

    Raises:
        RunError: A package is missing that the URL needs.
    """
    run_dir = Path(run_dir).expanduser().absolute()
    if where.startswith("file://"):
        where = where.removeprefix("file://")
    if is_url(where):
        from .object_store import ObjectStore

        return ObjectStore(where, run_dir)
    root = run_dir / Path(where).expanduser()
    inside = root.resolve().is_relative_to(run_dir.resolve())
    return LocalStore(root, None if inside else run_dir)
