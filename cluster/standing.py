"""Standing: where a run is, by what its folder and its cluster say, as far as they can be asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LongspanError
from ..trainer.failure import CRASHED, INTERRUPTED, STOPPED, USER_ERROR
from ..trainer.run_directory import RunDirectory
from ..trainer.status import Position
from .jobs import Job, Jobs, number_of
from .registry import Record
from .submission import cluster_of

_TAIL_BYTES = 65536
_LIST_S = 0.8
"""Clusters that are slower than that must not keep a list of runs waiting."""

CLOCKS_S = 60.0
"""What the clocks of two nodes may be apart."""

Answer = tuple[Mapping[str, Sequence[Job]], str]
"""The jobs on a cluster by run, or why they are not known."""

_BY_JOB = {"PENDING": "queued", "RUNNING": "running", "SUCCEEDED": "complete", "STOPPED": "stopped"}
_BY_CODE = {STOPPED: "stopped", INTERRUPTED: "interrupted"}


@dataclass(frozen=True)
class Standing:
    """Where a run is.

    Attributes:
        record: The run.
        state: new, queued, running, complete, stopped, interrupted, failed, lost; `gone` without
            its folder, `unknown` where neither folder nor cluster says.
        position: What its newest events say.
        job: Its newest job.
        note: Why something is not known.
    """

    record: Record
    state: str
    position: Position = field(default_factory=Position)
    job: Job | None = None
    note: str = ""

    @property
    def is_live(self) -> bool:
        """Whether something works on it, or is about to."""
        return self.state in ("queued", "running")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        place = self.record.cluster
        return {
            "id": self.record.id,
            "recipe": self.record.recipe,
            "created": self.record.created,
            "run_dir": self.record.run_dir,
            "cluster": place.name if place else None,
            "state": self.state,
            "step": self.position.step,
            "steps": self.position.steps,
            "loss": self.position.loss,
            "job": self.job.id if self.job else None,
            "note": self.note or None,
        }


def stand(records: Sequence[Record]) -> list[Standing]:
    """Where runs are; every cluster is asked once, all of them at the same time."""
    answers = _answers(records, _LIST_S)
    return [_stand(record, *_mine(record, answers)) for record in records]


def stand_alone(record: Record, limit_s: float = 30.0) -> Standing:
    """Where one run is.

    Args:
        record: The run.
        limit_s: Seconds that its cluster has to answer in.
    """
    return _stand(record, *_mine(record, _answers([record], limit_s)))


def job_state(job: Job) -> str:
    """A job's end, or what it does, in our words."""
    return _BY_JOB.get(job.status) or _BY_CODE.get(job.exit_code or 0, "failed")


def merged(folder: str | None, job: Job | None, since: float | None = None) -> str:
    """The state of a run by that of its folder, None where it is not visible, and its job.

    Args:
        folder: How the newest attempt in it ended, or what it does.
        job: The newest one.
        since: When the folder had its newest event, in unix seconds.
    """
    if job is None:
        return folder or "unknown"
    if job.is_live:
        return folder if folder in ("running", "complete") else job_state(job)
    if folder in (None, "new", "running", "lost"):
        # The lock of a driver that was killed with its node may look held from here.
        killed = folder in ("running", "lost") and job.status == "STOPPED"
        return "interrupted" if killed else job_state(job)
    # A driver that fails before its first attempt leaves no event: the end is an older one's.
    if job.exit_code in (CRASHED, USER_ERROR) and folder != "complete" and not _after(job, since):
        return "failed"
    return folder


def _after(job: Job, since: float | None) -> bool:
    """Whether somebody else has worked on the run when a job had ended already."""
    return since is not None and job.ended is not None and since > job.ended + CLOCKS_S


def _stand(record: Record, jobs: Sequence[Job], note: str) -> Standing:
    position, job = Position(), jobs[-1] if jobs else None
    folder = _folder_state(record.directory, position)
    if record.cluster is None:
        return Standing(record, folder or "gone", position)
    if not jobs and not note:
        note = "the cluster does not know its jobs any more: its head was restarted"
    if job is not None and job.trouble:
        note = f"Ray says: {job.trouble}"
    return Standing(record, merged(folder, job, position.event_time), position, job, note)


def _folder_state(directory: RunDirectory, position: Position) -> str | None:
    if not directory.is_run():
        return None
    owner, state = directory.owner(), "new"
    for event in _newest_events(directory.events):
        position.see(event)
        state = str(event.get("how")) if event.get("event") == "ended" else "lost"
    if directory.is_complete():
        return "complete"
    return "running" if owner is not None else state


def _newest_events(path: Path) -> Iterator[Mapping[str, Any]]:
    """The events in the last bytes of a file; what a list needs is in them."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _answers(records: Sequence[Record], limit_s: float) -> dict[str, Answer]:
    """What the clusters of runs say within a time, by name; those that take longer are left behind.

    A socket's own time-out begins anew with every byte, and looking up a name has none.
    """
    places = {record.cluster.name: record for record in records if record.cluster}
    found: dict[str, Answer] = {}

    def ask(name: str, record: Record) -> None:
        found[name] = _jobs_of(record, limit_s)

    until = time.monotonic() + limit_s
    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in places.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    silent = {name: ({}, f"cluster {name} gave no answer in {limit_s:g} s") for name in places}
    return silent | found


def _jobs_of(record: Record, timeout_s: float) -> Answer:
    """The jobs on a run's cluster by run, or why they are not known."""
    found: dict[str, list[Job]] = {}
    try:
        for job in Jobs(cluster_of(record), timeout_s).all():
            if job.run is not None:
                found.setdefault(job.run, []).append(job)
    except LongspanError as error:
        return {}, error.what
    for jobs in found.values():
        jobs.sort(key=lambda job: (number_of(job.id), job.id))
    return found, ""


def _mine(record: Record, answers: Mapping[str, Answer]) -> tuple[Sequence[Job], str]:
    if record.cluster is None:
        return [], ""
    jobs, note = answers[record.cluster.name]
    return jobs.get(record.id, []), note
