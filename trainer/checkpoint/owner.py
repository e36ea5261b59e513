"""The owner of a store: one run, so that two runs never write to one place."""

from __future__ import annotations

import json
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import RunError
from ..run_directory import write_atomically
from .urls import redacted

OWNER = "OWNER"
"""The file in a store's root that names its run."""

_IDENTITY = "store.id"


@dataclass(frozen=True)
class Owner:
    """A run, as other runs see it.

    The host is for people: a run on a shared disk goes on where there is room.

    Attributes:
        run: The run directory, absolute.
        host: Where the store was claimed.
        id: Drawn once per run directory: the same path on two hosts is two runs.
    """

    run: str
    host: str
    id: str

    @classmethod
    def of(cls, run_dir: Path) -> Owner:
        """The owner that a run directory stands for; its id is drawn when it is first needed.

        Raises:
            OSError: The run directory cannot be read or written.
        """
        file = run_dir / _IDENTITY
        if not file.is_file():
            write_atomically(file, uuid.uuid4().hex + "\n")
        return cls(str(run_dir), socket.gethostname(), file.read_text("utf-8").strip())

    @property
    def content(self) -> bytes:
        """What the file holds."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def demand(self, found: bytes, root: str) -> None:
        """Refuse a store of another run.

        Args:
            found: The content of the store's owner file.
            root: Of the store.

        Raises:
            RunError: It is another's, or nobody can tell whose.
        """
        place = redacted(root)
        try:
            other = Owner(**json.loads(found))
        except (ValueError, TypeError):
            raise RunError(
                f"the file {OWNER} in {place} cannot be read, so nobody knows whose "
                "checkpoints are there",
                "give another checkpoint.where, or delete that file if no other run uses it",
            ) from None
        if (other.id, other.run) != (self.id, self.run):
            raise RunError(
                f"{place} belongs to another run: {other.run} on {other.host}",
                f"give another checkpoint.where; delete {place}/{OWNER} if that run was moved "
                "here or is gone",
            )
