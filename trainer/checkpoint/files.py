"""Files: those of one checkpoint."""

from __future__ import annotations

from pathlib import Path

from ...errors import CheckpointError


class FolderFiles:
    """The files of a checkpoint in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str, first: int = 0, last: int | None = None) -> bytes:
        """Bytes `[first, last)` of a file.

        Raises:
            CheckpointError: It cannot be read.
        """
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(first)
                return file.read(-1 if last is None else last - first)
        except OSError as error:
            raise CheckpointError(
                f"{name} of checkpoint {self.folder} cannot be read: {error.strerror or error}",
                "give a complete checkpoint folder, such as runs/NAME/checkpoints/step-N",
            ) from error
