"""Recovered: what the faults of a soak cost, read from the run's events."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from longspan.trainer.observe.events import read_events
from longspan.trainer.observe.goodput import measure_goodput
from support.cluster_soak import Struck


@dataclass(frozen=True)
class Cost:
    """What one fault cost.

    Attributes:
        kind: Of the fault.
        moment: When it came: `step` or `start`.
        told_s: Until the driver had ended the attempt; None where the driver itself was gone.
        next_step_s: Until the first step of another attempt; None where the next fault came before.
        caught_up_s: Until a step that was not made before; None as above.
        lost: Steps that were made again.
    """

    kind: str
    moment: str
    told_s: float | None
    next_step_s: float | None
    caught_up_s: float | None
    lost: int


def costs(run_dir: Path, struck: Sequence[Struck]) -> list[Cost]:
    """What each fault cost, in their order."""
    events = list(read_events(run_dir / "events.jsonl"))
    steps = [event for event in events if event["event"] == "step"]
    ends = {event["attempt"]: event["time"] for event in events if event["event"] == "ended"}
    found = []
    for fault, following in zip(struck, [*struck[1:], None], strict=True):
        before = [e for e in steps if e["attempt"] <= fault.attempt]
        later = [e for e in steps if e["attempt"] > fault.attempt]
        newest = before[-1]["step"] if before else 0
        made = bool(before) and before[-1]["attempt"] == fault.attempt
        until = math.inf if following is None else following.time
        caught_up = next((e for e in later if e["step"] > newest), None)
        told = ends.get(fault.attempt)
        found.append(
            Cost(
                kind=fault.kind,
                moment=fault.moment,
                told_s=None if told is None else told - fault.time,
                next_step_s=_after(fault, later[0] if later else None, until),
                caught_up_s=_after(fault, caught_up, until),
                lost=newest - later[0]["step"] + 1 if made and later else 0,
            )
        )
    return found


def _after(fault: Struck, event: dict[str, Any] | None, until: float) -> float | None:
    return event["time"] - fault.time if event is not None and event["time"] < until else None


def spread(values: Sequence[float | None]) -> dict[str, float | int]:
    """Number, median, 90th percentile and most of the values that are known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {"count": 0}
    ninety = known[math.ceil(0.9 * len(known)) - 1]
    return {
        "count": len(known),
        "median": round(median(known), 2),
        "p90": round(ninety, 2),
        "most": round(known[-1], 2),
    }


def summary(run_dir: Path, struck: Sequence[Struck], cold: Sequence[float]) -> dict[str, Any]:
    """All numbers of a soak.

    Args:
        run_dir: Of the run.
        struck: Its faults.
        cold: Seconds that cold starts on the same machine took to their first step.
    """
    found, start = costs(run_dir, struck), median(cold)
    events = list(read_events(run_dir / "events.jsonl"))
    met = {fault.attempt for fault in struck}
    others = [e for e in events if e["event"] == "ended" and e["attempt"] not in met]
    recovery = spread([cost.next_step_s for cost in found])
    return {
        "cold_start_s": spread(cold),
        "recovery_s": recovery,
        "caught_up_s": spread([cost.caught_up_s for cost in found]),
        "over_cold_start": round(recovery["median"] / start, 2) if recovery["count"] else None,
        "lost_steps": {
            "all": sum(cost.lost for cost in found),
            "most": max((cost.lost for cost in found), default=0),
        },
        "attempts": max(event["attempt"] for event in events),
        "not_by_faults": [e.get("reason", "") for e in others if e["how"] == "failed"],
        "goodput": measure_goodput(events).as_dict(),
        "kinds": {kind: _of_kind(found, kind, start) for kind in sorted({c.kind for c in found})},
        "faults": [asdict(cost) for cost in found],
    }


def _of_kind(found: Sequence[Cost], kind: str, start: float) -> dict[str, Any]:
    mine = [cost for cost in found if cost.kind == kind]
    recovery = spread([cost.next_step_s for cost in mine])
    return {
        "faults": len(mine),
        "told_s": spread([cost.told_s for cost in mine]),
        "recovery_s": recovery,
        "over_cold_start": round(recovery["median"] / start, 2) if recovery["count"] else None,
        "lost_steps": sum(cost.lost for cost in mine),
    }
