"""Result: what one check found on one node."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


FAIL_SHARE = 0.2
"""Of what is expected: a node that is slower than this holds up all others too much to be used.

Where the expectation is the median of alike nodes, of two it is their mean: then one of them fails
only if the other is more than nine times as fast, which another process on its cores does not do.
"""


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


def median_of_alike(values: Mapping[str, float], kinds: Mapping[str, int]) -> dict[str, float]:
    """For each node the median over those of its kind."""
    of_kind: dict[int, list[float]] = {}
    for node, value in values.items():
        of_kind.setdefault(kinds[node], []).append(value)
    return {node: statistics.median(of_kind[kinds[node]]) for node in values}


def rate(value: float) -> str:
    """Bytes per second for people: `1.2 GB/s`."""
    return f"{value / 1e9:.3g} GB/s" if value >= 1e8 else f"{value / 1e6:.3g} MB/s"


def size(value: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    return f"{value / 2**30:,.1f} GiB" if value >= 2**29 else f"{value / 2**20:,.1f} MiB"
