"""Watch: the one who knows all ranks of a gang; asked by each node once in an interval.

It never asks anybody. Every node tells what its ranks do and hears what to do; the driver asks for
news once in an interval. So its work grows with the nodes, not with the ranks nor with the steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import Literal

from ..trainer.failure import COMPLETE, INTERRUPTED, STOPPED, USER_ERROR
from .placement import misplaced

Order = Literal["go on", "stop", "dump", "end"]
"""What ranks are to do: train, save and stop, show where they hang, end at once."""

_STRAGGLES = 1.5
_STRAGGLES_S = 0.05
_REPORTS = 5
_DUMP_S = 30.0
_LAST_DUMP_S = 6.0
"""For ranks that are left when another one failed: a new start waits for it."""

_LOOK_S = 0.1
_SILENT_INTERVALS = 15


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        rank: Its number.
        node: Ray's number of the node.
        host: Name of the machine.
        address: Of the node.
        port: Free there a moment ago; rank 0 listens on its own.
    """

    rank: int
    node: str
    host: str
    address: str
    port: int


@dataclass(frozen=True)
class Assignment:
    """What a rank has to know of the others.

    Attributes:
        local_rank: Its place among the ranks of its node.
        local_ranks: How many they are.
        host_ranks: Ranks on its machine, of all nodes that there are on it.
        address: Where rank 0 listens.
        port: On which port.
        order: What to do.
        problem: Why the gang cannot work as it is placed; empty if it can.
    """

    local_rank: int
    local_ranks: int
    host_ranks: int
    address: str
    port: int
    order: Order
    problem: str


