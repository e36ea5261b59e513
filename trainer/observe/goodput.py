"""Goodput: where the wall time of a run went, over all its attempts, read from its events.

The events are walked in order. Time that passes between two of them is unexplained until an event
says what it was: a step, a save or an evaluation takes its own seconds out of it, and the marks
between (a launch, the start of a stage, an end) name whatever is left. So every second is in one
bucket, none twice. The clock is that of the events and never goes back here: where it did, no time
passes until it has caught up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..failure import COMPLETE, STOPPED
from .events import read_events

BUCKETS = {
    "productive": "steps that count in the end",
    "recomputed": "steps that were skipped, or lost in a restart or a rewind",
    "save": "training waited for a checkpoint",
    "restore": "a checkpoint was loaded",
    "start_up": "from a launch, or between stages, to the first step",
    "data": "steps waited for their batches",
    "evaluation": "held-out loss and the proof of context",
    "hang": "an attempt was silent for longer than a step before it ended",
    "queue": "waiting for machines",
    "down": "between two attempts",
    "other": "ends of attempts, and what no event explains",
}
"""The names of the buckets and what is in them; all but the first are losses."""

_TICKS = 1_000_000  # integers add up exactly, in any order
_MOST_S = 1e12
_RECENT_STEPS = 101


@dataclass
class Attempt:
    """One launch of the run.

    Attributes:
        number: 1, 2, ...
        begun: Its first event, in unix seconds.
        start_up_s: From its launch, and between its stages, to a first step, less restores.
        steps: Steps that it reported.
        end: How it ended: complete, stopped, failed, interrupted; None where nothing says so.
        reason: What it failed of, in one line.
    """

    number: int
    begun: float
    start_up_s: float = 0.0
    steps: int = 0
    end: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Goodput:
    """Where a run's time went.

    Attributes:
        wall_s: From the run's first event to its last.
        seconds: Of every bucket; they add up to `wall_s`.
        attempts: The launches.
    """

    wall_s: float
    seconds: Mapping[str, float]
    attempts: tuple[Attempt, ...] = ()

    @property
    def share(self) -> float | None:
        """Productive time over wall time; None when no time has passed."""
        return self.seconds["productive"] / self.wall_s if self.wall_s > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        seconds = {name: round(value, 6) for name, value in self.seconds.items()}
        return {
            "wall_s": round(self.wall_s, 6),
            "share": self.share,
            "seconds": seconds,
            "attempts": len(self.attempts),
        }


def measure_goodput(events: Iterable[Mapping[str, Any]], running: bool = False) -> Goodput:
    """Put every second of a run into one bucket.

    Args:
        events: All events of the run in the order of the file.
        running: Whether the newest attempt is still at work: then what it has not reported yet is
            no loss.
    """
    sweep = _Sweep()
    for event in events:
        sweep.see(event)
    return sweep.result(running)


def goodput_so_far(events: Path) -> Goodput:
    """The goodput of the run that this process works on, up to now.

    Args:
        events: Its events.jsonl.
    """
    sweep, last = _Sweep(), 1
    for event in read_events(events):
        sweep.see(event)
        last = event.get("attempt", last)
    sweep.see({"event": "finished", "time": time.time(), "attempt": last})
    return sweep.result(running=False)


@dataclass
class _Sweep:
    """The walk over the events. Times are in ticks."""

    spent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0))
    first: int | None = None
    now: int = 0
    unexplained: int = 0
    queued: bool = False
    counted: list[tuple[int, int, int]] = field(default_factory=list)
    """Steps that count so far, ascending: number, work, wait for data."""
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    attempts: list[Attempt] = field(default_factory=list)
    open: bool = False

    def see(self, event: Mapping[str, Any]) -> None:
        """Take in the next event."""
        passed = self._pass_time(event)
        number = event.get("attempt")
        number = number if isinstance(number, int) else 1
        if not self.attempts or number > self.attempts[-1].number:
            self._end(0)
            self.attempts.append(Attempt(number, self.now / _TICKS))
            self.open = True
            self.unexplained += passed
            self._rest_to("queue" if self.queued else "down")
        else:
            self.unexplained += passed
        self._sort(event, passed)

    def result(self, running: bool) -> Goodput:
        """What was found, after the last event."""
        if running and self.open and self.attempts[-1].steps:
            # Steps are reported one step late.
            self._take("productive", self._typical())
            self._rest_to("other")
        self._end(0)
        wall = self.now - (self.first or 0)
        seconds = {name: ticks / _TICKS for name, ticks in self.spent.items()}
        return Goodput(wall / _TICKS, seconds, tuple(self.attempts))

    def _pass_time(self, event: Mapping[str, Any]) -> int:
        then = _ticks(event.get("time"))
        if self.first is None:
            if then:
                self.first = self.now = then
            return 0
        passed = max(0, then - self.now)
        self.now += passed
        return passed

    def _sort(self, event: Mapping[str, Any], passed: int) -> None:
        """Give the unexplained time, or a part of it, to what the event is about."""
        name = event.get("event")
        if name == "queued":
            self._rest_to("down")
            self.queued = True
        elif name == "launched":
            self._rest_to("queue" if self.queued else "down")
            self.queued = False
        elif name in ("stage_started", "canary"):
            self._start_up()
        elif name == "step":
            self._step(event)
        elif name == "skipped":
            self._take("recomputed", self._typical())
        elif name == "rewound":
            self._lose(_whole(event.get("to")) + 1)
            self._take("recomputed", self._typical())
        elif name == "restored":
            self._lose(_whole(event.get("step")) + 1)
            self._take("restore", _ticks(event.get("seconds")))
        elif name == "evaluated":
            self._take("evaluation", _ticks(event.get("seconds")))
        elif name in ("finished", "stopped"):
            self._rest_to("other")
            self.attempts[-1].end = "complete" if name == "finished" else "stopped"
        elif name == "hang":
            self._take("hang", _ticks(event.get("silent_s")))
        elif name == "ended":
            self._ended(event, passed)
        elif name == "saving":
            self._take("save", _ticks(event.get("stall_s")))

    def _step(self, event: Mapping[str, Any]) -> None:
        step, seconds = _whole(event.get("step")), _ticks(event.get("step_s"))
        self._lose(step)
        self.recent.append(seconds)
        self.attempts[-1].steps += 1
        data = self._take("data", min(_ticks(event.get("data_s")), seconds))
        self.counted.append((step, self._take("productive", seconds - data), data))

    def _lose(self, first: int) -> None:
        """The steps from `first` on are trained again."""
        while self.counted and self.counted[-1][0] >= first:
            _, work, data = self.counted.pop()
            self.spent["productive"] -= work
            self.spent["data"] -= data
            self.spent["recomputed"] += work + data

    def _ended(self, event: Mapping[str, Any], passed: int) -> None:
        """The launcher saw the ranks end, `passed` after their last word."""
        attempt = self.attempts[-1]
        if event.get("code") in (COMPLETE, STOPPED):
            self._rest_to("other")
        self._end(passed)
        attempt.end = str(event.get("how", attempt.end))
        attempt.reason = str(event.get("reason") or "")

    def _end(self, silent: int) -> None:
        """Close the newest attempt, whose last word was `silent` ago."""
        if not self.open:
            self._rest_to("other")  # events after an end: of helpers that outlive the ranks
            return
        self.open = False
        attempt = self.attempts[-1]
        if attempt.end is not None:
            self._rest_to("other")
        elif not attempt.steps:
            self._start_up()
        else:
            silent = min(silent, self.unexplained)
            # The step that was not reported yet, and the one that was under way.
            self._take("recomputed", min(self.unexplained - silent, self._typical()))
            self._take("other", self.unexplained - silent)
            self._take("recomputed", self._typical())
            self._rest_to("hang")

    def _typical(self) -> int:
        return int(median(self.recent)) if self.recent else 0

    def _start_up(self) -> None:
        self.attempts[-1].start_up_s += self.unexplained / _TICKS
        self._rest_to("start_up")

    def _rest_to(self, bucket: str) -> None:
        self._take(bucket, self.unexplained)

    def _take(self, bucket: str, wanted: int) -> int:
        """Move unexplained time to a bucket, as far as there is any."""
        taken = min(wanted, self.unexplained)
        self.unexplained -= taken
        self.spent[bucket] += taken
        return taken


def _ticks(seconds: Any) -> int:
    """A number of seconds from a file, whatever stands there."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return 0
    # Not for a number that is none, either.
    return round(seconds * _TICKS) if 0 < seconds < _MOST_S else 0


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
