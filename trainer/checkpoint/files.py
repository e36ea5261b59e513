"""Files: those of one checkpoint, wherever it lies."""

from __future__ import annotations

from pathlib import Path

from .local_store import LocalStore
from .store import Store


class CheckpointFiles:
    """Reads the files of one folder of a store.

    Args:
        store: The place of the checkpoints.
        folder: The checkpoint's name there.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder

    @classmethod
    def of(cls, path: Path) -> CheckpointFiles:
        """Those of a folder of this machine."""
        path = path.absolute()
        return cls(LocalStore(path.parent), path.name)

    def __str__(self) -> str:
        """Where they are, as a user would say it."""
        return f"{self.store}/{self.folder}"

    def read(self, name: str, first: int = 0, last: int | None = None) -> bytes:
        """Bytes `[first, last)` of a file.

        Raises:
            CheckpointError: It cannot be read, or is shorter.
        """
        return self.store.read(self.folder, name, first, last)

    def sizes(self) -> dict[str, int]:
        """Names and bytes of all files."""
        return self.store.files(self.folder)