@dataclass(frozen=True)
class Overdue:
    """A rank that is at something for longer than that may take.

    Attributes:
        rank: Its number.
        section: What it is at.
        step: Of the run.
        silent_s: For how long.
        limit_s: How long it may take.
        state: Of its process, as Linux says it: T is stopped, D waits for a device.
        why: Where the limit comes from, for people.
    """

    rank: int
    section: str
    step: int
    silent_s: float
    limit_s: float
    state: str
    why: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What one node says of all of its ranks.

    Attributes:
        node: Ray's number of it.
        step: The last that a rank there works on.
        overdue: Its ranks that are late.
        own_s: Seconds of a step that each rank computes and does not wait, over the last ones.
        dumped: Whether the stacks of its ranks are written.
        longest: What its ranks took at most, as `heartbeat.learned` names it, in seconds.
    """

    node: str
    step: int = 0
    overdue: tuple[Overdue, ...] = ()
    own_s: Mapping[int, float] = field(default_factory=dict)
    dumped: bool = False
    longest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hang:
    """A gang that does not move any more.

    Attributes:
        overdue: The rank that is to blame as far as one can tell, else the most overdue one.
        node: The node to blame; empty where it is not known.
        words: What to tell.
    """

    overdue: Overdue | None
    node: str
    words: str


@dataclass(frozen=True)
class End:
    """How a rank's process ended.

    Attributes:
        code: Its exit code.
        noticed: Whether it was told before that something is about to be taken away.
        nodes: Which nodes are, as far as that was told.
    """

    code: int
    noticed: bool = False
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    node: str
    own_s: float
    typical_s: float


@dataclass(frozen=True)
class News:
    """What the driver hears.

    Attributes:
        nodes: The node of each rank that has joined.
        order: What ranks hear now.
        hang: If there is one.
        ends: Of the ranks that have ended.
        stragglers: Those that are new.
        step: The last that any rank works on.
        longest: What ranks took at most, as `heartbeat.learned` names it, in seconds.
    """

    nodes: Mapping[int, str]
    order: Order
    hang: Hang | None
    ends: Mapping[int, End]
    stragglers: tuple[Straggler, ...]
    step: int
    longest: Mapping[str, float] = field(default_factory=dict)


class Watch:
    """Knows the ranks of one attempt after the other.

    Args:
        interval: Seconds between two reports of a node.
        clock: Seconds that only grow.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self.calls = 0
        """Of nodes, ranks and driver, since the beginning."""
        self._joined = asyncio.Event()
        self.begin(0, 0, 1)

    def begin(
        self, attempt: int, ranks: int, unit: int, group: str = "tensor x context group"
    ) -> None:
        """Forget the attempt before; another one of so many ranks begins.

        Args:
            attempt: Its number.
            ranks: How many.
            unit: Ranks in a row that have to be on one node.
            group: What they are.
        """
        self._attempt, self._ranks, self._unit, self._group = attempt, ranks, unit, group
        self._joined.set()
        self._joined = asyncio.Event()
        self._places: dict[int, Place] = {}
        self._order: Order = "go on"
        self._hang: Hang | None = None
        self._ends: dict[int, End] = {}
        self._reports: dict[str, NodeReport] = {}
        self._heard: dict[str, float] = {}
        self._suspected: float | None = None
        self._dump_by = 0.0
        self._slow: dict[int, int] = {}
        self._known: set[int] = set()
        """Stragglers that were told of: once in an attempt is enough."""
        self._told: list[Straggler] = []

    async def join(self, attempt: int, place: Place) -> Assignment:
        """A rank is there; returns once all are."""
        self.calls += 1
        if attempt != self._attempt:
            return Assignment(0, 1, 1, "", 0, "end", "")
        joined = self._joined
        self._places[place.rank] = place
        self._heard[place.node] = self._clock()
        if len(self._places) == self._ranks:
            joined.set()
        await joined.wait()
        if attempt != self._attempt:
            return Assignment(0, 1, 1, "", 0, "end", "")
        return self._assignment(place)

    def _assignment(self, place: Place) -> Assignment:
        places = [self._places[rank] for rank in sorted(self._places)]
        here = [other.rank for other in places if other.node == place.node]
        first = places[0]
        one_host = len({other.host for other in places}) == 1
        return Assignment(
            local_rank=here.index(place.rank),
            local_ranks=len(here),
            host_ranks=sum(other.host == place.host for other in places),
            address="127.0.0.1" if one_host else first.address,
            port=first.port,
            order=self._order,
            problem=misplaced([other.node for other in places], self._unit, self._group),
        )

    def report(self, attempt: int, report: NodeReport) -> Order:
        """A node tells of its ranks and hears what they are to do."""
        self.calls += 1
        if attempt != self._attempt:
            return "end"
        before = self._reports.get(report.node)
        self._reports[report.node] = report
        self._heard[report.node] = self._clock()
        self._look_for_hangs()
        if before is None or report.step > before.step:  # else it is the same step once more
            self._look_for_stragglers(report)
        return self._order

    def ended(self, attempt: int, rank: int, end: End) -> None:
        """A rank's process has ended; where it failed, the others are to show where they are."""
        self.calls += 1
        if attempt == self._attempt:
            self._ends[rank] = end
            if end.code not in (COMPLETE, STOPPED, USER_ERROR, INTERRUPTED):
                self._dump_the_rest()

    async def last_words(self, attempt: int) -> None:
        """The gang is about to be ended: returns once a failed one has nothing more to show."""
        self.calls += 1
        codes = [end.code for end in self._ends.values()]
        well = len(codes) == self._ranks and set(codes) <= {COMPLETE, STOPPED, INTERRUPTED}
        if attempt != self._attempt or well or self._hang is not None or USER_ERROR in codes:
            return
        self._dump_the_rest()
        while self._clock() < self._dump_by and any(map(self._may_dump, self._reports.values())):
            await asyncio.sleep(_LOOK_S)

    def _dump_the_rest(self) -> None:
        if self._order in ("go on", "stop"):
            self._order, self._dump_by = "dump", self._clock() + _LAST_DUMP_S

    def _may_dump(self, report: NodeReport) -> bool:
        """Whether the stacks of a node are still to come: it and who writes them are there."""
        first = min(rank for rank, p in self._places.items() if p.node == report.node)
        silent = self._clock() - self._heard[report.node]
        return not report.dumped and first not in self._ends and silent <= 2 * self._interval + 1

    def stop(self) -> None:
        """Ranks are to save and stop."""
        self.calls += 1
        if self._order == "go on":
            self._order = "stop"

    def news(self) -> News:
        """What the driver has to know; stragglers are told once."""
        self.calls += 1
        self._look_for_hangs()
        told, self._told = tuple(self._told), []
        nodes = {rank: place.node for rank, place in self._places.items()}
        step = max((report.step for report in self._reports.values()), default=0)
        longest: dict[str, float] = {}
        for report in self._reports.values():
            longest |= {k: max(s, longest.get(k, 0.0)) for k, s in report.longest.items()}
        return News(nodes, self._order, self._hang, dict(self._ends), told, step, longest)

    def _look_for_hangs(self) -> None:
        now = self._clock()
        if self._order == "dump" and self._hang is not None:
            waited = now > self._dump_by
            if waited or all(report.dumped for report in self._reports.values()):
                self._order = "end"
        failed = any(end.code not in (COMPLETE, STOPPED) for end in self._ends.values())
        if self._order in ("dump", "end") or failed:
            return
        late = [(late, r.node) for r in self._reports.values() for late in r.overdue]
        quiet = self._quiet(now)
        if not late and not quiet:
            self._suspected = None
            return
        if self._suspected is None:
            self._suspected = now
        # All nodes are heard before one of them is blamed.
        if now - self._suspected >= 1.5 * self._interval:
            self._hang = blamed(late, quiet)
            self._order, self._dump_by = "dump", now + _DUMP_S

    def _quiet(self, now: float) -> list[str]:
        """Nodes that have not been heard for long; Ray says of those that are lost itself."""
        if len(self._places) < self._ranks or self._ends:
            return []
        patience = max(60.0, _SILENT_INTERVALS * self._interval)
        return [node for node, heard in self._heard.items() if now - heard > patience]

    def _look_for_stragglers(self, report: NodeReport) -> None:
        """Compare a node's ranks with those of all nodes."""
        all_own = [own for r in self._reports.values() for own in r.own_s.values() if own > 0]
        if len(all_own) < 2:
            return
        typical = median_low(all_own)
        for rank, own in report.own_s.items():
            slow = own > _STRAGGLES * typical and own - typical > _STRAGGLES_S
            self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
            if self._slow[rank] >= _REPORTS and rank not in self._known:
                self._known.add(rank)
                self._told.append(Straggler(rank, report.node, own, typical))


