"""Clock: nodes that disagree about the time write events out of order and are refused by stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from .result import Result

CHECK = "clock"
_WARN_S = 2.0
_FAIL_S = 60.0
"""Some object stores refuse requests that are minutes off."""

_ROUNDS = 5


class Skew(NamedTuple):
    """How far a node's clock is ahead.

    Attributes:
        ahead_s: Of the driver's, corrected for half of the round trip.
        doubt_s: How far that may be off.
    """

    ahead_s: float
    doubt_s: float


def probe(ask: Callable[[], float]) -> Skew:
    """Compare this clock with another: the quickest of some round trips counts.

    Args:
        ask: Returns the other clock's time, in unix seconds.
    """
    best = Skew(0.0, float("inf"))
    for _ in range(_ROUNDS):
        begin_s, mark = time.time(), time.monotonic()
        other_s = ask()
        doubt_s = (time.monotonic() - mark) / 2
        if doubt_s < best.doubt_s:
            best = Skew(begin_s + doubt_s - other_s, doubt_s)
    return best


def judge(nodes: Mapping[str, Skew]) -> Iterator[Result]:
    """One result per node; what may be due to the round trip is not held against it."""
    for node, skew in nodes.items():
        surely_s = max(0.0, abs(skew.ahead_s) - skew.doubt_s)
        where = "ahead" if skew.ahead_s > 0 else "behind"
        found = f"{abs(skew.ahead_s):.3g} s {where} (+- {skew.doubt_s:.2g} s)"
        expected = f"within {_WARN_S:g} s of the driver's"
        if surely_s <= _WARN_S:
            yield Result(node, CHECK, "ok", found, expected)
            continue
        level = "fail" if surely_s > _FAIL_S else "warn"
        yield Result(node, CHECK, level, found, expected, "let chrony or NTP set the node's clock")
