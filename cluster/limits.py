"""Limits: how long a rank may be at one thing, by the recipe and by what was learned so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..trainer.heartbeat import LEARNED, Beat, Section
from ..trainer.observe.events import read_events
from ..trainer.recovery_settings import HangSettings

EVENT = "longest"
_FACTOR = 10.0
_DATA = ("open", "evaluation", "proof")
_COMPILING = ("canary", "first_step", "evaluation")
"""What may have to compile kernels again, on a node or in a process that has none of them yet."""


@dataclass(frozen=True)
class Limits:
    """How long ranks may be at one thing.

    Attributes:
        settings: What the recipe says.
        known: What earlier attempts took at most, as `heartbeat.learned` names it, in seconds.
    """

    settings: HangSettings
    known: Mapping[str, float] = field(default_factory=dict)

    def of(self, beat: Beat) -> tuple[float, str]:
        """How long a rank may be at what it is at.

        Returns:
            Seconds, and where they come from, for people.
        """
        hang, known = self.settings, self._longest(beat, beat.section)
        if beat.section == "step":  # the second one has only the first to go by
            known = known or self._longest(beat, "first_step")
        if beat.section == "open":  # the data of one stage say nothing of those of another
            known = 0.0
        found = {"recovery.hang.least": hang.least}
        if not known or beat.section not in LEARNED:
            data = beat.section in _DATA
            found["recovery.hang.data" if data else "recovery.hang.first"] = (
                hang.data if data else hang.first
            )
        elif beat.section in _COMPILING and not beat.longest.get(beat.section):
            found["recovery.hang.first"] = hang.first  # known from earlier attempts only
        learned = f"{_FACTOR:.0f} times the longest before"
        found[learned] = _FACTOR * known
        why = max(found, key=lambda name: found[name])
        return found[why], why

    def _longest(self, beat: Beat, section: Section) -> float:
        """What a section took at most in this stage, in this attempt and in earlier ones."""
        before = self.known.get(f"{section} {beat.stage}", 0.0)
        return max(before, beat.longest.get(section, 0.0))


def known_limits(settings: HangSettings, events: Path, ranks: int) -> Limits:
    """Limits with what earlier attempts of a run have learned.

    Args:
        settings: What the recipe says.
        events: Of the run.
        ranks: Of the gang: what other numbers of ranks took says little.
    """
    known: dict[str, float] = {}
    for event in read_events(events):
        if event["event"] == EVENT and event.get("ranks") == ranks:
            seconds: Mapping[str, float] = event["seconds"]
            known |= {name: max(s, known.get(name, 0.0)) for name, s in seconds.items()}
    return Limits(settings, known)
