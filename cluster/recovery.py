"""Recovery: how long a run took from the end of one gang to the first new step of the next."""

from __future__ import annotations

from pathlib import Path

from ..trainer.observe.events import read_events
from ..trainer.observe.goodput import goodput_so_far
from ..trainer.observe.summary import goodput_line


def recoveries(events: Path) -> list[float]:
    """Seconds from each failure to the first step after it."""
    found, failed = [], None
    for event in read_events(events):
        if event.get("event") == "ended":
            failed = event["time"] if event.get("how") == "failed" else None
        elif event.get("event") == "step" and failed is not None:
            found.append(event["time"] - failed)
            failed = None
    return found


def recovery_line(events: Path) -> str | None:
    """What the restarts of a run cost; None where there were none."""
    if not (found := recoveries(events)):
        return None
    spent = goodput_so_far(events)
    share = goodput_line(spent.share, spent.wall_s, spent.seconds)
    times = f"{len(found)} time{'s' * (len(found) > 1)}"
    mean, most = sum(found) / len(found), max(found)
    return f"recovered {times}: {mean:.0f} s to the next step, {most:.0f} s at most; {share}"
