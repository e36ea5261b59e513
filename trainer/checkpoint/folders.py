"""Names of folders: what a folder of a store is, as far as its name says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MARKER = "COMMITTED"
"""The file that is written last: what has it is complete."""

LATEST = "latest"
"""The pointer to the newest complete checkpoint, for people; nothing of ours trusts it."""

Kind = Literal["committed", "unfinished", "aside", "damaged"]
"""What a folder is. damaged: it has the name of a complete checkpoint, and no marker."""

_NAME = re.compile(r"step-([0-9]+)(?:\.([a-z]+)-([0-9]+))?")


@dataclass(frozen=True)
class FolderName:
    """The parts of a folder's name: `step-00000010`, `step-00000010.tmp-1`.

    Attributes:
        step: Steps done in the run.
        suffix: `tmp`, `try`, `aside`; empty for a committed one.
        number: Of the attempt, from 1; 0 without a suffix.
    """

    step: int
    suffix: str = ""
    number: int = 0

    def __str__(self) -> str:
        """The name itself."""
        plain = f"step-{self.step:08d}"
        return f"{plain}.{self.suffix}-{self.number}" if self.suffix else plain

    @property
    def order(self) -> tuple[int, int]:
        """Oldest first."""
        return self.step, self.number


def parse(name: str) -> FolderName | None:
    """The parts of a name; None where it is not one of ours."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    parts = FolderName(int(found[1]), found[2] or "", int(found[3] or 0))
    return parts if str(parts) == name else None


def step_of(name: str) -> int:
    """The step of a folder that is ours.

    Raises:
        ValueError: It is not.
    """
    found = parse(name)
    if found is None:
        raise ValueError(f"{name!r} is no folder of a checkpoint")
    return found.step
