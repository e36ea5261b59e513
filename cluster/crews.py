"""Crews: who works on the next attempt, without nodes that failed, and maybe with fewer ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ..errors import RunError
from ..trainer.exactness import Level
from ..trainer.gang_sizes import fits, gang_sizes
from ..trainer.observe.events import EventLog, newest_attempt, read_events
from ..trainer.plan import run_ranks
from ..trainer.run_directory import RunDirectory
from ..trainer.settings import RunSettings
from .causes import Verdict
from .gang import Crew
from .nodes import Node, alive_nodes, free_slots, has_gone
from .placement import place, unit_of
from .voice import Voice

_POLL_S = 1.0
_STRIKES = 2
_LASTING = ("lost", "taken")
"""What keeps a node out of the run's later launches, too; the others may have been mended."""


class Crews:
    """Chooses nodes for one attempt after the other.

    Args:
        run: The run's settings.
        directory: Its folder, where exclusions are kept.
        voice: What the user hears.
        consent: The level of exactness that this launch may fall to.
        preflight: Looks at new nodes and says what is wrong, by id; None: they are taken as fit.
    """

    def __init__(
        self,
        run: RunSettings,
        directory: RunDirectory,
        voice: Voice,
        consent: Level | None,
        preflight: Callable[[Sequence[Node]], Mapping[str, str]] | None = None,
    ) -> None:
        self._preflight, self._known = preflight, set[str]()
        self._run, self._directory, self._voice, self._consent = run, directory, voice, consent
        events = read_events(directory.events)
        self._excluded = {
            e["node"]: str(e["reason"])
            for e in events
            if e["event"] == "excluded" and e.get("kind") in _LASTING
        }
        """Nodes that stay out, and why; Ray numbers a node anew when it is started again."""
        self._strikes: dict[str, int] = {}
        self._fewer = False
        """Whether nodes were waited for in vain: it is not done again at every attempt."""
        self._names: dict[str, str] = {}
        self._ranks: int | None = None
        """Of the first attempt."""
        self._gpu = False

    def next(self, wait: float, asked: Callable[[], bool]) -> Crew | None:
        """Nodes for the next attempt, as soon as there are enough; None once asked to stop.

        Args:
            wait: Seconds to wait for nodes that are not there; then fewer ranks may have to do.
            asked: Whether the driver was asked to stop.

        Raises:
            RunError: There are too few.
        """
        deadline, told = time.monotonic() + wait, False
        while not asked():
            found = self._found()
            self._inspect(found)
            late = time.monotonic() > deadline
            crew = self._crew(found, smaller=late or self._fewer)
            if crew is not None:
                self._fewer = late or self._fewer
                return crew
            if late:
                raise self._too_few(found)
            if not told:
                told = True
                self._voice.say(f"waiting for nodes, {wait:.0f} s at most: {self._state(found)}")
            time.sleep(_POLL_S)
        return None

    def _inspect(self, found: dict[str, Node]) -> None:
        """Look at the nodes that no rank was on yet."""
        new = [node for id, node in found.items() if id not in self._known | self._excluded.keys()]
        self._known |= {node.id for node in new}
        new = [node for node in new if node.slots(self._on_gpus(found))]
        if self._preflight is None or not new:
            return
        for node, reason in self._preflight(new).items():
            self._exclude(node, "preflight", f"failed preflight: {reason}")

    def learn(self, verdict: Verdict) -> None:
        """Nodes that are lost or about to be stay out.

        Those that had a part in two failures do as long as the others are enough.
        """
        found = self._found()
        for id in verdict.struck:
            self._strikes[id] = self._strikes.get(id, 0) + 1
            if verdict.cause == "preemption":
                self._exclude(id, "taken", "is taken away")
            elif id not in found or has_gone(found[id]):
                self._exclude(id, "lost", "was lost")
            elif self._strikes[id] == _STRIKES:
                self._tell(id, "failures", f"had a part in {_STRIKES} failures",
                           "it is left out while others are enough")  # fmt: skip

    def _exclude(self, id: str, kind: str, reason: str) -> None:
        if id not in self._excluded:
            self._excluded[id] = reason
            self._tell(id, kind, reason, "it is left out from now on")

    def _tell(self, id: str, kind: str, reason: str, then: str) -> None:
        name = self._names.get(id, id[:8])
        log = EventLog(self._directory.events, newest_attempt(self._directory.events))
        log.write("excluded", node=id, name=name, kind=kind, reason=reason)
        log.close()
        self._voice.say(f"node {name} {reason}: {then}")

    def _found(self) -> dict[str, Node]:
        found = {node.id: node for node in alive_nodes()}
        self._names |= {id: node.name for id, node in found.items()}
        return found

    def _crew(self, found: dict[str, Node], *, smaller: bool) -> Crew | None:
        """The largest gang that the nodes can take now."""
        gpu = self._on_gpus(found)
        slots = self._slots(found, gpu)
        rested = {id: n for id, n in slots.items() if self._strikes.get(id, 0) < _STRIKES}
        unit = unit_of(self._run, max(slots.values(), default=0))
        for ranks in self._sizes(slots, gpu, smaller=smaller):
            places = place(rested, ranks, unit) or place(slots, ranks, unit)
            if places:
                self._ranks = self._ranks or ranks
                return Crew(places, {id: found[id] for id in places}, gpu, unit)
        return None

    def _on_gpus(self, found: dict[str, Node]) -> bool:
        """Whether ranks compute on GPUs; a run that has does not change to cores."""
        self._gpu = self._gpu or any(node.gpus for node in found.values())
        return self._gpu

    def _slots(self, found: dict[str, Node], gpu: bool) -> dict[str, int]:
        """Ranks that each node takes now, of those that are not left out."""
        known, free = {id: node.slots(gpu) for id, node in found.items()}, free_slots(gpu)
        slots = {id: min(most, free.get(id, 0)) for id, most in known.items()}
        return {id: n for id, n in slots.items() if n and id not in self._excluded}

    def _sizes(self, slots: dict[str, int], gpu: bool, *, smaller: bool) -> tuple[int, ...]:
        """Numbers of ranks to try, the best first."""
        if self._run.ranks is not None:
            sizes = gang_sizes(self._run)
            return sizes if smaller and self._may_change() else sizes[:1]
        if self._ranks is not None:  # as the first attempt
            return (self._ranks,)
        if not gpu:
            return (run_ranks(self._run, 0),)
        return tuple(n for n in range(sum(slots.values()), 0, -1) if fits(self._run, n))

    def _may_change(self) -> bool:
        """Whether the run may go on with another number of ranks, which is E1 at most."""
        allowed = self._consent or self._run.checkpoint.exactness or self._promised()
        return allowed != "E2"

    def _promised(self) -> Level:
        """What the first attempt declared; nothing to keep before that."""
        for event in read_events(self._directory.events):
            if event["event"] == "run_started" and isinstance(event.get("exactness"), dict):
                return event["exactness"].get("level", "E2")
        return "E1"

    def _state(self, found: dict[str, Node]) -> str:
        gpu = self._on_gpus(found)
        free = sum(self._slots(found, gpu).values())
        kind = "GPUs" if gpu else "cores"
        wanted = self._run.ranks or self._ranks or run_ranks(self._run, 0)
        least = f", {least} at least" if (least := self._run.ranks_at_least) else ""
        text = f"the run wants {wanted} ranks{least}, the nodes have {free} free {kind}"
        names = [f"{self._names.get(id, id[:8])} {why}" for id, why in self._excluded.items()]
        return text + (f"; left out: {', '.join(names)}" if names else "")

    def _too_few(self, found: dict[str, Node]) -> RunError:
        mend = ", or mend those that are left out," if self._excluded else ""
        otherwise = "give `ranks_at_least` so that fewer ranks may do"
        if self._run.ranks_at_least is not None:
            otherwise = "lower `ranks_at_least`"
            if not self._may_change():
                otherwise = (
                    "let the run go on with fewer ranks, which is not bit-exact: "
                    "resume with --exactness E1"
                )
        fix = f"add nodes{mend} and resume, or {otherwise}"
        return RunError(f"too few nodes: {self._state(found)}", fix)