def blamed(late: list[tuple[Overdue, str]], quiet: list[str]) -> Hang:
    """Who is to blame for a hang, as far as one can tell.

    A process that is stopped or waits for a device is; of the others the one that is behind.

    Args:
        late: Ranks that are overdue, and their nodes.
        quiet: Nodes that are not heard of any more.
    """
    if not late:
        return Hang(None, quiet[0], f"node {quiet[0][:8]} is not heard of any more")
    stuck = [(one, node) for one, node in late if one.state in ("T", "t", "D")]
    behind = min(one.step for one, _ in late)
    last = [(one, node) for one, node in late if one.step == behind]
    if stuck:
        one, node = stuck[0]
    elif len(last) == 1 and len(late) > 1:
        one, node = last[0]
    else:
        one, node = max(late, key=lambda item: item[0].silent_s)[0], ""
    how = {"T": "its process is stopped", "t": "its process is stopped"}.get(one.state, "")
    how = how or ("its process waits for a device" if one.state == "D" else "")
    others = len(late) - 1
    words = (
        f"rank {one.rank} is in section {one.section} of step {one.step} for {one.silent_s:.0f} s, "
        f"longer than the {one.limit_s:.0f} s that it may take"
    )
    words += f" ({one.why})" if one.why else ""
    words += f"; {how}" if how else ""
    words += f"; so are {others} more" if others else ""
    return Hang(one, node, words)
