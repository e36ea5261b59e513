"""Crews: who works on the next attempt, without nodes that failed, and maybe with fewer ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import RunError
from ..trainer.exactness import Level
from ..trainer.gang_sizes import fits, gang_sizes
from ..trainer.observe.events import EventLog, newest_attempt, read_events
from ..trainer.plan import run_ranks
from ..trainer.run_directory import RunDirectory
from ..trainer.settings import RunSettings
from .causes import Verdict
from .gang import Crew
from .growth import Growth
from .nodes import Device, Node, alive_nodes, free_slots, has_gone
from .placement import place, unit_of
from .voice import Voice

_POLL_S = 1.0
_RENEW_S = 15.0
"""Between two requests for nodes: another run's takes the place of ours, and others take nodes."""

_STRIKES = 2
_BESIDE = 8
"""Known nodes that new ones meet: enough to tell who is cut off, and few enough to be quick."""

_LASTING = ("lost", "taken")
"""What keeps a node out of the run's later launches, too; the others may have been mended."""


class Crews:
    """Chooses nodes for one attempt after the other.

    Args:
        run: The run's settings.
        directory: Its folder, where exclusions are kept.
        voice: What the user hears.
        consent: The level of exactness that this launch may fall to.
        preflight: Looks at new nodes, which meet known ones that are free (the second argument),
            and says what is wrong, by id; None: they are taken as fit.
        device: What every rank is to have; None: as before in this run, else GPUs if any are up,
            else cores.
        planned: Ranks to wait for, where the run says none; None: as before in this run, else a
            rank for each GPU that is up.
        slots: Ranks that the largest node takes that there can be; 0: as those that are up.

    Attributes:
        planned: As given, or as before in this run.
    """

    def __init__(
        self,
        run: RunSettings,
        directory: RunDirectory,
        voice: Voice,
        consent: Level | None,
        preflight: Callable[[Sequence[Node], Sequence[Node]], Mapping[str, str]] | None = None,
        device: Device | None = None,
        planned: int | None = None,
        slots: int = 0,
    ) -> None:
        self._preflight, self._known = preflight, set[str]()
        self._run, self._directory, self._voice, self._consent = run, directory, voice, consent
        self._excluded: dict[str, str] = {}
        """Nodes that stay out, and why; Ray numbers a node anew when it is started again."""
        before: Mapping[str, Any] = {}
        for event in read_events(directory.events):
            if event["event"] == "excluded" and event.get("kind") in _LASTING:
                self._excluded[event["node"]] = str(event["reason"])
            elif event["event"] == "launched" and "device" in event:
                before = event
        self._strikes: dict[str, int] = {}
        self._fewer = False
        """Whether nodes were waited for in vain: it is not done again at every attempt."""
        self._names: dict[str, str] = {}
        self._ranks: int | None = None
        """Of the first attempt."""
        # Whoever resumes a run without a record of it cannot say what was decided at submission.
        self._device: Device | None = device or before.get("device")
        self.planned: int | None = planned or before.get("ranks")
        self._largest = slots
        self._growth = Growth()

    def next(self, asked: Callable[[], bool]) -> Crew | None:
        """Nodes for the next attempt, as soon as there are enough; None once asked to stop.

        They are waited for as long as `recovery.wait` says; then fewer ranks may have to do. A
        cluster that grows is asked for what is missing, again and again, until `settle`.

        Args:
            asked: Whether the driver was asked to stop.

        Raises:
            RunError: There are too few.
        """
        wait = self._run.recovery.wait
        deadline, told, ask_at = time.monotonic() + wait, False, 0.0
        while not asked():
            found = self._found()
            late = time.monotonic() > deadline
            smaller = late or self._fewer
            crew = self._crew(found, smaller=smaller)
            # Nodes that join one by one are looked at together, once they would be enough.
            if crew is not None or late:
                began = time.monotonic()
                if self._inspect(found):
                    crew, ask_at = self._crew(found, smaller=smaller), 0.0
                deadline += time.monotonic() - began  # a look is no waiting
            if crew is not None:
                self._fewer = late or self._fewer
                self._ranks = self._ranks or len(crew.places)
                return crew
            if late:
                raise self._too_few(found)
            if time.monotonic() >= ask_at:
                ask_at = time.monotonic() + _RENEW_S
                self._growth.ask(self._wish(found))
            if not told:
                told = True
                most = f"{wait:g} s at most (recovery.wait)"
                self._voice.say(f"waiting for nodes, {most}: {self._state(found)}")
            time.sleep(_POLL_S)
        return None

    def settle(self) -> None:
        """Nothing is waited for any more: the gang has its nodes, or there will be none."""
        self._growth.take_back()

    def _inspect(self, found: dict[str, Node]) -> bool:
        """Look at the nodes that no rank was on yet; whether one of them is left out for it."""
        new = [node for id, node in found.items() if id not in self._known | self._excluded.keys()]
        old = [node for node in found.values() if node not in new]
        self._known |= {node.id for node in new}
        new = [node for node in new if node.slots(self._on_gpus(found))]
        if self._preflight is None or not new:
            return False
        problems = self._preflight(new, self._beside(found, old))
        for node, reason in problems.items():
            self._exclude(node, "preflight", f"failed preflight: {reason}")
        return bool(problems)

    def _beside(self, found: dict[str, Node], nodes: Sequence[Node]) -> list[Node]:
        """Some of the nodes that are known to be fit and that nobody works on."""
        gpu = self._on_gpus(found)
        free = self._slots(found, gpu)
        idle = [node for node in nodes if node.slots(gpu) and free.get(node.id) == node.slots(gpu)]
        # A node that had a part in a failure may spoil what others measure with it.
        return [node for node in idle if node.id not in self._strikes][:_BESIDE]

    def _wish(self, found: dict[str, Node]) -> list[dict[str, int]]:
        """What has to have room at once: the gang, and beside it what others use or is left out."""
        gpu = self._on_gpus(found)
        free = self._slots(found, gpu)
        unit = unit_of(self._run, max(self._largest, self._most(found, gpu)))
        sizes = [unit] * -(-self._wanted // unit)
        taken = (node.slots(gpu) - free.get(id, 0) for id, node in found.items())
        sizes += [size for size in taken if size]
        return [{"CPU": size} | ({"GPU": size} if gpu else {}) for size in sizes]

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
        # A larger node may come, or be in use and come free: groups are not split at once.
        most = max(self._largest, self._most(found, gpu))
        if smaller:
            most = max(slots.values(), default=0)
        unit = unit_of(self._run, most)
        for ranks in self._sizes(slots, gpu, smaller=smaller):
            places = place(rested, ranks, unit) or place(slots, ranks, unit)
            if places:
                return Crew(places, {id: found[id] for id in places}, gpu, unit)
        return None

    def _on_gpus(self, found: dict[str, Node]) -> bool:
        """Whether ranks compute on GPUs; a run that has does not change to cores."""
        if self._device is None and any(node.gpus for node in found.values()):
            self._device = "gpu"
        return self._device == "gpu"

    @property
    def _wanted(self) -> int:
        """Ranks."""
        return self._run.ranks or self._ranks or self.planned or run_ranks(self._run, 0)

    def _most(self, found: dict[str, Node], gpu: bool) -> int:
        """Ranks that the largest node takes, of those that are not left out."""
        fit = [node.slots(gpu) for id, node in found.items() if id not in self._excluded]
        return max(fit, default=0)

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
        if self.planned is not None and not (smaller and self._may_change()):
            return (self.planned,)
        most = min(sum(slots.values()), self.planned or sum(slots.values()))
        return tuple(n for n in range(most, 0, -1) if fits(self._run, n))

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
        wanted = self._wanted
        least = f", {least} at least" if (least := self._run.ranks_at_least) else ""
        text = f"the run wants {wanted} ranks{least}, the nodes have {free} free {kind}"
        names = [f"{self._names.get(id, id[:8])} {why}" for id, why in self._excluded.items()]
        return text + (f"; left out: {', '.join(names)}" if names else "")

    def _too_few(self, found: dict[str, Node]) -> RunError:
        mend = ", or mend those that are left out," if self._excluded else ""
        wait = f"{self._run.recovery.wait:g} s (recovery.wait)"
        fix = f"add nodes{mend} and resume{self._otherwise(found)}"
        return RunError(f"too few nodes after {wait}: {self._state(found)}", fix)

    def _otherwise(self, found: dict[str, Node]) -> str:
        """How a run can go on without more nodes; no resume changes a setting."""
        run, gpu = self._run, self._on_gpus(found)
        slots = self._slots(found, gpu)
        sizes = gang_sizes(run)[1:]
        if run.ranks is None:
            sizes = [n for n in range(self._wanted - 1, 0, -1) if gpu and fits(run, n)]
        unit = unit_of(run, max(slots.values(), default=0))
        if any(place(slots, ranks, unit) for ranks in sizes):
            if not self._may_change():
                return (
                    ", or let the run go on with fewer ranks, which is not bit-exact: "
                    "resume with --exactness E1"
                )
            return ", or resume now, with fewer ranks"
        if run.ranks is None:
            return ""
        lower = "a lower" if run.ranks_at_least is not None else "a"
        return f"; a new run can be submitted with {lower} `ranks_at_least`, so that fewer do"
