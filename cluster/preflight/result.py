"""Result: what one check found on one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Result:
    """What one check found on one node.

    Attributes:
        node: Its name; `cluster` for what belongs to no node.
        check: What was looked at.
        level: A node that has a `fail` gets no ranks.
        found: What is there.
        expected: What should be.
        fix: What to do about it; empty where nothing is wrong.
    """

    node: str
    check: str
    level: Level
    found: str
    expected: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.check}: found {self.found}; expected {self.expected}"
        return line + (f"; fix: {self.fix}" if self.fix else "")


def rate(value: float) -> str:
    """Bytes per second for people: `1.2 GB/s`."""
    return f"{value / 1e9:.3g} GB/s" if value >= 1e8 else f"{value / 1e6:.3g} MB/s"


def size(value: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    return f"{value / 2**30:,.1f} GiB" if value >= 2**29 else f"{value / 2**20:,.1f} MiB"
